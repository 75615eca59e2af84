"""What steps of training ask of a GPU: kernel launches and moments in which the host waits, counted on the make-believe GPU.

    OMP_NUM_THREADS=1 PYTHONPATH=.:tests/support python tests/support/counted_steps.py           # the table of docs/performance.md
    OMP_NUM_THREADS=1 PYTHONPATH=.:tests/support python tests/support/counted_steps.py --lines   # and the lines that cost most

A step is that of a run: from the batch to the update. It writes no record, no checkpoint and is not validated.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import tiny_run
from make_believe_gpu import GPU, MakeBelieveGpu, Notes

from bpt_dist import train
from bpt_dist.commands.bench.workload import SOURCE_TASKS, TARGET_TASKS, work_of
from bpt_dist.config.method_source import METHODS, method_names, method_options
from bpt_dist.data.batches import Batch, Batches
from bpt_dist.distributed.mesh import World
from bpt_dist.training.accumulation import Losses
from bpt_dist.training.stage import TrainingStage

Steps = dict[str, list[Notes]]  # of each stage: what every step but the last asked for
BASE_DEPTH, PARTICLES, PROMPT, WIDTH = 12, 5, 100, 32


@contextmanager
def noted_steps(gpu: MakeBelieveGpu, stop_at: tuple[str, int] | None = None) -> Iterator[Steps]:
    """Note the steps of every stage trained inside; `stop_at` (stage, step) asks for a stop in that step."""
    found: Steps = {}
    accumulate = train.accumulate_gradients

    def accumulate_gradients(stage: TrainingStage) -> Losses:
        steps = found.setdefault(stage.name, [])
        if steps:
            steps[-1] = _difference(gpu.notes, steps[-1])
        steps.append(_difference(gpu.notes, Notes()))
        if stop_at == (stage.name, stage.step):
            stage.watchdog.reason = "the test asks for a stop"
        return accumulate(stage)

    with mock.patch.object(train, "accumulate_gradients", accumulate_gradients):
        yield found
    for steps in found.values():
        del steps[-1:]  # it is followed by what ends a stage


def _difference(later: Notes, earlier: Notes) -> Notes:
    counters = {name: later.__dict__[name] - value for name, value in earlier.__dict__.items() if name != "launches"}
    return Notes(later.launches - earlier.launches, **counters)


class StatedTexts(Batches):
    """Texts of stated numbers of source and target tokens instead of the rows of a task."""

    lengths: Sequence[tuple[int, int]] = ()

    def at(self, step: int, particle: int | None = None) -> Batch:
        """Return them; those of one task are beside each other."""
        batch = work_of(128, WIDTH, 1, self.lengths, num_prompt=1, seed=step).texts
        per_task = len(self.lengths) // len(self.datasets)
        return Batch(**{**vars(batch), "step": step, "task_index": batch.task_index // per_task})


def step_of(folder: Path, method: Mapping[str, Any], stage: str, lengths: Sequence[tuple[int, int]], **world: Any) -> Notes:
    """Return what a step of `stage` asks for at the depth of T5-base and these lengths of texts; all layers are narrow."""
    gpu, name = MakeBelieveGpu(), str(method["name"])
    options = {"length": PROMPT} if "length" in method_options(name).model_fields else {}
    quiet = {"log_every": 100, "checkpoint_every": 100}
    plain = tiny_run.settings(
        tiny_run.world(folder, width=WIDTH, layers=BASE_DEPTH, **world), {**options, **method},
        source={**quiet, "steps": 3}, target={**quiet, "steps": 3, "eval_every": 100},
    )  # fmt: skip
    if not method_options(name).HAS_SOURCE_STAGE:
        del plain["source"]
    config = tiny_run.load(folder, plain)
    at_stage = mock.patch.object(StatedTexts, "lengths", lengths)
    texts = mock.patch.object(train, "Batches", StatedTexts)
    with gpu, noted_steps(gpu) as steps, at_stage, texts, tiny_run.session(config, World(device=GPU)) as run:
        train.train(run)
    assert not gpu.notes.mismatches, gpu.notes.mismatches
    return steps[stage][-1]


def source_lengths(texts: int) -> list[tuple[int, int]]:
    """Return the lengths of so many texts of each of the six tasks of the benchmark, none like another, task by task."""
    return [(source + 3 * number, target) for source, target in SOURCE_TASKS.values() for number in range(texts)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--lines", action="store_true")
    parser.add_argument("--method", action="append")
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    bpt = {"name": "bpt", "num_particles": PARTICLES}
    target = [TARGET_TASKS["mrpc"][number % 8] for number in range(32)]
    cases = [("bpt, source, M = 5, K = 6, B = 1", bpt, "source", source_lengths(1))]
    cases += [("bpt, source, M = 5, K = 6, B = 4", bpt, "source", source_lengths(4))]
    cases += [(f"{name}, target, 32 texts", {"name": name}, "target/mood", target) for name in method_names(METHODS)]
    print("| step | launches | waits | copies from pinned memory |\n|---|--:|--:|--:|")
    for title, method, stage, lengths in cases:
        if given.method and method["name"] not in given.method:
            continue
        with tempfile.TemporaryDirectory() as folder:
            noted = step_of(Path(folder), method, stage, lengths)
        counts = (noted.launches, sum(noted.waits.values()), sum(noted.copies.values()))
        print(f"| {title} | {' | '.join(f'{count:,}' for count in counts)} |", flush=True)
        if given.lines:
            for counter in (noted.waits, noted.lines, noted.operators):
                print(*(f"    {count:5}  {line}" for line, count in counter.most_common(25)), sep="\n", flush=True)


if __name__ == "__main__":
    main()
