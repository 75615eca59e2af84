"""The candidates of a ranking as a tree: those that begin alike are read together, whatever family reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bpt_dist.objective import IGNORED

MOST_LOGITS = 1 << 26  # numbers, 256 MB: what ranking holds at once of an output as large as the vocabulary


class Tree(NamedTuple):
    """The beginnings of all candidates: what the decoder has read at a node is the way to it from the root, the start token.

    `paths` holds for each candidate the (node, next token) pairs whose log-probabilities make up its own.
    """

    tokens: list[int]
    parents: list[int]
    depths: list[int]
    paths: list[list[tuple[int, int]]]

    @classmethod
    def of(cls, candidates: list[list[int]], start: int) -> Tree:
        """Return the tree of candidates, each padded by -100."""
        tree = cls([start], [0], [0], [])
        nodes: dict[tuple[int, ...], int] = {(): 0}
        for candidate in candidates:
            ids = [token for token in candidate if token != IGNORED]
            path = []
            for place, token in enumerate(ids):
                before = tuple(ids[:place])
                if before not in nodes:
                    nodes[before] = len(tree.tokens)
                    tree.tokens.append(before[-1])
                    tree.parents.append(nodes[before[:-1]])
                    tree.depths.append(place)
                path.append((nodes[before], token))
            tree.paths.append(path)
        return tree

    def visible(self) -> Bool[Tensor, "n n"]:
        """Return which nodes [query, key] are on the way from the root to each node."""
        seen = torch.eye(len(self.tokens), dtype=torch.bool)
        for node in range(1, len(self.tokens)):
            seen[node] |= seen[self.parents[node]]
        return seen


def along_each(
    trees: Sequence[Tree],
    states: Float[Tensor, "nodes D"],
    logits_of: Callable[[slice], Float[Tensor, "some V"]],
    vocabulary_size: int,
) -> list[Float[Tensor, " _C"]]:
    """Return the log-likelihood of each candidate of each tree from the states of all their nodes, one tree after the other.

    `logits_of` returns the logits of a part of the nodes.
    """
    nodes: list[int] = []
    tokens: list[int] = []
    owners: list[int] = []
    counts = [len(tree.paths) for tree in trees]
    first = 0
    for tree in trees:
        for path in tree.paths:
            nodes += [first + node for node, _ in path]
            tokens += [token for _, token in path]
            owners += [(owners[-1] if owners else -1) + 1] * len(path)
        first += len(tree.tokens)
    at, next_token = (torch.tensor(values, device=states.device) for values in (nodes, tokens))
    picked = states.new_zeros(len(nodes), dtype=torch.float32)
    nodes_at_once = max(1, MOST_LOGITS // vocabulary_size)
    for begin in range(0, len(states), nodes_at_once):
        logits = logits_of(slice(begin, begin + nodes_at_once))
        here = ((at >= begin) & (at < begin + nodes_at_once)).nonzero().flatten()
        picked[here] = logits[at[here] - begin, next_token[here]] - logits.logsumexp(-1)[at[here] - begin]
    sums = picked.new_zeros(sum(counts)).index_add(0, torch.tensor(owners, device=states.device), picked)
    return list(sums.split(counts))
