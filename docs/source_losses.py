"""Print the source losses of one prompt for all tasks beside those of a prompt a task: `python docs/source_losses.py RUNS`.

RUNS is the folder of configs/evidence/separate_prompts.yaml. A loss is the mean over the last 50 steps and all seeds, on the texts
of these steps.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean

LAST = 50
TOGETHER = "together"


def last_losses(run: Path) -> dict[str, float]:
    """Return the mean loss of each source task over the last steps of a run."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record["metrics"] for record in records if record["stage"] == "source" and "source/loss" in record["metrics"]][-LAST:]
    names = {name for metrics in steps for name in metrics if name.startswith("source/loss/")}
    if not names:  # a run with one source task
        return {run.name.rsplit("-s", 1)[0]: fmean(metrics["source/loss"] for metrics in steps)}
    return {name.removeprefix("source/loss/"): fmean(metrics[name] for metrics in steps if name in metrics) for name in names}


def main(folder: Path) -> None:
    """Print a table: task, loss of the shared prompt, loss of its own prompt, difference in percent; and the means."""
    of_row: dict[str, list[dict[str, float]]] = {}
    for run in sorted(path.parent for path in folder.glob("*/metrics.jsonl")):
        of_row.setdefault(run.name.rsplit("-s", 1)[0], []).append(last_losses(run))
    if TOGETHER not in of_row:
        sys.exit(f"{folder}: has no run of the row {TOGETHER}; give the folder of configs/evidence/separate_prompts.yaml")
    shared = of_row.pop(TOGETHER)
    lines = []
    for task, runs in of_row.items():
        lines.append((task, fmean(run[task] for run in shared), fmean(run[task] for run in runs)))
    lines.append(("mean", *(fmean(line[column] for line in lines) for column in (1, 2))))
    sys.stdout.write("| source task | one prompt for all | a prompt of its own | difference |\n|---|--:|--:|--:|\n")
    for task, together, alone in lines:
        sys.stdout.write(f"| `{task}` | {together:.3f} | {alone:.3f} | {together / alone - 1:+.0%} |\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("runs", metavar="RUNS", type=Path)
    main(parser.parse_args().runs)
