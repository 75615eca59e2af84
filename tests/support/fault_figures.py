"""What the fault tests measured, as JSON lines that `make fault-table` renders into docs/faults.md.

A line belongs to a row of the fault table (F1 ... F25), a part of it ("2 ranks, fork server") and a case; a case that is run again
replaces its older line. Counts are summed over the cases of a part; of figures named `worst_*` the largest is shown.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FOLDER = Path(os.environ.get("BPT_FAULT_FIGURES", Path(__file__).parents[2] / "build" / "faults"))


def record_figure(row: str, part: str, *, case: str = "", trials: int = 1, passed: int = 1, **figures: float | str) -> None:
    """Append what one case measured: `trials`, how many of them `passed`, and e.g. `worst_seconds=8.4`, `torn_accepted=0`."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    line = {"row": row, "part": part, "case": case, "trials": trials, "passed": passed, **figures, "at": round(time.time())}
    descriptor = os.open(FOLDER / f"{row}.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, (json.dumps(line, sort_keys=True) + "\n").encode())  # one call: several workers write at once
    finally:
        os.close(descriptor)


@contextmanager
def measured(row: str, part: str, case: str = "", trials: int = 1) -> Iterator[dict[str, Any]]:
    """Record the block as `trials` passed, or none when it raises; what it puts into the yielded mapping is kept with them.

    What a row promises about time belongs into `worst_seconds`; how long the block took is kept beside it.
    """
    figures: dict[str, Any] = {}
    began, passed = time.monotonic(), 0
    try:
        yield figures
        passed = trials
    finally:
        figures["worst_trial_seconds"] = round(time.monotonic() - began, 2)
        counts = {"trials": figures.pop("trials", trials), "passed": figures.pop("passed", passed)}
        record_figure(row, part, case=case, **counts, **figures)
