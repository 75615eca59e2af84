"""The frozen T5: the only place that knows T5's insides (and, with `mini.pretrain`, the only import of transformers).

Prompts enter as `inputs_embeds` with a mask of ones before the text's own mask. Everything a rank does with the T5 goes through ONE
forward of `PromptedT5`, so that a partitioned T5 gathers and releases its weights in the same places on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from bpt_dist.backbones.attention import ATTENTIONS
from bpt_dist.backbones.base import PASS_FLOPS, Backbone, Forward, InputEmbeds, Texts, average_distributions, end_tokens
from bpt_dist.backbones.mixin import mix_in
from bpt_dist.backbones.t5.frozen import Runs
from bpt_dist.backbones.t5.packed import PackedT5
from bpt_dist.backbones.transfer import send, send_together
from bpt_dist.objective import IGNORED, Reduction, sequence_log_likelihood


class PromptedT5(nn.Module):
    """T5 whose encoder inputs a method may extend; log-likelihood, ranking and generation in one forward.

    Rows of the results are particle-major [m*N, ...]: a partitioned module must not return views, so callers cut them.
    """

    def __init__(self, model: T5ForConditionalGeneration) -> None:
        super().__init__()
        self.model = model

    def forward(self, task: str, *args: Any, **kwargs: Any) -> Any:
        """Run `log_likelihood`, `rank`, `generate` or `embed` of the stock modules, or a `packed` pass given as a function."""
        run: dict[str, Callable[..., Any]] = {
            "log_likelihood": self._log_likelihood,
            "rank": self._rank,
            "generate": self._generate,
            "embed": self.model.shared,
            "packed": lambda run: run(),
        }
        return run[task](*args, **kwargs)

    def _inputs(self, ids: Int[Tensor, "N T"], mask: Int[Tensor, "N T"], input_embeds: InputEmbeds) -> tuple[Tensor, Tensor]:
        """Return inputs [m*N, L, D] and their mask [m*N, L]."""
        inputs = input_embeds(self.model.shared(ids))
        num_particles, _, length, _ = inputs.shape
        ones = mask.new_ones(mask.shape[0], length - mask.shape[1])
        full_mask = torch.cat([ones, mask], dim=1).repeat(num_particles, 1)
        return inputs.flatten(0, 1).to(self.model.dtype), full_mask

    def _log_likelihood(
        self, ids: Tensor, mask: Tensor, target_ids: Tensor, input_embeds: InputEmbeds, reduction: Reduction, states: bool
    ) -> tuple[Tensor, ...]:
        """Return log-likelihoods [rows] and logits [rows, U, V]; with `states`, also the last states of encoder and decoder."""
        inputs, full_mask = self._inputs(ids, mask, input_embeds)
        targets = target_ids.repeat(len(inputs) // len(ids), 1)
        start = self.model._shift_right(targets)
        decoded: list[Tensor] = []
        # `output_hidden_states` would keep the states of all layers.
        handle = self.model.decoder.register_forward_hook(lambda _module, _args, output: decoded.append(output[0]))
        try:
            output = self.model(inputs_embeds=inputs, attention_mask=full_mask, decoder_input_ids=start, use_cache=False)
        finally:
            handle.remove()
        last = (output.encoder_last_hidden_state, *decoded) if states else ()
        return sequence_log_likelihood(output.logits, targets, reduction), output.logits, *last

    def _rank(
        self, ids: Tensor, mask: Tensor, candidates: Int[Tensor, "C U"], input_embeds: InputEmbeds
    ) -> Float[Tensor, "rows C"]:
        """Return the log-likelihood (summed over tokens) of every candidate for every text; the encoder runs once."""
        inputs, full_mask = self._inputs(ids, mask, input_embeds)
        encoded = BaseModelOutput(last_hidden_state=self.model.encoder(inputs_embeds=inputs, attention_mask=full_mask)[0])
        columns = []
        for candidate in candidates:
            targets = candidate[candidate != IGNORED].expand(len(inputs), -1)
            start = self.model._shift_right(targets)
            logits = self.model(encoder_outputs=encoded, attention_mask=full_mask, decoder_input_ids=start, use_cache=False).logits
            columns.append(sequence_log_likelihood(logits, targets, "token_sum"))
        return torch.stack(columns, dim=-1)

    def _generate(
        self, ids: Tensor, mask: Tensor, input_embeds: InputEmbeds, max_new_tokens: int, synced: bool, average: bool
    ) -> Int[Tensor, "rows U"]:
        """Decode greedily; `synced` keeps partitioned ranks in lock-step until the last of them is done.

        With `average` the particles of a text write one target together, by the mean of their next-token distributions.
        """
        inputs, full_mask = self._inputs(ids, mask, input_embeds)
        num_particles = len(inputs) // len(ids)
        processors = [lambda _written, logits: average_distributions(logits, num_particles)] if average else []
        generate: Any = self.model.generate  # type: ignore[misc]  # its signature is not that of a method
        tokens: Tensor = generate(
            inputs_embeds=inputs,
            attention_mask=full_mask,
            max_new_tokens=max_new_tokens,
            synced_gpus=synced,
            logits_processor=processors,
        )
        return tokens


def greedy_decoding(config: T5Config) -> GenerationConfig:
    """Return the settings of the decoding this project measures with: the likeliest token at each step, until an end token.

    They replace the checkpoint's (beams, penalties, forced or banned tokens, least lengths), which the packed pass does not have.
    """
    return GenerationConfig(
        num_beams=1,
        do_sample=False,
        pad_token_id=config.pad_token_id,
        eos_token_id=end_tokens(config),
        decoder_start_token_id=config.decoder_start_token_id,
    )


class T5Backbone(Backbone):
    """A checkpoint of the T5 family."""

    core: PromptedT5
    packs_partitioned = True
    packs_recomputed = True

    def __init__(
        self, model: T5ForConditionalGeneration, tokenizer: Any, *, name: str, path: str, identity: str, revision: str | None = None
    ) -> None:
        core = PromptedT5(model.requires_grad_(False).eval())
        # Before anything wraps a block's `forward`: partitioning, or running it again in the backward pass.
        stacks: Any = (model.encoder, model.decoder)
        mix_in(Runs, model.lm_head, *(module for stack in stacks for module in (*stack.block, stack.final_layer_norm)))
        model.generation_config = greedy_decoding(model.config)
        super().__init__(core, tokenizer, name=name, path=path, identity=identity, revision=revision)
        self.packed: PackedT5 | None = None  # our own pass, where it is allowed

    @property
    def model(self) -> T5ForConditionalGeneration:
        """The stock transformers model; partitioned weights are empty outside a forward."""
        return self.core.model

    @property
    def facts(self) -> dict[str, Any]:
        """The configuration as transformers writes it."""
        facts: dict[str, Any] = self.model.config.to_dict()
        return facts

    @property
    def width(self) -> int:
        """Model width D."""
        return int(self.model.config.d_model)

    @property
    def vocabulary_size(self) -> int:
        """Rows of the word-embedding table."""
        return int(self.model.config.vocab_size)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.model.dtype

    @property
    def block_class(self) -> type[nn.Module]:
        """The class of T5's blocks."""
        return type(self.model.encoder.block[0])

    @property
    def word_embeddings(self) -> nn.Module:
        """The table that encoder and decoder share."""
        return self.model.shared

    @property
    def num_blocks(self) -> dict[str, int]:
        """How many blocks each stack has."""
        return {"encoder": len(self.model.encoder.block), "decoder": len(self.model.decoder.block)}

    def matmul_weights(self) -> tuple[int, int]:
        """Return the weights of linear layers that a source token and a target token pass; keys and values of both count."""
        config = self.model.config
        attention, layers = config.d_model * config.num_heads * config.d_kv, self.num_blocks
        feed_forward = (3 if config.is_gated_act else 2) * config.d_model * config.d_ff
        source = layers["encoder"] * (4 * attention + feed_forward) + layers["decoder"] * 2 * attention
        return source, layers["decoder"] * (6 * attention + feed_forward) + config.vocab_size * config.d_model

    def use_packed_pass(self, attention: str) -> None:
        """Read texts by our own pass wherever it applies. `attention` is `sdpa` or `eager`."""
        self.attention = attention
        self.packed = PackedT5(
            self.model,
            ATTENTIONS[attention],
            self,
            lambda run: self.call("packed", run),
            pads_attention=self.device.type == "cuda",
        )
        self.packed.any_rank = self.any_rank

    def use_stock_pass(self) -> None:
        """Read texts by transformers' modules, padded."""
        self.attention = self.packed = None

    def padding_overhead(self, num_targets: int) -> float:
        """Return how many tokens cost as much as one more pass where a pass pads its texts; 0 where it does not.

        `num_targets` is the length of the longest target.
        """
        if self.packed_pass_for(num_targets) is not None:
            return 0.0
        return PASS_FLOPS[self.device.type] / self.width**2

    def packed_pass_for(self, num_targets: int) -> PackedT5 | None:
        """Return our own pass where it applies to targets of that length: nothing of the T5 is trained.

        It reads the encoder's states without keys and values, which pays while the decoder has fewer positions than a head is wide.
        Longer targets are left to the stock pass, unless the T5 is partitioned: all ranks must make the same passes, whatever the
        lengths of their texts.
        """
        if self.packed is None or self.model.shared.weight.requires_grad:
            return None
        return None if num_targets > self.model.config.d_kv and self.partition is None else self.packed

    def log_likelihood(self, texts: Any, input_embeds: InputEmbeds, reduction: Reduction, *, states: bool = False) -> Forward:
        """Return the log-likelihood [m, N] of the targets of `texts` (source_ids, source_mask, target_ids) under each particle."""
        given = texts.source_ids, texts.source_mask, texts.target_ids
        if (packed := self.packed_pass_for(given[2].shape[1])) is not None:
            return packed.log_likelihood(send(given[0], self.device), *given[1:], input_embeds, reduction, states)
        ids, mask, targets = send_together(given, self.device)
        log_likelihood, *rest = self.call("log_likelihood", ids, mask, targets, input_embeds, reduction, states)
        logits, *last = [tensor.view(-1, len(ids), *tensor.shape[1:]) for tensor in rest]
        return Forward(log_likelihood.view(-1, len(ids)), lambda: logits, (last[0], last[1]) if last else None)

    @torch.no_grad()
    def rank(self, texts: Any, candidates: Int[Tensor, "C U"], input_embeds: InputEmbeds) -> Float[Tensor, "m N C"]:
        """Return the log-likelihood, summed over tokens, of each candidate target (-100 pads) for each text."""
        if (packed := self.packed_pass_for(candidates.shape[1])) is not None:
            return packed.rank(send(texts.source_ids, self.device), texts.source_mask, candidates, input_embeds)
        ids, mask, candidates = send_together([texts.source_ids, texts.source_mask, candidates], self.device)
        rows: Tensor = self.call("rank", ids, mask, candidates, input_embeds)
        return rows.view(-1, len(ids), len(candidates))

    @torch.no_grad()
    def generate(self, texts: Any, input_embeds: InputEmbeds, max_new_tokens: int, *, average: bool = False) -> list[list[str]]:
        """Return the greedily decoded targets, one list of N strings a particle; with `average` one list, written together."""
        if (packed := self.packed_pass_for(max_new_tokens)) is not None:
            ids = send(texts.source_ids, self.device)
            tokens = packed.generate(ids, texts.source_mask, input_embeds, max_new_tokens, average)
        else:
            ids, mask = send_together([texts.source_ids, texts.source_mask], self.device)
            tokens = self.call("generate", ids, mask, input_embeds, max_new_tokens, self.synced, average)
            tokens = tokens.view(-1, len(ids), tokens.shape[-1])
        written = tokens[:1] if average else tokens  # on average all particles write the same
        return [self.tokenizer.batch_decode(rows, skip_special_tokens=True) for rows in written]

    @torch.no_grad()
    def rank_each(
        self, texts: Texts, prompts: Sequence[Float[Tensor, "m _P D"]], candidates: Sequence[Int[Tensor, "_C _U"]]
    ) -> list[Float[Tensor, "m _C"]]:
        """Return the log-likelihood of each text's own candidates under its own prompts, in one pass where ours applies."""
        if (packed := self.packed_pass_for(max(of_text.shape[1] for of_text in candidates))) is None:
            return super().rank_each(texts, prompts, candidates)
        return packed.rank_each(send(texts.source_ids, self.device), texts.source_mask, prompts, candidates)

    @torch.no_grad()
    def generate_each(self, texts: Texts, prompts: Sequence[Float[Tensor, "m _P D"]], max_new_tokens: Sequence[int]) -> list[str]:
        """Return what each text's own prompts write together, in one pass where ours applies: for targets that are not long."""
        short = [row for row, limit in enumerate(max_new_tokens) if self.packed_pass_for(limit) is not None]
        found: dict[int, str] = {}
        if short:
            assert self.packed is not None
            some = texts.select(short)
            ids, mask = send(some.source_ids, self.device), some.source_mask
            tokens = self.packed.generate_each(ids, mask, [prompts[n] for n in short], [max_new_tokens[n] for n in short])
            found |= dict(zip(short, self.tokenizer.batch_decode(tokens, skip_special_tokens=True), strict=True))
        if rest := [row for row in range(len(prompts)) if row not in found]:
            own = [prompts[row] for row in rest], [max_new_tokens[row] for row in rest]
            found |= dict(zip(rest, super().generate_each(texts.select(rest), *own), strict=True))
        return [found[row] for row in range(len(prompts))]

    @torch.no_grad()
    def vocabulary_rows(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "n D"]:
        """Return rows of the word-embedding table in float32 (through the forward, so that a partitioned table is gathered)."""
        rows: Tensor = self.call("embed", ids.to(self.device))
        return rows.float()
