"""Records of `metrics.jsonl` as tests compare them: without what differs when the same steps are taken again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from bpt_dist.storage.metrics_log import COST


def repeatable(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return records without their times and without what their steps cost."""
    return [
        {key: value for key, value in record.items() if key not in ("time", "metrics")}
        | {"metrics": {name: value for name, value in record["metrics"].items() if f"/{COST}/" not in name}}
        for record in records
    ]
