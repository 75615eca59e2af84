"""Keys and values of prompts that were read before, so that a pass reads the texts only.

In a causal sequence the states of a prompt depend on nothing behind it. So they are the same in every pass for as long as
the prompt and the model are.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

Prompt = Float[Tensor, "m P D"]
Prefix = list[tuple[Tensor, Tensor]]  # keys and values [m, P, G, d] by layer


class Known(NamedTuple):
    """A prompt whose prefix is kept: the tensor, how often it had been written to, the prefix and its bytes."""

    prompt: weakref.ref[Tensor]
    version: int
    prefix: Prefix
    size: int


class Prefixes:
    """The prefixes of prompts, at most `most_bytes` of them; the one that was not used for the longest time goes first.

    A prompt is known as long as its tensor lives and is not written to. Callers run one pass at a time; tensors may die in any
    thread. `found` and `missed` count prompts of passes.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes, self.found, self.missed = most_bytes, 0, 0
        self.bytes = 0  # of all prefixes
        self._known: OrderedDict[int, Known] = OrderedDict()
        self._lock = threading.RLock()  # the death of a tensor may come while this very thread holds it

    def of(
        self, prompts: Sequence[Prompt], size_of: Callable[[Prompt], int], read: Callable[[list[Prompt]], list[Prefix]]
    ) -> list[Prefix] | None:
        """Return the prefixes of different prompts; `read` computes those that are missing, `size_of` is the memory of one.

        Return None, and read nothing, where all of them together are more than may be kept.
        """
        if sum(map(size_of, prompts)) > self.most_bytes:
            self.missed += len(prompts)
            return None
        known = [self._get(prompt) for prompt in prompts]
        missing = [prompt for prompt, prefix in zip(prompts, known, strict=True) if prefix is None]
        self.found += len(prompts) - len(missing)
        self.missed += len(missing)
        new = read(missing) if missing else []
        for prompt, prefix in zip(missing, new, strict=True):
            self._put(prompt, prefix)
        read_now = iter(new)
        return [next(read_now) if prefix is None else prefix for prefix in known]

    def _get(self, prompt: Prompt) -> Prefix | None:
        with self._lock:
            known = self._known.get(id(prompt))
            if known is None or known.prompt() is not prompt or known.version != prompt._version:
                return None
            self._known.move_to_end(id(prompt))
            return known.prefix

    def _put(self, prompt: Prompt, prefix: Prefix) -> None:
        """Keep a prefix as the one used last, and forget the oldest until the rest fits."""
        key = id(prompt)
        known = Known(weakref.ref(prompt, lambda dead: self._forget(key, dead)), prompt._version, prefix, _bytes_of(prefix))
        with self._lock:
            before = self._known.pop(key, None)
            self._known[key] = known
            self.bytes += known.size - (before.size if before else 0)
            while self.bytes > self.most_bytes:
                self.bytes -= self._known.popitem(last=False)[1].size

    def _forget(self, key: int, dead: weakref.ref[Tensor]) -> None:
        with self._lock:
            if key in self._known and self._known[key].prompt is dead:
                self.bytes -= self._known.pop(key).size


def _bytes_of(prefix: Prefix) -> int:
    return sum(states.nbytes for pair in prefix for states in pair)
