"""Our own pass through a frozen T5: no padding, no masks, no keys and values over encoder tokens; exact.

It replaces transformers' modules where nothing of the T5 is trained (`T5Backbone.packed_pass_for`). What a method has inserted acts
here too. Weights stay those of the stock model, of which it holds no second copy. They may be partitioned: a pass is one call of
the partitioned module, and blocks, last norms, head and word embeddings compute inside their own `forward`, in the same order and
as often on every rank, whatever its texts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from bpt_dist.backbones.attention import Attention, plain_attention
from bpt_dist.backbones.base import AnyRank, Forward, InputEmbeds, average_distributions, end_tokens
from bpt_dist.backbones.candidates import MOST_LOGITS, Tree, along_each
from bpt_dist.backbones.grid import Grid
from bpt_dist.backbones.insertion import InsertionPoints
from bpt_dist.backbones.mixin import mix_in
from bpt_dist.backbones.t5.blocks import Cache, Changes, Decoder, Encoder, MakeBiases, Memory
from bpt_dist.backbones.t5.frozen import FrozenLinear, Runs
from bpt_dist.backbones.t5.layout import Layout, PaddedLayout
from bpt_dist.objective import IGNORED, Reduction

Call = Callable[[Callable[[], Any]], Any]


class PackedT5:
    """Log-likelihood, ranking and generation as `PromptedT5` does them; results are the stock pass's to rounding.

    `insertions` is the backbone whose inserted changes act here; `call` runs a pass inside the partitioned module. Log-likelihoods
    are computed by few kernels with `pads_attention`: attention then reads all texts in one call, padded to the longest. A CPU is
    faster without, group by group of equal lengths.
    """

    def __init__(
        self,
        model: Any,
        attention: Attention,
        insertions: InsertionPoints | None = None,
        call: Call | None = None,
        *,
        pads_attention: bool = False,
    ) -> None:
        self.model, self._call, self.pads_attention = model, call or (lambda run: run()), pads_attention
        changes: Changes = {} if insertions is None else insertions.changes
        self.observers = [] if insertions is None else insertions.observers
        self.encoder = Encoder(model.encoder, attention, changes)
        self.decoder = Decoder(model.decoder, attention if pads_attention else plain_attention, changes)
        self.any_rank: AnyRank = bool  # replaced where ranks gather together: they write as long as the slowest of them
        mix_in(Runs, model.lm_head)
        self.head = FrozenLinear(model.lm_head)

    def log_likelihood(
        self,
        ids: Int[Tensor, "N T"],
        mask: Int[Tensor, "N T"],
        target_ids: Int[Tensor, "N U"],
        input_embeds: InputEmbeds,
        reduction: Reduction,
        states: bool,
    ) -> Forward:
        """Return the log-likelihood of each target; logits are made for positions that have a target, and for little more.

        `mask` and `target_ids` are read where they are, on the host best; `ids` are on the device.
        """
        num_targets = (target_ids != IGNORED).sum(1)
        used: list[tuple[Layout, int, Tensor]] = []

        def run() -> tuple[Tensor, ...]:
            inputs, layout = self._lay_out(ids, mask, input_embeds, num_targets.tolist(), padded=self.pads_attention)
            of_decoder = [layout.decoder_tokens(each) for each in (self.model._shift_right(target_ids), target_ids)]
            start, wanted, divisors = layout.send([*of_decoder, num_targets.clamp_min(1)], ids.device)
            used.append((layout, inputs.shape[2], divisors))
            memory = self._encode(layout.encoder_tokens(inputs), layout, inputs.shape[2])
            grid = layout.decoder_grid(ids.device)
            decoded = self.decoder(self.embed(start), memory, layout.decoder_rows, grid)
            logits = self._through_head(decoded, lambda decoded: self._logits(decoded, grid))
            losses = functional.cross_entropy(logits, wanted, reduction="none", ignore_index=IGNORED)
            return losses, logits, *((memory.tokens, decoded) if states else ())

        losses, logits, *last = self._call(run)
        layout, num_read, divisors = used[0]
        total = -layout.sums(losses)
        if reduction == "token_mean":
            total = total / divisors
        length = target_ids.shape[1]
        unpacked = (layout.unpacked_encoder(last[0], num_read), layout.unpacked_decoder(last[1], length)) if last else None
        return Forward(total, lambda: layout.unpacked_decoder(logits, length), unpacked)

    def rank(
        self, ids: Int[Tensor, "N T"], mask: Int[Tensor, "N T"], candidates: Int[Tensor, "C U"], input_embeds: InputEmbeds
    ) -> Float[Tensor, "m N C"]:
        """Return the log-likelihood (summed over tokens) of every candidate, read by one pass of the decoder.

        Candidates that begin alike share the positions of their common beginning: the decoder reads a tree.
        """
        tree = Tree.of(candidates.tolist(), self.model.config.decoder_start_token_id)
        used: list[Layout] = []

        def run() -> Tensor:
            inputs, layout = self._lay_out(ids, mask, input_embeds, [len(tree.tokens)] * len(ids))
            used.append(layout)
            memory = self._encode(layout.encoder_tokens(inputs), layout, inputs.shape[2])
            nodes = torch.tensor(tree.tokens, device=ids.device).repeat(sum(layout.num_rows))
            grid, biases = layout.decoder_grid(ids.device), _once(lambda: [self._bias_of(tree)] * len(layout.groups))
            decoded = self.decoder(self.embed(nodes), memory, layout.decoder_rows, grid, biases)
            return self._through_head(decoded, lambda decoded: self._along(tree, decoded, grid))

        sums = self._call(run)
        return used[0].in_order(sums)

    def rank_each(
        self,
        ids: Int[Tensor, "N T"],
        mask: Int[Tensor, "N T"],
        prompts: Sequence[Float[Tensor, "m _P D"]],
        candidates: Sequence[Int[Tensor, "_C _U"]],
    ) -> list[Float[Tensor, "m _C"]]:
        """Return the same where each text has prompts and candidates of its own: still one pass, each text's tree is its own."""
        # The texts of a task have the very same tensor.
        distinct = {id(of_text): of_text for of_text in candidates}
        known = {key: Tree.of(some.tolist(), self.model.config.decoder_start_token_id) for key, some in distinct.items()}
        trees = [known[id(of_text)] for of_text in candidates]
        order: list[int] = []

        def make_biases(layout: Layout) -> list[Tensor]:
            bias_of = {key: self._bias_of(tree) for key, tree in known.items()}
            biases = []
            for group in layout.groups:
                of_group = [bias_of[id(candidates[text])] for text in group.texts]
                alike = all(bias is of_group[0] for bias in of_group)
                biases.append(of_group[0] if alike else torch.cat(of_group).repeat(layout.num_particles, 1, 1, 1))
            return biases

        def run() -> tuple[Tensor, ...]:
            layout, tokens, longest = self._lay_out_each(ids, mask, prompts, [len(tree.tokens) for tree in trees])
            memory, grid = self._encode(tokens, layout, longest), layout.decoder_grid(ids.device)
            order.extend(text for group in layout.groups for _ in range(layout.num_particles) for text in group.texts)
            nodes = torch.tensor([token for text in order for token in trees[text].tokens], device=ids.device)
            biases, own_trees = _once(lambda: make_biases(layout)), [trees[text] for text in order]
            decoded = self.decoder(self.embed(nodes), memory, layout.decoder_rows, grid, biases)
            size = self.model.config.vocab_size

            def along(decoded: Tensor) -> tuple[Tensor, ...]:
                return tuple(along_each(own_trees, decoded, lambda some: self._logits(decoded[some], grid.part(some)), size))

            return self._through_head(decoded, along)

        found: list[list[Tensor]] = [[] for _ in trees]
        sums = self._call(run)
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
        used: list[Layout] = []

        def run() -> Tensor:
            layout, tokens, longest = self._lay_out_each(ids, mask, prompts, [1] * len(ids))
            used.append(layout)
            order = [text for group in layout.groups for _ in range(layout.num_particles) for text in group.texts]
            limits = torch.tensor([max_new_tokens[text] for text in order], device=ids.device)
            memory = self._encode(tokens, layout, longest, keep=True)
            return self._write(memory, layout, max(max_new_tokens), layout.num_particles, limits)

        written = self._call(run)
        return used[0].in_order(written)[0]

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
        used: list[Layout] = []

        def run() -> Tensor:
            inputs, layout = self._lay_out(ids, mask, input_embeds, [1] * len(ids))
            used.append(layout)
            memory = self._encode(layout.encoder_tokens(inputs), layout, inputs.shape[2], keep=True)
            return self._write(memory, layout, max_new_tokens, layout.num_particles if average else 1)

        written = self._call(run)
        return used[0].in_order(written)

    def _encode(self, tokens: Float[Tensor, "tokens D"], layout: Layout, longest: int, *, keep: bool = False) -> Memory:
        """Return the encoder's states of all tokens, and let them be observed in rows of the `longest` length."""
        grid, padding = layout.encoder_grid(longest, tokens.device), layout.padding
        encoded = self.encoder(tokens, layout.encoder_rows, grid, padding)
        for observe in self.observers:
            observe(grid.unpacked(encoded), grid.mask())
        return Memory(encoded, layout.encoder_rows, grid, padding, keep=keep)

    def _write(
        self, memory: Memory, layout: Layout, max_new_tokens: int, averaged: int, limits: Tensor | None = None
    ) -> Int[Tensor, "rows U"]:
        """Return the start token and what the sequences of a layout write, in its order."""
        device = memory.tokens.device
        order = layout.order().to(device)

        def grid(alive: Int[Tensor, " alive"]) -> Grid:
            return Grid(len(order), 1, lambda: order[alive])

        return greedy(self, memory, grid, max_new_tokens, averaged, limits)

    def _lay_out(
        self, ids: Tensor, mask: Tensor, input_embeds: InputEmbeds, decoder_lengths: list[int], *, padded: bool = False
    ) -> tuple[Float[Tensor, "m N L D"], Layout]:
        inputs = input_embeds(self.embed(ids))
        num_added = inputs.shape[2] - ids.shape[1]
        lengths = (mask.sum(1) + num_added).tolist()
        if padded:
            return inputs, PaddedLayout(len(inputs), lengths, decoder_lengths, inputs.shape[2])
        return inputs, Layout(len(inputs), lengths, decoder_lengths)

    def _lay_out_each(
        self, ids: Tensor, mask: Tensor, prompts: Sequence[Float[Tensor, "m _P D"]], decoder_lengths: Sequence[int]
    ) -> tuple[Layout, Float[Tensor, "tokens D"], int]:
        """Return the order of the tokens, the encoder's inputs in it, and the longest, where each text has prompts of its own."""
        lengths = mask.sum(1).tolist()
        num_encoder = [prompt.shape[1] + length for prompt, length in zip(prompts, lengths, strict=True)]
        layout, embeds = Layout(len(prompts[0]), num_encoder, decoder_lengths), self.embed(ids)
        parts = []
        for group in layout.groups:
            rows = [
                torch.cat([prompts[text].to(embeds), embeds[text, : lengths[text]].expand(layout.num_particles, -1, -1)], dim=1)
                for text in group.texts
            ]
            parts.append(torch.stack(rows, dim=1).flatten(0, 2))
        return layout, torch.cat(parts), max(num_encoder)

    def embed(self, ids: Int[Tensor, "*n"]) -> Float[Tensor, "*n D"]:
        """Return the word embeddings in float32, the type of hidden states, so that prompts before them are not rounded."""
        rows: Tensor = self.model.shared(ids)
        return rows.float()

    def _through_head(self, decoded: Float[Tensor, "n D"], run: Callable[[Tensor], Any]) -> Any:
        """Return what `run` makes of last hidden states with `_logits`, which needs the weights of the head."""
        return self.model.lm_head(decoded, run=run)

    def _logits(self, decoded: Float[Tensor, "n D"], grid: Grid) -> Float[Tensor, "n V"]:
        """Return the logits in float32; only inside `_through_head`."""
        if self.model.config.scale_decoder_outputs:
            decoded = decoded * self.model.config.d_model**-0.5
        logits = self.decoder.changed(self.model.lm_head, decoded, self.head(decoded), grid)
        return logits.float()

    def next_logits(self, decoded: Float[Tensor, "n D"], grid: Grid) -> Float[Tensor, "n V"]:
        """Return the logits of the next token of each sequence."""
        logits: Tensor = self._through_head(decoded, lambda decoded: self._logits(decoded, grid))
        return logits

    def keep_step(self, device: torch.device) -> None:
        """Gather what a step of the decoder gathers, for the sake of ranks that still write, and compute nothing."""
        hidden = self.embed(torch.zeros(1, dtype=torch.long, device=device))
        for module in (*self.decoder.stack.block, self.decoder.stack.final_layer_norm, self.model.lm_head):
            module(hidden, run=torch.clone)

    def _along(self, tree: Tree, decoded: Float[Tensor, "nodes D"], grid: Grid) -> Float[Tensor, "rows C"]:
        """Return the log-likelihood of each candidate from the states of all nodes of all sequences, some sequences at a time."""
        num_nodes = len(tree.tokens)
        rows_at_once = max(1, MOST_LOGITS // (num_nodes * self.model.config.vocab_size))
        paths = [torch.tensor(path, device=decoded.device) for path in tree.paths]
        sums = []
        for begin in range(0, len(decoded), rows_at_once * num_nodes):
            some = slice(begin, begin + rows_at_once * num_nodes)
            of_nodes = self._logits(decoded[some], grid.part(some)).log_softmax(-1).unflatten(0, (-1, num_nodes))
            sums.append(torch.stack([of_nodes[:, path[:, 0], path[:, 1]].sum(1) for path in paths], dim=-1))
        return torch.cat(sums)

    def _bias_of(self, tree: Tree) -> Float[Tensor, "1 H n n"]:
        """Return the position bias between nodes: by their depths, -inf unless one is on the other's way to the root.

        Only inside the decoder's first block.
        """
        depths = torch.tensor(tree.depths)
        bias = self.decoder.bias(int(depths.max()) + 1)
        between = bias[:, :, depths][..., depths]
        return between.masked_fill(~tree.visible().to(between.device), -torch.inf)


def _once(make: MakeBiases) -> MakeBiases:
    """Return the same biases at every call: they are made in the first block."""
    return functools.cache(make)


def greedy(
    packed: PackedT5,
    memory: Memory,
    grid: Callable[[Tensor], Grid],
    max_new_tokens: int,
    averaged: int = 1,
    limits: Int[Tensor, " rows"] | None = None,
) -> Int[Tensor, "rows U"]:
    """Return the start token and what follows, at most `max_new_tokens`, for the sequences of each group in `memory`.

    `limits` may end a sequence earlier, those of a text alike. A group is particle-major; with `averaged` > 1 so many particles of
    each text write the same tokens and end together. After the end token comes padding, as transformers' `generate` fills it.
    `grid` gives the places of sequences that go on.
    """
    config, device = packed.model.config, memory.tokens.device
    num_rows = sum(map(len, memory.groups))
    tokens = torch.full((num_rows, max_new_tokens + 1), config.pad_token_id, device=device)
    tokens[:, 0] = config.decoder_start_token_id
    ends = torch.tensor(end_tokens(config), device=device)
    alive = torch.arange(num_rows, device=device)
    cache = Cache(packed.decoder, plain_attention)
    steps = 0
    while packed.any_rank(writes := steps < max_new_tokens and len(alive) > 0):
        if not writes:
            packed.keep_step(device)
            continue
        places = grid(alive)
        scores = packed.next_logits(cache.step(packed.embed(tokens[alive, steps]), memory, places), places)
        steps += 1
        if averaged > 1:
            groups = scores.split([len(group) for group in memory.groups])
            scores = torch.cat([average_distributions(group, averaged) for group in groups])
        tokens[alive, steps] = scores.argmax(-1)
        continues = ~torch.isin(tokens[alive, steps], ends)
        if limits is not None:
            continues &= limits[alive] > steps
        if not continues.all():
            memory.drop(continues.split([len(part) for part in memory.groups]))
            alive = alive[continues]
            cache.keep(continues)
    return tokens[:, : steps + 1]
