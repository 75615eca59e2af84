"""Our own pass through a decoder-only model: each prompt is read once for all its texts, nothing is padded; exact.

A prompt comes first in a causal sequence, so its states depend on no text. A pass is one call of transformers' own modules with all
prompts and texts in one row; only attention is ours (`attention.py`). Gradients to a prompt are those of all its texts, summed by
the backward pass. Logits are made for positions that have a target only. What a method has inserted acts on the packed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from bpt_dist.backbones.attention import Attention
from bpt_dist.backbones.base import InputEmbeds, average_distributions, end_tokens
from bpt_dist.backbones.candidates import MOST_LOGITS, Tree
from bpt_dist.backbones.decoder.attention import NextTokens, PromptsAndTexts, Reader
from bpt_dist.backbones.decoder.layout import ONLY_EACH_TOKEN, Layout
from bpt_dist.backbones.decoder.reading import Reading, inserted_at, let_read
from bpt_dist.backbones.grid import Grid
from bpt_dist.backbones.insertion import InsertionPoints
from bpt_dist.backbones.shared_prompts import shared_prompts_of
from bpt_dist.backbones.transfer import send, send_together
from bpt_dist.objective import IGNORED


def logits_of(model: Any, hidden: Float[Tensor, "*n D"]) -> Float[Tensor, "*n V"]:
    """Return the logits of last hidden states in float32, soft-capped where the family does so."""
    logits = model.lm_head(hidden)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return (logits if cap is None else torch.tanh(logits / cap) * cap).float()


@dataclass(frozen=True)
class Inputs:
    """What a pass reads: the prompts that some text has, which one each text has, the texts [m, N, L, D] and their lengths."""

    prompts: Float[Tensor, "m S P D"]
    choice: list[int]
    texts: Float[Tensor, "m N L D"]
    num_source: list[int]

    @classmethod
    def of(cls, inputs: Float[Tensor, "m N L D"], lengths: Sequence[int], num_added: int, *, shares: bool = True) -> Inputs:
        """Take inputs apart into shared prompts and texts.

        Where none were noted, or states of a prompt are not shared (`shares`), what was added belongs to each text.
        """
        shared = shared_prompts_of(inputs) if shares else None
        if shared is None:
            nothing = inputs.new_zeros(len(inputs), 1, 0, inputs.shape[-1])
            return cls(nothing, [0] * len(lengths), inputs, [length + num_added for length in lengths])
        used, choice = shared.choice.unique(return_inverse=True)
        prompts = shared.prompts
        if len(used) < prompts.shape[1]:
            prompts = prompts[:, send(used, prompts.device)]
        return cls(prompts, choice.tolist(), inputs[:, :, num_added:], list(lengths))

    def layout(self, num_behind: Sequence[int], tree: Tree | None = None) -> Layout:
        """Return the order of the tokens when so many are read behind each source."""
        m, s, p = self.prompts.shape[:3]
        return Layout((m, s, p), self.choice, self.num_source, num_behind, tree)


class Scored(NamedTuple):
    """Results of one pass: sums over target tokens; logits and states of all target tokens; on request, states of all tokens."""

    sums: Float[Tensor, "m N"]
    logits: Float[Tensor, "m targets V"]
    target_states: Float[Tensor, "m targets D"]
    states: Float[Tensor, "tokens D"]
    layout: Layout


class PackedDecoder:
    """Log-likelihood, ranking and generation as `PromptedDecoder` does them; results are the stock pass's to rounding.

    `insertions` is the backbone whose inserted changes act here.
    """

    def __init__(self, model: Any, attention: Attention, insertions: InsertionPoints | None = None) -> None:
        self.model, self.attention, self.insertions = model, attention, insertions
        let_read(model)

    def score(
        self,
        ids: Int[Tensor, "N T"],
        mask: Int[Tensor, "N T"],
        target_ids: Int[Tensor, "N U"],
        embeds: InputEmbeds,
        states: bool,
    ) -> tuple[Any, ...]:
        """Return the fields of `Scored` as a plain tuple, in which a partitioned model finds its tensors.

        `mask` and `target_ids` are read where they are, on the host best; `ids` are on the device.
        """
        device = ids.device
        inputs = self._inputs(ids, mask, embeds)
        has_target = target_ids != IGNORED
        num_targets = has_target.sum(1).tolist()
        layout = inputs.layout([number - 1 for number in num_targets])
        tokens = layout.pack(inputs.prompts, inputs.texts, self.embed(send(target_ids.clamp_min(0), device)))
        of_all = self.run(tokens, layout.positions(), PromptsAndTexts(layout, self.attention), layout.grid(tokens.device))
        places = [first + source - 1 + torch.arange(number) for first, source, number in
                  zip(layout.first.mT[..., None], inputs.num_source, num_targets, strict=True)]  # fmt: skip
        of_targets = of_all[send(torch.cat(places, dim=1), device)]

        def in_rows() -> Int[Tensor, " targets"]:
            return send(has_target.expand(len(of_targets), -1, -1).flatten().nonzero()[:, 0], device)

        logits = self.logits(of_targets, Grid(len(of_targets) * len(ids), target_ids.shape[1], in_rows))
        labels = send(target_ids[has_target], device).expand(len(logits), -1)
        losses = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
        sums = torch.stack([-part.sum(1) for part in losses.split(num_targets, dim=1)], dim=1)
        return sums, logits, of_targets, (of_all if states else of_all[:0]).clone(), layout

    def rank(
        self, ids: Int[Tensor, "N T"], mask: Int[Tensor, "N T"], candidates: Int[Tensor, "C U"], embeds: InputEmbeds
    ) -> Float[Tensor, "m N C"]:
        """Return the log-likelihood (summed over tokens) of every candidate; the source is read once, the candidates as a tree.

        `mask` and `candidates` are read where they are, on the host best; `ids` are on the device.
        """
        inputs, tree = self._inputs(ids, mask, embeds), Tree.of(candidates.tolist(), 0)  # the root is the source's last token
        nodes = send(torch.tensor(tree.tokens[1:], dtype=torch.long), ids.device)
        layout = inputs.layout([len(nodes)] * len(ids), tree)
        tokens = layout.pack(inputs.prompts, inputs.texts, self.embed(nodes).expand(len(ids), -1, -1))
        states = self.run(tokens, layout.positions(), PromptsAndTexts(layout, self.attention), layout.grid(tokens.device))
        starts = layout.first + torch.tensor(inputs.num_source) - 1
        places = send(starts.flatten()[:, None] + torch.arange(len(tree.tokens)), states.device)
        rows_at_once = max(1, MOST_LOGITS // (len(tree.tokens) * self.model.config.vocab_size))
        sums = []
        for begin in range(0, len(places), rows_at_once):
            part = places[begin : begin + rows_at_once]
            first, last = begin * len(tree.tokens), (begin + len(part)) * len(tree.tokens)
            grid = Grid(len(places), len(tree.tokens), partial(torch.arange, first, last, device=states.device))
            sums.append(self._along(tree, states[part], grid))
        return torch.cat(sums).view(*layout.first.shape, -1)

    def generate(
        self, ids: Int[Tensor, "N T"], mask: Int[Tensor, "N T"], embeds: InputEmbeds, max_new_tokens: int, average: bool = False
    ) -> Int[Tensor, "m N U"]:
        """Return greedily decoded ids; a sequence that has ended costs nothing more.

        With `average` the particles of a text write one target together, by the mean of their next-token distributions. Behind the
        end token is padding.
        """
        inputs = self._inputs(ids, mask, embeds)
        layout = inputs.layout([0] * len(ids))
        reader = PromptsAndTexts(layout, self.attention, keep=True)
        tokens = layout.pack(inputs.prompts, inputs.texts, inputs.texts.new_zeros(len(ids), 0, inputs.texts.shape[-1]))
        states = self.run(tokens, layout.positions(), reader, layout.grid(tokens.device))
        assert reader.kept is not None
        # Rows are in the order of the layout: group by group, particle by particle.
        order, num_source = layout.order(), torch.tensor(inputs.num_source)
        particles, texts = order // len(ids), order % len(ids)
        starts, positions = layout.first[particles, texts] + num_source[texts], layout.prompt_length + num_source[texts]
        order, particles, texts, starts, positions = send_together([order, particles, texts, starts, positions], ids.device)
        averaged = layout.num_particles if average else 1
        written = self.write(states[starts - 1], positions, NextTokens(reader.kept, self.attention), layout.num_rows,
                             max_new_tokens, averaged, order=order)  # fmt: skip
        found = torch.empty(*layout.first.shape, written.shape[1], dtype=torch.long, device=ids.device)
        found[particles, texts] = written
        return found

    def write(
        self,
        states: Float[Tensor, "rows D"],
        positions: Int[Tensor, " rows"],
        reader: NextTokens,
        num_rows: list[int],
        max_new_tokens: int,
        averaged: int,
        limits: Int[Tensor, " rows"] | None = None,
        *,
        order: Int[Tensor, " rows"] | None = None,
    ) -> Int[Tensor, "rows U"]:
        """Return what follows the last states of sequences in groups, one token a step.

        `limits` may end a sequence earlier, those of a text alike. Behind the end token is padding. `order` is the place of each
        sequence, particle by particle and text by text, where what is inserted may depend on the text.
        """
        config, device = self.model.config, states.device
        tokens = torch.full((len(states), max_new_tokens), config.pad_token_id, device=device)
        ends, alive = torch.tensor(end_tokens(config), device=device), torch.arange(len(states), device=device)
        for step in range(max_new_tokens):
            grid = ONLY_EACH_TOKEN if order is None else Grid(len(order), 1, partial(order.index_select, 0, alive))
            if step:
                states = self.run(self.embed(tokens[alive, step - 1]), positions[alive] + step - 1, reader, grid)
            scores = self.logits(states, grid)
            if averaged > 1:
                scores = torch.cat([average_distributions(group, averaged) for group in scores.split(num_rows)])
            tokens[alive, step] = scores.argmax(-1)
            continues = ~torch.isin(tokens[alive, step], ends)
            if limits is not None:
                continues &= limits[alive] > step + 1
            if not continues.any():
                return tokens[:, : step + 1]
            parts = list(continues.split(num_rows))
            reader.drop(parts)
            num_rows = [int(part.sum()) for part in parts if part.any()]
            alive = alive[continues]
        return tokens

    def _inputs(self, ids: Tensor, mask: Tensor, embeds: InputEmbeds) -> Inputs:
        inputs = embeds(self.embed(ids))
        shares = self.insertions is None or self.insertions.changes_texts_alike
        return Inputs.of(inputs, mask.sum(1).tolist(), inputs.shape[2] - ids.shape[1], shares=shares)

    def embed(self, ids: Int[Tensor, "*n"]) -> Float[Tensor, "*n D"]:
        """Return the word embeddings, multiplied where the family does so; prompts are put before them as they are."""
        rows: Tensor = self.model.model.embed_tokens(ids)
        return rows

    def run(self, tokens: Float[Tensor, "t D"], positions: Int[Tensor, " t"], reader: Reader, grid: Grid) -> Float[Tensor, "t D"]:
        """Return the last hidden states of tokens whose attention `reader` computes; `grid` is for what is inserted."""
        reading = Reading(self.model.config, reader, self.insertions, grid)
        with reading.under_way():
            output = self.model.model(
                inputs_embeds=tokens.to(self.model.dtype)[None],
                position_ids=send(positions, tokens.device)[None],
                use_cache=False,
                reading=reading,
            )
        states: Tensor = output.last_hidden_state[0]
        return states

    def logits(self, states: Float[Tensor, "*tokens D"], grid: Grid) -> Float[Tensor, "*tokens V"]:
        """Return the logits of last hidden states in float32."""
        with inserted_at(self.insertions, grid):
            return logits_of(self.model, states)

    def _along(self, tree: Tree, states: Float[Tensor, "rows nodes D"], grid: Grid) -> Float[Tensor, "rows C"]:
        """Return the log-likelihood of each candidate from the states of the nodes of some sequences."""
        of_nodes = self.logits(states, grid).log_softmax(-1)
        paths = [send(torch.tensor(path), states.device) for path in tree.paths]
        return torch.stack([of_nodes[:, path[:, 0], path[:, 1]].sum(1) for path in paths], dim=-1)
