"""Print in which order the rows of repeated quick starts end: `python docs/quickstart_order.py RUNS REPETITION …`.

RUNS is the folder of the quick start, each REPETITION that of one with other seeds; `A,B`: the rows that A has not are those of B.
A row's score is the mean over its seeds of the three tasks near a source. The order is that of the scores; rows in one group may
change places with each other.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from bpt_dist import config as configuration
from bpt_dist.artifacts.results import Result, collect
from bpt_dist.commands.table.table import Table
from bpt_dist.errors import UserError

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
NEAR = ("mini_review", "mini_rte", "mini_duplicate")
GROUPS = (("untrained",), ("prompt_tuning",), ("vanilla_transfer", "bpt", "bpt/ensemble"))  # from below


def results(word: str) -> list[Result]:
    """Return the results of a folder, and those of the folders behind its commas for the rows that it has not."""
    found: list[Result] = []
    for folder in word.split(","):
        known = {row_of(result) for result in found}
        found += [result for result in collect([Path(folder)]).results if row_of(result) not in known]
    return found


def row_of(result: Result) -> str:
    """Return the label of a result's row."""
    return result.run.rsplit("-s", 1)[0]


def scores(of_runs: Sequence[Result]) -> dict[str, float]:
    """Return the score of each row, in percent of right answers."""
    found: dict[str, list[float]] = defaultdict(list)
    for result in of_runs:
        if result.headline and result.split == "test" and result.task in NEAR:
            found[row_of(result) if result.predict == "map" else f"{row_of(result)}/{result.predict}"].append(result.value)
    if missing := [row for group in GROUPS for row in group if not found[row]]:
        sys.exit(f"no run of {', '.join(missing)} is finished; give the whole quick start, or add theirs behind a comma")
    return {row: fmean(found[row]) for group in GROUPS for row in group}


def strict_order(of_row: Mapping[str, float]) -> list[str]:
    """Return the rows from the lowest score."""
    return sorted(of_row, key=lambda row: of_row[row])


def keeps_groups(of_row: Mapping[str, float]) -> bool:
    """Whether every row is above every row of the group below its own."""
    return all(of_row[low] < of_row[high] for below, above in pairwise(GROUPS) for low in below for high in above)


def answers(of_runs: Sequence[Result], compared: Sequence[str]) -> list[str]:
    """Return what the last lines of a quick start say of each comparison: the points, and `seen` or `open`."""
    table = Table.build(list(of_runs), split="test", compared=compared)
    shown = []
    for one in table.comparisons:
        points = "–" if one.difference is None else f"{one.difference.mean:+.1f}"
        shown.append(f"{points} {'seen' if one.is_seen else 'open'}")
    return shown


def main(first: str, others: Sequence[str]) -> None:
    """Print a row for each quick start, and how many repetitions have the order of the first."""
    compared = configuration.load(CONFIG).comparisons
    rows = [row for group in GROUPS for row in group]
    heads = [f"`{text.partition('@')[0]}`" for text in compared]
    sys.stdout.write(f"| quick start | {' | '.join(f'`{row}`' for row in rows)} | groups | {' | '.join(heads)} |\n")
    sys.stdout.write(f"|---|{'--:|' * len(rows)}---|{'---|' * len(heads)}\n")
    found = {}
    for word in (first, *others):
        of_row = found[word] = scores(of_runs := results(word))
        cells = [f"{of_row[row]:.1f}" for row in rows] + ["kept" if keeps_groups(of_row) else "not kept"]
        name = Path(word.partition(",")[0]).name
        sys.stdout.write(f"| `{name}` | {' | '.join([*cells, *answers(of_runs, compared)])} |\n")
    strict = sum(strict_order(found[word]) == strict_order(found[first]) for word in others)
    kept = sum(keeps_groups(found[word]) for word in others)
    sys.stdout.write(f"\nThe order of the groups is kept in {kept} of {len(others)}, that of all rows in {strict}.\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("runs", metavar="RUNS", help="the folder of the quick start")
    parser.add_argument("repetitions", metavar="REPETITION", nargs="+", help="those of others, or A,B")
    given = parser.parse_args()
    try:
        main(given.runs, given.repetitions)
    except UserError as error:
        sys.exit(str(error))
