"""Write `configs/schema.json`, which editors use to complete and check configurations: `python -m bpt_dist.settings.schema`."""

from __future__ import annotations

import json
from pathlib import Path

from bpt_dist import config

SCHEMA = Path(__file__).parents[2] / "configs" / "schema.json"


def schema_text() -> str:
    """Return the content of `configs/schema.json`."""
    return json.dumps(config.json_schema(), indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    SCHEMA.write_text(schema_text(), encoding="utf-8")
