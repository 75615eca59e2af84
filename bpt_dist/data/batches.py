"""Tokens and batches: a batch is a pure function of (seed, step), whatever the number of processes.

Every task has one permutation of its rows per epoch, keyed by (seed, task, epoch). The permutations of all epochs, one after
the other, are the task's sequence. At step t a task gives the B rows at positions t·B … t·B + B − 1 of its sequence, so every
row comes exactly once an epoch and a run resumes from its step number alone. Tasks that task sampling leaves out at a step
skip their B rows. A mixture (sampling.py) draws the task of every text: a step then has K·B texts as well, and each task
continues in its sequence where the earlier steps ended. A stage after preludes starts at position S·B of each task, after the
rows that their S steps have read.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bpt_dist.data.sampling import Mixture, Sampling, philox_words
from bpt_dist.data.tokens import PAD_ID, TokenisedTask
from bpt_dist.errors import ConfigError

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """N sequences of one step, task-major; `weight` makes Σ weight · log-likelihood the objective of the step.

    `source_ids` is padded by 0, `target_ids` by -100; `row_ids` read `task/split:line`.
    """

    step: int
    source_ids: Int[Tensor, "N T"]
    source_mask: Int[Tensor, "N T"]
    target_ids: Int[Tensor, "N U"]
    task_index: Int[Tensor, " N"]
    row_ids: tuple[str, ...]
    weight: Float[Tensor, " N"]

    def __len__(self) -> int:
        return len(self.row_ids)

    def select(self, indices: Sequence[int] | Int[Tensor, " n"]) -> Batch:
        """Return the rows of one share of the batch, cut to its own longest source and target."""
        index = torch.as_tensor(indices, dtype=torch.long)
        num_source = int(self.source_mask[index].sum(1).max()) if len(index) else 0
        num_target = int((self.target_ids[index] != IGNORED).sum(1).max()) if len(index) else 0
        return Batch(
            step=self.step,
            source_ids=self.source_ids[index, :num_source],
            source_mask=self.source_mask[index, :num_source],
            target_ids=self.target_ids[index, :num_target],
            task_index=self.task_index[index],
            row_ids=tuple(self.row_ids[i] for i in index.tolist()),
            weight=self.weight[index],
        )

    def num_target_tokens(self) -> int:
        """Return the target tokens of all rows, without padding."""
        return int((self.target_ids != IGNORED).sum())

    def costs(self) -> Int[Tensor, " N"]:
        """Return source plus target tokens of every row, by which rows are dealt to ranks."""
        return self.source_mask.sum(1) + (self.target_ids != IGNORED).sum(1)


class Batches:
    """The batches of a stage; it has no position, so steps may be read in any order.

    `task_weight[k]` is w_k of the score; with κ tasks a step, each row weighs w_k · (K/κ) / B, and in a mixture, where
    p_k weighs the tasks, w_k / B: for w_k = 1/K the objective is the mean over the texts of the step. `num_particles`
    is only needed for particles with their own texts.
    """

    def __init__(
        self,
        datasets: Sequence[TokenisedTask],
        batch_size: int,
        seed: int,
        *,
        tasks_per_step: int | None = None,
        task_weight: Sequence[float] | None = None,
        num_particles: int = 1,
        sampling: Sampling = Sampling(),  # noqa: B008 - a tuple, nothing can change it
    ) -> None:
        kappa = len(datasets) if tasks_per_step is None else tasks_per_step
        if batch_size < 1 or not 1 <= kappa <= len(datasets):
            raise ConfigError(f"batch_size is {batch_size}, tasks_per_step {kappa}; there are {len(datasets)} tasks")
        if len({task.name for task in datasets}) < len(datasets):
            raise ConfigError("the list of tasks names a task twice; name each task once")
        if task_weight is not None and len(task_weight) != len(datasets):
            raise ConfigError(f"{len(task_weight)} task weights for {len(datasets)} tasks")
        self.datasets = tuple(datasets)
        self.batch_size = batch_size
        self.seed = seed
        self.tasks_per_step = kappa
        self.task_weight = tuple(task_weight) if task_weight is not None else (1.0,) * len(datasets)
        self.num_particles = num_particles
        self.first_row = 0  # in the sequence of each task
        self.mixture: Mixture | None = None
        if sampling.kind != "all":
            if kappa != len(datasets):
                raise ConfigError(f"sampling {sampling.kind} draws tasks from all {len(datasets)}, tasks_per_step is {kappa}")
            self.mixture = Mixture(sampling, [len(task) for task in datasets], kappa * batch_size, seed)
        self._permutations: dict[str, tuple[int, np.ndarray]] = {}  # the newest epoch of each task, recomputable

    def of_all_tasks(self) -> Batches:
        """Return the batches of a prelude: B texts of every task at every step, however this stage draws its tasks.

        Teachers and task embeddings are prompt tunings of one task each; steps of other tasks must not move them.
        """
        batches = copy(self)
        batches.tasks_per_step, batches.mixture = len(self.datasets), None
        return batches

    def after(self, num_steps: int) -> Batches:
        """Return these batches for a stage after `num_steps` steps of `of_all_tasks`: each task's sequence continues."""
        batches = copy(self)
        batches.first_row += num_steps * self.batch_size
        return batches

    def at(self, step: int, particle: int | None = None) -> Batch:
        """Return the batch of a step; with `particle`, the texts of that particle alone, which no other particle reads.

        The M particles then share each permutation, M·B rows a step, so an epoch is M times shorter.
        """
        if particle is not None and not 0 <= particle < self.num_particles:
            raise ValueError(f"particle {particle} of {self.num_particles}")
        block = step if particle is None else step * self.num_particles + particle
        scale = len(self.datasets) / self.tasks_per_step / self.batch_size
        picks, weight = [], []
        for k, positions in self._positions(step, block):
            picks += [(k, self._row(k, position)) for position in positions]
            weight += [self.task_weight[k] * scale] * len(positions)
        return collate(self.datasets, picks, weight, step)

    def _positions(self, step: int, block: int) -> list[tuple[int, range]]:
        """Return the positions in the sequence of each task that gives texts, in ascending order of the tasks."""
        if self.mixture is None:
            first = self.first_row + block * self.batch_size
            return [(k, range(first, first + self.batch_size)) for k in self.tasks_at(step)]
        num_earlier, num_texts = (texts.tolist() for texts in self.mixture.at(block))
        firsts = [self.first_row + texts for texts in num_earlier]
        return [(k, range(firsts[k], firsts[k] + num_texts[k])) for k in range(len(num_texts)) if num_texts[k]]

    def tasks_at(self, step: int) -> tuple[int, ...]:
        """Return the κ tasks of a step in ascending order, drawn uniformly without replacement."""
        if self.tasks_per_step == len(self.datasets):
            return tuple(range(len(self.datasets)))
        drawn = _permutation(len(self.datasets), self.seed, "task sampling", step)[: self.tasks_per_step]
        return tuple(sorted(drawn.tolist()))

    def _row(self, k: int, position: int) -> int:
        task = self.datasets[k]
        epoch, place = divmod(position, len(task))
        if self._permutations.get(task.name, (None,))[0] != epoch:
            self._permutations[task.name] = (epoch, _permutation(len(task), self.seed, task.name, epoch))
        return int(self._permutations[task.name][1][place])


