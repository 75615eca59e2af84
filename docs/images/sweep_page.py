"""Draw docs/images/sweep_page.png and sweep_table.png, MLflow's page of a sweep: `python docs/images/sweep_page.py OUTPUT`.

OUTPUT is the folder with the sweep's mlflow.db, after `python launcher/sweep.py --config configs/sweep/sigma_lr.yaml`. Needs
chromium and aiohttp.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "tests" / "support"))
LINES = "document.querySelectorAll('.parcoords, g.parcoords, .parcoords-line-layers, .js-plotly-plot').length > 0"
TABLE = "document.body.innerText.includes('lr_full')"
EXPERIMENT = "sigma_lr"
SIZE = "1640,1250"
ASSISTANT = 422  # pixels at the right, of a panel that the first visit opens


def main(output: Path) -> None:
    """Open the page on the comparison and on the table, and keep what it shows."""
    import browser
    from PIL import Image

    from bpt_dist.tracking.ui import ui

    if not (output / "mlflow.db").is_file():
        sys.exit(f"{output}: has no mlflow.db; run the sweep first, and give its output folder")
    os.environ["BPT_SCREENSHOTS"] = str(HERE)
    page = ui(f"sqlite:///{output.resolve() / 'mlflow.db'}")
    try:
        link = page.links[EXPERIMENT]
        with tempfile.TemporaryDirectory() as folder:
            for name, place, until in (
                ("sweep_page", link, LINES),
                ("sweep_table", link.replace("compareRunsMode=CHART&", ""), TABLE),
            ):
                browser.seen(place, Path(folder), name, until, SIZE)
                with Image.open(HERE / f"{name}.png") as picture:
                    picture.crop((0, 0, picture.width - ASSISTANT, picture.height)).save(HERE / f"{name}.png", optimize=True)
    finally:
        page.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("output", metavar="OUTPUT", type=Path)
    main(parser.parse_args().output)
