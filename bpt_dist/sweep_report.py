"""What a sweep ends in: the table of settings, the pictures, and the best setting as a configuration to run."""

from __future__ import annotations

import statistics
from collections import Counter

import typer

from bpt_dist.cli_output import print_list
from bpt_dist.config import Config
from bpt_dist.files import write_atomic
from bpt_dist.sweep_record import FILE, Record, Standing
from bpt_dist.sweep_settings import runnable_yaml, show

BEST = "best.yaml"
LONGEST_REASON = 120


def finish_report(record: Record) -> Config | None:
    """Print the table, write pictures and best configuration, and return the latter (None before a setting finished)."""
    standings, folder = record.standings(), record.sweep.directory
    rows = table(record, standings)
    header = [key.rpartition(".")[2] for key in record.sweep.keys]
    numbers = tuple(range(len(header), len(header) + 4))
    typer.echo()
    print_list([*header, "seeds", "validation", "±", record_split(record), "trials"], rows, right=numbers)
    typer.echo(f"\nsweep      {folder / FILE}")
    from bpt_dist.sweep_figures import draw

    for file in draw(record.sweep.keys, standings, folder / "figures"):
        typer.echo(f"picture    {file}")
    config, best = record.best_config(), record.best()
    if config is None or best is None:
        return None
    command = f"python launcher/train.py --config {folder / BEST}"
    scores = ", ".join(f"{score:.2f}" for score in best.scores)
    text = (
        f"# The best of {record.sweep.num_settings} settings of sweep {record.sweep.settings.name} by the mean validation score: "
        f"{best.mean:.2f} (seeds: {scores}).\n"
        f"# {', '.join(f'{key}: {show(value)}' for key, value in best.values.items())}\n#   {command}\n"
    )
    write_atomic(folder / BEST, (text + runnable_yaml(config)).encode())
    typer.echo(f"best       {folder / BEST}: {' '.join(f'{key}={show(value)}' for key, value in best.values.items())}")
    typer.echo(f"train it   {command}")
    return config


def record_split(record: Record) -> str:
    """Return the name of the split whose score is shown beside the validation score."""
    return record.trials[0].config.evaluation.splits[-1] if record.trials else "test"


def table(record: Record, standings: list[Standing]) -> list[list[str]]:
    """Return a row for each setting, best first: values, finished seeds, mean, deviation, reported mean, how trials ended."""
    order = {mean.number: place for place, mean in enumerate(record.means())}
    by_number: dict[int, list[Standing]] = {}
    for one in standings:
        by_number.setdefault(one.number, []).append(one)
    rows = []
    for number in sorted(by_number, key=lambda number: (order.get(number, len(order)), number)):
        ones = by_number[number]
        finished = [one for one in ones if one.state == "finished" and one.score is not None]
        scores = [one.score for one in finished if one.score is not None]
        shown = [one.reported for one in finished if one.reported is not None]
        rows.append([
            *(show(value) for value in ones[0].values.values()),
            f"{len(scores)}/{len(ones)}",
            f"{statistics.fmean(scores):.2f}" if scores else "–",
            f"{statistics.stdev(scores):.2f}" if len(scores) > 1 else "–",
            f"{statistics.fmean(shown):.2f}" if shown else "–",
            how_ended(ones),
        ])  # fmt: skip
    return rows


def how_ended(ones: list[Standing]) -> str:
    """Return how the trials of a setting ended, as in `1 finished, 1 pruned at step 50`; of those that failed also why."""

    def how(one: Standing) -> str:
        if one.state == "failed" and not one.diverged:
            reason = " ".join((one.reason or "").split())
            return f"failed ({reason if len(reason) <= LONGEST_REASON else reason[:LONGEST_REASON] + '…'})"
        return f"pruned at step {one.step}" if one.state == "pruned" else "diverged" if one.diverged else one.state

    states = Counter(map(how, ones))
    return ", ".join(f"{count} {state}" for state, count in states.items())