def collate(tasks: Sequence[TokenisedTask], picks: Sequence[tuple[int, int]], weight: Sequence[float], step: int) -> Batch:
    """Return the batch of picked (task, row) pairs, padded to its longest source and target."""
    source_ids, source_mask = _padded([tasks[k].source_ids[row] for k, row in picks], PAD_ID)
    target_ids, _ = _padded([tasks[k].target_ids[row] for k, row in picks], IGNORED)
    return Batch(
        step=step,
        source_ids=source_ids,
        source_mask=source_mask,
        target_ids=target_ids,
        task_index=torch.tensor([k for k, _ in picks], dtype=torch.long),
        row_ids=tuple(f"{tasks[k].name}/{tasks[k].row_ids[row]}" for k, row in picks),
        weight=torch.tensor(weight, dtype=torch.float64).to(torch.float32),
    )


def _padded(sequences: Sequence[np.ndarray], filler: int) -> tuple[Int[Tensor, "N T"], Int[Tensor, "N T"]]:
    longest = max(len(sequence) for sequence in sequences)
    ids = np.full((len(sequences), longest), filler, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def _permutation(num_rows: int, seed: int, name: str, index: int) -> np.ndarray:
    """Return the permutation that (seed, name, index) names: the order of so many random words."""
    return np.argsort(philox_words(num_rows, seed, name, index), kind="stable")
