"""What a reader of a table must know beside its numbers: which runs are missing, which were trained on something else."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from bpt_dist.config import Config
from bpt_dist.errors import Stopped
from bpt_dist.files import read_json
from bpt_dist.table_jobs import Jobs, is_finished


def missing_runs(runs: Sequence[Config], jobs: Jobs) -> list[dict[str, Any]]:
    """Return the runs that are not finished, with their target tasks and, where one failed, the reason."""
    found = []
    for run in runs:
        if not is_finished(run):
            outcome = jobs.outcomes.get(run.name)
            failed = outcome is not None and outcome.code not in (0, Stopped.exit_code)
            reason = outcome.reason if outcome is not None and failed else None
            found.append({"run": run.name, "tasks": list(run.data.target_tasks), "reason": reason})
    return found


def missing_notes(missing: Sequence[dict[str, Any]]) -> list[str]:
    """Return a sentence for every failed run and one for all that were not trained yet."""
    notes = [f"Missing: {each['run']} ({', '.join(each['tasks'])}): {each['reason']}" for each in missing if each["reason"]]
    waiting = [each["run"] for each in missing if not each["reason"]]
    return notes + ([f"Missing, not trained yet: {', '.join(waiting)}"] if waiting else [])


def mixture_notes(finished: Sequence[Config]) -> list[str]:
    """Return a sentence for runs that found another T5, tokenizer or other rows under the names that the other runs used.

    A configuration holds names only: what they stood for is in each run's backbone.json and data.json.
    """
    holders: dict[tuple[str, ...], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for run in finished:
        for name, value in _contents(run):
            holders[name][value].append(run.name)
    others: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, by_value in holders.items():
        if len(by_value) > 1:
            usual = Counter({value: len(names) for value, names in by_value.items()}).most_common(1)[0][0]
            odd = sorted(run for value, names in by_value.items() if value != usual for run in names)
            others[tuple(odd)].append(name[-1])
    return [
        f"Not comparable: {', '.join(runs)} had another content of {', '.join(what)} than the other runs; move their folders "
        "away and give the command again to train them anew."
        for runs, what in others.items()
    ]


def _contents(run: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield what this run was trained on: under which names, and its hash."""
    asked = (run.backbone.model_dump_json(),)
    # Few-shot rows are drawn by the seed; which other tasks a row uses does not matter.
    data = run.data.model_dump_json(exclude={"source_tasks", "target_tasks"})
    asked_of_data = (*asked, data, str(run.seed) if run.data.shots else "")
    for file, names in ((run.directory / "backbone.json", asked), (run.directory / "data.json", asked_of_data)):
        if file.is_file():
            yield from (((*names, name.removesuffix("_hash")), value) for name, value in read_json(file).items())
