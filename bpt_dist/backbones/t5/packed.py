"""Our own pass through a whole frozen T5: no padding, no masks, no keys and values over encoder tokens; exact.

It replaces transformers' modules where a rank holds the whole T5, nothing of it is trained and nothing is inserted into it
(`T5Backbone.packed_pass_for`). Weights stay those of the stock model, of which it holds no second copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from bpt_dist.backbones.attention import Attention, plain_attention
from bpt_dist.backbones.base import Forward, InputEmbeds, average_distributions, end_tokens
from bpt_dist.backbones.candidates import MOST_LOGITS, Tree, along_each
from bpt_dist.backbones.t5.blocks import Decoder, Encoder
from bpt_dist.backbones.t5.layout import Layout
from bpt_dist.objective import IGNORED, Reduction


class PackedT5:
    """Log-likelihood, ranking and generation as `PromptedT5` does them; results are the stock pass's to rounding."""

    def __init__(self, model: Any, attention: Attention) -> None:
        self.model = model
        self.encoder, self.decoder = Encoder(model.encoder, attention), Decoder(model.decoder, plain_attention)

    def log_likelihood(
        self,
        ids: Int[Tensor, "N T"],
        mask: Int[Tensor, "N T"],
        target_ids: Int[Tensor, "N U"],
        input_embeds: InputEmbeds,
        reduction: Reduction,
        states: bool,
    ) -> Forward:
        """Return the log-likelihood of each target; logits are made for positions that have a target only."""
        num_targets = (target_ids != IGNORED).sum(1)
        inputs, layout = self._lay_out(ids, mask, input_embeds, num_targets.tolist())
        encoded = self.encoder(layout.encoder_tokens(inputs), layout)
        start = layout.decoder_tokens(self.model._shift_right(target_ids))
        decoded = self.decoder(self._embed(start), _memory(encoded, layout), layout.decoder_rows)
        logits = self._logits(decoded)
        losses = functional.cross_entropy(logits, layout.decoder_tokens(target_ids), reduction="none")
        total = -layout.sums(losses)
        if reduction == "token_mean":
            total = total / num_targets.clamp_min(1)
        length = target_ids.shape[1]
        last = None
        if states:
            last = (layout.unpacked_encoder(encoded, inputs.shape[2]), layout.unpacked_decoder(decoded, length))
        return Forward(total, lambda: layout.unpacked_decoder(logits, length), last)

    def rank(
        self, ids: Int[Tensor, "N T"], mask: Int[Tensor, "N T"], candidates: Int[Tensor, "C U"], input_embeds: InputEmbeds
    ) -> Float[Tensor, "m N C"]:
        """Return the log-likelihood (summed over tokens) of every candidate, read by one pass of the decoder.

        Candidates that begin alike share the positions of their common beginning: the decoder reads a tree.
        """
        tree = Tree.of(candidates.tolist(), self.model.config.decoder_start_token_id)
        inputs, layout = self._lay_out(ids, mask, input_embeds, [len(tree.tokens)] * len(ids))
        encoded = self.encoder(layout.encoder_tokens(inputs), layout)
        biases = [self._bias_of(tree)] * len(layout.groups)
        nodes = torch.tensor(tree.tokens, device=ids.device).repeat(sum(layout.num_rows))
        decoded = self.decoder(self._embed(nodes), _memory(encoded, layout), layout.decoder_rows, biases)
        rows_at_once = max(1, MOST_LOGITS // (len(tree.tokens) * self.model.config.vocab_size))
        sums = [self._along(tree, rows) for rows in decoded.split(rows_at_once * len(tree.tokens))]
        return layout.in_order(torch.cat(sums))

    def rank_each(
        self,
        ids: Int[Tensor, "N T"],
        mask: Int[Tensor, "N T"],
        prompts: Sequence[Float[Tensor, "m _P D"]],
        candidates: Sequence[Int[Tensor, "_C _U"]],
    ) -> list[Float[Tensor, "m _C"]]:
        """Return the same where each text has prompts and candidates of its own: still one pass, each text's tree is its own."""
        known = {id(of_text): Tree.of(of_text.tolist(), self.model.config.decoder_start_token_id) for of_text in candidates}
        trees = [known[id(of_text)] for of_text in candidates]
        layout, tokens = self._lay_out_each(ids, mask, prompts, [len(tree.tokens) for tree in trees])
        memory = _memory(self.encoder(tokens, layout), layout)
        bias_of = {key: self._bias_of(tree) for key, tree in known.items()}
        biases = []
        for group in layout.groups:
            of_group = [bias_of[id(candidates[text])] for text in group.texts]
            alike = all(bias is of_group[0] for bias in of_group)
            biases.append(of_group[0] if alike else torch.cat(of_group).repeat(layout.num_particles, 1, 1, 1))
        order = [text for group in layout.groups for _ in range(layout.num_particles) for text in group.texts]
        nodes = torch.tensor([token for text in order for token in trees[text].tokens], device=ids.device)
        decoded = self.decoder(self._embed(nodes), memory, layout.decoder_rows, biases)
        sums = along_each([trees[text] for text in order], decoded, self._logits, self.model.config.vocab_size)
        found: list[list[Tensor]] = [[] for _ in trees]
        for text, of_row in zip(order, sums, strict=True):
            found[text].append(of_row)
        return [torch.stack(of_text) for of_text in found]

    def generate_each(
        self,
        ids: Int[Tensor, "N T"],
        mask: Int[Tensor, "N T"],
        prompts: Sequence[Float[Tensor, "m _P D"]],
        max_new_tokens: Sequence[int],
    ) -> Int[Tensor, "N U"]:
        """Return the ids that the prompts of each text write together, at most so many of its own; the rest is padding."""
        layout, tokens = self._lay_out_each(ids, mask, prompts, [1] * len(ids))
        memory = _memory(self.encoder(tokens, layout), layout)
        order = [text for group in layout.groups for _ in range(layout.num_particles) for text in group.texts]
        limits = torch.tensor([max_new_tokens[text] for text in order], device=ids.device)
        config, most = self.model.config, max(max_new_tokens)
        written = greedy(self.decoder, self._embed, self._logits, memory, config, most, layout.num_particles, limits)
        return layout.in_order(written)[0]

    def generate(
        self,
        ids: Int[Tensor, "N T"],
        mask: Int[Tensor, "N T"],
        input_embeds: InputEmbeds,
        max_new_tokens: int,
        average: bool = False,
    ) -> Int[Tensor, "m N U"]:
        """Return greedily decoded ids; a sequence that has ended costs nothing more.

        With `average` the particles of a text write one target together, by the mean of their next-token distributions.
        """
        inputs, layout = self._lay_out(ids, mask, input_embeds, [1] * len(ids))
        encoded = self.encoder(layout.encoder_tokens(inputs), layout)
        memory, averaged = _memory(encoded, layout), layout.num_particles if average else 1
        tokens = greedy(self.decoder, self._embed, self._logits, memory, self.model.config, max_new_tokens, averaged)
        return layout.in_order(tokens)

    def _lay_out(
        self, ids: Tensor, mask: Tensor, input_embeds: InputEmbeds, decoder_lengths: list[int]
    ) -> tuple[Float[Tensor, "m N L D"], Layout]:
        inputs = input_embeds(self._embed(ids))
        num_added = inputs.shape[2] - ids.shape[1]
        return inputs, Layout(len(inputs), (mask.sum(1) + num_added).tolist(), decoder_lengths)

    def _lay_out_each(
        self, ids: Tensor, mask: Tensor, prompts: Sequence[Float[Tensor, "m _P D"]], decoder_lengths: Sequence[int]
    ) -> tuple[Layout, Float[Tensor, "tokens D"]]:
        """Return the order of the tokens and the encoder's inputs in it, where each text has prompts of its own."""
        lengths = mask.sum(1).tolist()
        num_encoder = [prompt.shape[1] + length for prompt, length in zip(prompts, lengths, strict=True)]
        layout, embeds = Layout(len(prompts[0]), num_encoder, decoder_lengths), self._embed(ids)
        parts = []
        for group in layout.groups:
            rows = [
                torch.cat([prompts[text].to(embeds), embeds[text, : lengths[text]].expand(layout.num_particles, -1, -1)], dim=1)
                for text in group.texts
            ]
            parts.append(torch.stack(rows, dim=1).flatten(0, 2))
        return layout, torch.cat(parts)

    def _embed(self, ids: Int[Tensor, "*n"]) -> Float[Tensor, "*n D"]:
        """Return the word embeddings in float32, the type of hidden states, so that prompts before them are not rounded."""
        rows: Tensor = self.model.shared(ids)
        return rows.float()

    def _logits(self, decoded: Float[Tensor, "*n D"]) -> Float[Tensor, "*n V"]:
        """Return the logits in float32."""
        if self.model.config.scale_decoder_outputs:
            decoded = decoded * self.model.config.d_model**-0.5
        logits: Tensor = self.model.lm_head(decoded)
        return logits.float()

    def _along(self, tree: Tree, decoded: Float[Tensor, "nodes D"]) -> Float[Tensor, "rows C"]:
        """Return the log-likelihood of each candidate from the states of all nodes of some sequences."""
        of_nodes = self._logits(decoded).log_softmax(-1).unflatten(0, (-1, len(tree.tokens)))
        paths = [torch.tensor(path, device=decoded.device) for path in tree.paths]
        return torch.stack([of_nodes[:, path[:, 0], path[:, 1]].sum(1) for path in paths], dim=-1)

    def _bias_of(self, tree: Tree) -> Float[Tensor, "1 H n n"]:
        """Return the position bias between nodes: by their depths, -inf unless one is on the other's way to the root."""
        depths = torch.tensor(tree.depths)
        bias = self.decoder.bias(int(depths.max()) + 1)
        between = bias[:, :, depths][..., depths]
        return between.masked_fill(~tree.visible().to(between.device), -torch.inf)


def _memory(encoded: Float[Tensor, "tokens D"], layout: Layout) -> list[Float[Tensor, "r S D"]]:
    parts = encoded.split([rows * length for rows, length in layout.encoder_rows])
    return [part.view(*shape, -1) for part, shape in zip(parts, layout.encoder_rows, strict=True)]


def greedy(
    decoder: Decoder,
    embed: Callable[[Tensor], Tensor],
    logits: Callable[[Tensor], Tensor],
    memory: Sequence[Float[Tensor, "r S D"]],
    config: Any,
    max_new_tokens: int,
    averaged: int = 1,
    limits: Int[Tensor, " rows"] | None = None,
) -> Int[Tensor, "rows U"]:
    """Return the start token and what follows, at most `max_new_tokens`, for the sequences of each group in `memory`.

    `limits` may end a sequence earlier, those of a text alike. A group is particle-major; with `averaged` > 1 so many particles of
    each text write the same tokens and end together. After the end token comes padding, as transformers' `generate` fills it.
    """
    num_rows, device = sum(map(len, memory)), memory[0].device
    tokens = torch.full((num_rows, max_new_tokens + 1), config.pad_token_id, device=device)
    tokens[:, 0] = config.decoder_start_token_id
    ends = torch.tensor(end_tokens(config), device=device)
    alive, states = torch.arange(num_rows, device=device), list(memory)
    cache = Cache(decoder)
    steps = 0
    while steps < max_new_tokens and len(alive):
        decoded = cache.step(embed(tokens[alive, steps]), states)
        steps += 1
        scores = logits(decoded)
        if averaged > 1:
            groups = scores.split([len(group) for group in states])
            scores = torch.cat([average_distributions(group, averaged) for group in groups])
        tokens[alive, steps] = scores.argmax(-1)
        continues = ~torch.isin(tokens[alive, steps], ends)
        if limits is not None:
            continues &= limits[alive] > steps
        if not continues.all():
            parts = continues.split([len(part) for part in states])
            states = [part[keep] for part, keep in zip(states, parts, strict=True) if keep.any()]
            alive = alive[continues]
            cache.keep(continues)
    return tokens[:, : steps + 1]


class Cache:
    """The decoder with the keys and values of what it has read, one token a sequence and step."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.kept: list[Tensor | None] = [None] * len(decoder.stack.block)  # of each block, [2, rows, H, t, d]

    def step(self, tokens: Float[Tensor, "rows D"], memory: Sequence[Float[Tensor, "r S D"]]) -> Float[Tensor, "rows D"]:
        """Return the last hidden state of each sequence's next token."""
        decoder, hidden = self.decoder, tokens
        rows = [(len(states), 1) for states in memory]
        for number, before in enumerate(self.kept):
            projected = decoder.project(number, hidden)
            new = projected[:, 1:].permute(1, 0, 2, 3)[:, :, :, None]
            kept = new if before is None else torch.cat([before, new], dim=3)
            self.kept[number] = kept
            bias = decoder.bias(kept.shape[3])[:, :, -1:]
            read = plain_attention(projected[:, 0, :, None], kept[0], kept[1], bias).flatten(1)
            hidden = decoder.feed_forward(number, decoder.attend_memory(number, decoder.out(number, hidden, read), memory, rows))
        return decoder.last(hidden)

    def keep(self, continues: Tensor) -> None:
        """Forget the sequences that have ended."""
        self.kept = [None if kept is None else kept[:, continues] for kept in self.kept]
