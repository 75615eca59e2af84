"""The order of the tokens in a pass that reads each prompt once: all prompts, then the texts, equal lengths side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bpt_dist.backbones.candidates import Tree
from bpt_dist.backbones.grid import Grid
from bpt_dist.backbones.transfer import send


class Group(NamedTuple):
    """Texts with the same number of positions of their own: the source and what is read behind it."""

    texts: tuple[int, ...]
    length: int


def _nowhere() -> Int[Tensor, " tokens"]:
    raise AssertionError("what is inserted depends on the text: read the texts in one layout")


ONLY_EACH_TOKEN = Grid(0, 0, _nowhere)  # of tokens whose rows nobody asks for


class Layout:
    """The tokens of a pass in one row: the S prompts of m particles, then m particles x N texts group by group.

    In a group come particle by particle, text by text. Behind its source each text has `num_behind` further tokens: those of its
    target but the last, or the nodes of `tree`, which are the same for all texts. Prompts that were read before (`reads_prompts` is
    False) take positions, and have no tokens here.
    """

    def __init__(
        self,
        prompts: tuple[int, int, int],  # particles m, prompts S of each, positions P of each
        choice: Sequence[int],
        num_source: Sequence[int],
        num_behind: Sequence[int],
        tree: Tree | None = None,
        *,
        reads_prompts: bool = True,
    ) -> None:
        self.num_particles, self.num_prompts, self.prompt_length = prompts
        self.choice, self.num_source, self.tree = choice, num_source, tree
        by_length: dict[int, list[int]] = {}
        for text, (source, behind) in enumerate(zip(num_source, num_behind, strict=True)):
            by_length.setdefault(source + behind, []).append(text)
        self.groups = [Group(tuple(texts), length) for length, texts in sorted(by_length.items())]
        self.num_prefix = self.num_particles * self.num_prompts * self.prompt_length if reads_prompts else 0
        self.first = self._first_tokens()

    def _first_tokens(self) -> Int[Tensor, "m N"]:
        """Return the place of the first own token of every particle and text."""
        first, begin = torch.zeros(self.num_particles, len(self.num_source), dtype=torch.long), self.num_prefix
        for texts, length in self.groups:
            rows = torch.arange(self.num_particles * len(texts)).view(self.num_particles, -1)
            first[:, list(texts)] = begin + rows * length
            begin += rows.numel() * length
        return first

    @property
    def num_rows(self) -> list[int]:
        """Return how many sequences (particles x texts) each group has."""
        return [self.num_particles * len(texts) for texts, _ in self.groups]

    def parts(self) -> Iterator[tuple[Group, slice]]:
        """Yield each group and where its tokens are."""
        begin = self.num_prefix
        for group, rows in zip(self.groups, self.num_rows, strict=True):
            yield group, slice(begin, begin + rows * group.length)
            begin += rows * group.length

    def order(self) -> Int[Tensor, " rows"]:
        """Return the place of each sequence of this layout among all, particle by particle and text by text."""
        particles = torch.arange(self.num_particles)[:, None] * len(self.num_source)
        return torch.cat([(particles + torch.tensor(texts)).flatten() for texts, _ in self.groups])

    def grid(self, device: torch.device) -> Grid:
        """Return where the tokens are in rows as long as the longest text; a prompt that is read once is in none of them."""
        longest = max(length for _, length in self.groups)

        def make() -> Int[Tensor, " tokens"]:
            assert not self.num_prefix, "what changes the texts in different ways has no states of a prompt in common"
            rows = self.order().split(self.num_rows)
            groups = zip(rows, self.groups, strict=True)
            places = [(of_group[:, None] * longest + torch.arange(group.length)).flatten() for of_group, group in groups]
            return send(torch.cat(places), device)

        return Grid(self.num_particles * len(self.num_source), longest, make)

    def pack(
        self, prompts: Float[Tensor, "m S P D"], texts: Float[Tensor, "m N L D"], behind: Float[Tensor, "N W D"]
    ) -> Float[Tensor, "tokens D"]:
        """Return the tokens of the pass: no padding of texts, and of what is behind them only what is read."""
        rows = torch.cat([texts, behind.expand(len(texts), -1, -1, -1)], dim=2)
        width, longest = rows.shape[2], texts.shape[2]
        places = []
        for group_texts, length in self.groups:
            starts = torch.tensor([self.num_source[text] for text in group_texts])[:, None]
            own = torch.arange(length)[None]
            columns = torch.where(own < starts, own, own - starts + longest)
            first = torch.arange(self.num_particles)[:, None, None] * len(self.num_source) + torch.tensor(group_texts)[:, None]
            places.append((first * width + columns).flatten())
        own_tokens = rows.flatten(0, 2).index_select(0, send(torch.cat(places), rows.device))
        return torch.cat([prompts.flatten(0, 2), own_tokens]) if self.num_prefix else own_tokens

    def own_positions(self, group: Group) -> Int[Tensor, " own"]:
        """Return the positions of a text's own tokens, counted from the end of its prompt: a node follows its parent."""
        if self.tree is None:
            return torch.arange(group.length)
        depths = torch.tensor(self.tree.depths[1:], dtype=torch.long)
        num_source = group.length - len(depths)
        return torch.cat([torch.arange(num_source), num_source - 1 + depths])

    def positions(self) -> Int[Tensor, " tokens"]:
        """Return the position of every token in its own sequence."""
        prefix = torch.arange(self.num_prefix) % max(1, self.prompt_length)
        groups = zip(self.groups, self.num_rows, strict=True)
        own = [(self.prompt_length + self.own_positions(group)).repeat(rows) for group, rows in groups]
        return torch.cat([prefix, *own])

    def visible(self, group: Group, window: int | None) -> Bool[Tensor, "own keys"]:
        """Return what each own token of a text sees of its prompt and its own tokens, at most `window` positions with itself."""
        own = self.own_positions(group)
        seen = torch.ones(group.length, group.length, dtype=torch.bool).tril()
        if self.tree is not None:
            num_source = group.length - len(self.tree.depths) + 1
            seen[num_source:, num_source:] = self.tree.visible()[1:, 1:]
        keys = torch.cat([torch.arange(self.prompt_length), self.prompt_length + own])
        seen = torch.cat([torch.ones(group.length, self.prompt_length, dtype=torch.bool), seen], dim=1)
        if window is not None:
            seen &= (self.prompt_length + own)[:, None] - keys < window
        return seen
