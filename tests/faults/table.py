"""Write docs/faults.md, the fault table with measured figures: `make fault-table`.

The tests write their figures to build/faults; docs/faults.json keeps them. Running some of the tests updates only their rows.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fault_figures import FOLDER

DOCS = Path(__file__).parents[2] / "docs"
KEPT, PAGE = DOCS / "faults.json", DOCS / "faults.md"
# Row -> fault, what has to happen, bar.
# ruff: noqa: E501 - a table reads line by line
ROWS: dict[str, tuple[str, str, str]] = {
    "F1": ("a rank is killed", "the others exit with 69; the same command ends with the bits of an undisturbed run", "all; gone <= 3 s, with the launcher <= 35 s"),
    "F2": ("kill or power loss while a checkpoint is written", "the previous checkpoint stays; nothing incomplete is ever loaded", "100 % of >= 250"),
    "F3": ("disk full", "74; nothing valid is deleted; resumes once there is space", "12 of 12"),
    "F4": ("checkpoint cut, flipped, swapped", "detected before use; the checkpoint before it is used; none valid: 74", "100 %; 0 wrong loads"),
    "F5": ("NaN or infinity", "agreed before the kernel; no particle moves; rows named; 77, or the step is skipped", "18 of 18"),
    "F6": ("host unreachable", "missing ranks named; 69; resumes on the others", "<= time-out + 2 s, 20 of 20"),
    "F7": ("a host of the hostfile does not answer", "refused, named; nothing left elsewhere", "5 of 5, <= 30 s"),
    "F8": ("hostfile missing, or fewer slots", "refused with 2 before the backbone is loaded", "<= 20 s"),
    "F9": ("slow rank", "warning with rank and factor; same result; no false warning", "<= 25 steps; 0 in 500"),
    "F10": ("hung rank", "stacks written; all ranks exit with 69", "10 of 10, <= time-out + 2 s"),
    "F11": ("tracking server down, silent, broken", "no step is slower; history complete later, nothing twice", "p99 <= 1 ms; end <= 5 s"),
    "F12": ("a trial of a sweep crashes", "resumes from its own run directory; no orphan", "4 of 4"),
    "F13": ("SIGTERM and its relatives", "all ranks stop after the same step; checkpoint; 75", "20 of 20; 0 steps lost; <= 25 s"),
    "F14": ("bad configuration", "all problems at once with file:line and the nearest key; 2", "60 of 60; <= 2 s; no torch"),
    "F15": ("bad row", "file:line: field; 65; nothing trained", "40 of 40"),
    "F16": ("another backbone or tokenizer", "refused before the first forward pass", "6 of 6"),
    "F17": ("another number of ranks", "the same bits with `exact: true`; without, as close as rounding in so few steps ([whole runs](distributed.md#whole-runs))", "10 of 10; <= 1e-5"),
    "F18": ("two runs in one directory", "exactly one wins; the lock of a dead process is taken over", "100 of 100; <= 70 s"),
    "F19": ("resumed with another configuration, data or code", "refused with what changed; other code is recorded and reported", "every field classified"),
    "F20": ("clocks jump", "the newest checkpoint is the highest step", "10 of 10"),
    "F21": ("port in use, stale rendezvous", "named; never joins another job", "10 of 10"),
    "F22": ("out of memory on one rank", "rank, step and shape of the batch named; 70; no hang", "5 of 5, <= 10 s"),
    "F23": ("degenerate particles", "finite direction, or refused", "0 of 1,000 not finite"),
    "F24": ("export interrupted or read meanwhile", "old or new, never half", "100 %"),
    "F25": ("repetition", "same configuration, same bits, whatever the order of a listing or the process", "5 of 5"),
    "campaign": ("1 to 3 random faults a trial, up to 5 restarts", "as if nothing had happened", "0 of >= 500 wrong"),
}  # fmt: skip
HEAD = """# Faults

Faults that were caused on purpose, what has to happen, and what was measured. `make fault-table` writes this page from the figures of
`make test-faults`, `make test-hosts`, `make campaign`, `make sweep-campaign` and tests/end_to_end/test_sweep.py; `FAULTS=full make test-faults` runs every trial of every row. Times are the worst seen, in seconds, on two shared CPU cores, with gloo and the tiny T5 of the tests:
they are bounds, not benchmarks. "Passed" also means: no process survived, `status.json` was right, `metrics.jsonl` held each step once
and in order, and the newest checkpoint verified.

| row | fault | what has to happen | bar | measured |
|---|---|---|---|---|
"""


def read_figures() -> dict[str, dict[str, Any]]:
    """Return the newest figures of every case: those kept in the repository and those that tests have left since."""
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else []
    lines = [json.loads(line) for file in sorted(FOLDER.glob("*.jsonl")) for line in file.read_text().splitlines()]
    newest: dict[str, dict[str, Any]] = {}
    for line in sorted([*kept, *lines], key=lambda line: line["at"]):
        newest[f"{line['row']}|{line['part']}|{line['case']}"] = line
    return newest


def combined(cases: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of a part: counts added up, of `worst_*` the largest, words joined."""
    total: dict[str, Any] = {}
    for case in cases:
        for name, value in case.items():
            if name in ("row", "part", "case", "at"):
                continue
            if isinstance(value, str):
                total[name] = ", ".join(sorted({*filter(None, str(total.get(name, "")).split(", ")), value}))
            elif name.startswith("worst_"):
                total[name] = max(total.get(name, value), value)
            else:
                total[name] = total.get(name, 0) + value
    return total


def text_of(part: str, total: dict[str, Any]) -> str:
    """Return one line of the last column."""
    rest = {name: value for name, value in total.items() if name not in ("trials", "passed", "worst_trial_seconds")}
    figures = [f"{total['passed']:,} of {total['trials']:,}"]
    if "worst_seconds" in rest:
        figures.append(f"worst {rest.pop('worst_seconds'):g} s")
    figures += [f"{name.removeprefix('worst_').replace('_', ' ')} {value:,.4g}" if not isinstance(value, str) else
                f"{name.replace('_', ' ')} {value}" for name, value in sorted(rest.items())]  # fmt: skip
    return f"{part}: {'; '.join(figures)}"


def main() -> int:
    """Write both files."""
    newest = read_figures()
    parts: dict[str, dict[str, list[dict[str, Any]]]] = {row: {} for row in ROWS}
    for line in newest.values():
        parts[line["row"]].setdefault(line["part"], []).append(line)
    rows = []
    for row, (fault, promise, bar) in ROWS.items():
        measured = [text_of(part, combined(cases)) for part, cases in sorted(parts[row].items())]
        rows.append(f"| {row} | {fault} | {promise} | {bar} | {'<br>'.join(measured) or 'not measured'} |")
    DOCS.mkdir(exist_ok=True)
    PAGE.write_text(HEAD + "\n".join(rows) + "\n")
    KEPT.write_text("[\n" + ",\n".join(json.dumps(newest[key], sort_keys=True) for key in sorted(newest)) + "\n]\n")
    sys.stdout.write(f"{PAGE}: {len(newest)} figures\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
