"""Which tasks the texts of a step are from, where a stage does not take all of its tasks at every step.

A mixture tells how many texts of each task a step has, and how many the earlier steps had: the task's rows continue after
those. Both are pure functions of (seed, step): draws come from raw Philox words, a fixed number a step, and everything that
is cached can be computed again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from bpt_dist.config import StageConfig

BLOCK = 1024  # steps whose draws are made at once
FRACTION_BITS = 53


class Sampling(NamedTuple):
    """How a stage draws tasks: `all` of them (or κ), or a mixture in which task k has probability p_k.

    `proportional`: the task of each text on its own, p_k ~ min(n_k, cap). `temperature`: one task a step, p_k ~ n_k^(1/T).
    `stochastic`: c of K tasks a step, c uniform in {2 ... K}, each drawn with replacement like `proportional`; they share
    the texts equally, and one of them takes the remainder (MPT).
    """

    kind: Literal["all", "proportional", "temperature", "stochastic"] = "all"
    cap: int = 2**18
    temperature: float = 10.0

    @classmethod
    def of(cls, stage: StageConfig) -> Sampling:
        """Return the sampling that the settings of a stage describe."""
        return cls(stage.sampling, stage.sampling_cap, stage.sampling_temperature)

    def shares(self, sizes: Sequence[int]) -> tuple[float, ...]:
        """Return the share of each task in the texts of a step, in expectation: p_k, and 1/K where every task comes every time."""
        if self.kind == "all":
            return (1 / len(sizes),) * len(sizes)
        return tuple(self.probabilities(sizes).tolist())

    def probabilities(self, sizes: Sequence[int]) -> np.ndarray:
        """Return p_k of a mixture of tasks of n_k = `sizes` rows."""
        rows = np.asarray(sizes, dtype=np.float64)
        weights = rows ** (1 / self.temperature) if self.kind == "temperature" else np.minimum(rows, self.cap)
        return weights / weights.sum()


class Mixture:
    """The number of texts of every task in every step of a stage: `num_texts` in all, drawn by the rule of `sampling`."""

    def __init__(self, sampling: Sampling, sizes: Sequence[int], num_texts: int, seed: int) -> None:
        self.kind, self.num_texts, self.seed = sampling.kind, num_texts, seed
        self.num_tasks = len(sizes)
        self._edges = np.cumsum(sampling.probabilities(sizes))[:-1]
        self._num_earlier = [np.zeros(self.num_tasks, dtype=np.int64)]  # texts of each task before each block
        self._newest: tuple[int, np.ndarray] = (-1, np.zeros(0))

    def at(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return how many texts of each task [K] all earlier steps have, and how many this step has [K]."""
        block, place = divmod(step, BLOCK)
        while len(self._num_earlier) <= block:
            self._num_earlier.append(self._num_earlier[-1] + self._counts(len(self._num_earlier) - 1).sum(axis=0))
        counts = self._counts(block)
        return self._num_earlier[block] + counts[:place].sum(axis=0), counts[place]

    def _counts(self, block: int) -> np.ndarray:
        """Return the texts of each task in each step of a block [BLOCK, K]."""
        if self._newest[0] != block:
            make = {"proportional": self._each_text, "temperature": self._one_task, "stochastic": self._some_tasks}[self.kind]
            self._newest = (block, make(block))
        return self._newest[1]

    def _each_text(self, block: int) -> np.ndarray:
        return self._tally(self._tasks(self._uniform(block, self.num_texts)))

    def _one_task(self, block: int) -> np.ndarray:
        return self._tally(self._tasks(self._uniform(block, 1))) * self.num_texts

    def _some_tasks(self, block: int) -> np.ndarray:
        uniform, most = self._uniform(block, self.num_tasks + 2), self.num_tasks
        least = min(2, most)
        num_drawn = least + (uniform[:, 0] * (most - least + 1)).astype(np.int64)
        tasks = self._tasks(uniform[:, 2:])
        is_drawn = np.arange(most) < num_drawn[:, None]
        share, remainder = np.divmod(self.num_texts, num_drawn)
        counts = self._tally(tasks, is_drawn) * share[:, None]
        steps = np.arange(BLOCK)
        counts[steps, tasks[steps, (uniform[:, 1] * num_drawn).astype(np.int64)]] += remainder
        return counts

    def _tasks(self, uniform: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._edges, uniform, side="right")

    def _tally(self, tasks: np.ndarray, counted: np.ndarray | None = None) -> np.ndarray:
        is_task = tasks[..., None] == np.arange(self.num_tasks)
        return (is_task if counted is None else is_task & counted[..., None]).sum(axis=1)

    def _uniform(self, block: int, num_draws: int) -> np.ndarray:
        """Return numbers in [0, 1) for each step of a block [BLOCK, num_draws]."""
        words = philox_words(BLOCK * num_draws, self.seed, f"task mixture {self.kind}", block)
        return (words >> np.uint64(64 - FRACTION_BITS)).reshape(BLOCK, num_draws) * 2.0**-FRACTION_BITS


def philox_words(num_words: int, seed: int, name: str, index: int) -> np.ndarray:
    """Return the first 64-bit words of the generator that (seed, name, index) names.

    Raw words, because NumPy keeps those of a bit generator the same in every version, but not what `Generator` makes of them.
    """
    key = hashlib.sha256(f"{seed}\x00{name}\x00{index}".encode()).digest()[:16]
    return np.random.Philox(key=np.frombuffer(key, dtype="<u8")).random_raw(num_words)
