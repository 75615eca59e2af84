"""A frozen decoder-only model: the family's `Backbone`, and the stock pass through transformers' modules.

One causal sequence holds prompt, text and target. Word embeddings come from the model's own module, which multiplies them where the
family does so (Gemma); prompts are put before the result and are not multiplied. Everything a rank does goes through ONE forward of
`PromptedDecoder`, so that a partitioned model gathers and releases its weights in the same places on every rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GenerationConfig

from bpt_dist.backbones.attention import ATTENTIONS
from bpt_dist.backbones.base import PASS_FLOPS, Backbone, Forward, InputEmbeds, Texts, average_distributions, end_tokens
from bpt_dist.backbones.decoder.config import export_facts, rotates_by_length
from bpt_dist.backbones.decoder.mixed import MixedDecoder
from bpt_dist.backbones.decoder.packed import PackedDecoder, Scored, logits_of
from bpt_dist.backbones.decoder.reading import let_read
from bpt_dist.backbones.decoder.results import forward_of, forward_of_stock
from bpt_dist.backbones.prefixes import Prefixes
from bpt_dist.backbones.transfer import send, send_together
from bpt_dist.objective import IGNORED, Reduction
from bpt_dist.tasks.text_to_text import TextForm

NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
LAST_NORM = "model.norm"


class PromptedDecoder(nn.Module):
    """A decoder-only model whose inputs a method may extend; log-likelihood, ranking and generation in one forward.

    Rows of the results are particle-major [m*N, ...]: a partitioned module must not return views, so callers cut them.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, task: str, *args: Any, **kwargs: Any) -> Any:
        """Run `log_likelihood`, `rank`, `generate` or `embed`, or a method of our own pass (`packed`)."""
        run: dict[str, Callable[..., Any]] = {
            "log_likelihood": self._log_likelihood,
            "rank": self._rank,
            "generate": self._generate,
            "embed": self.model.model.embed_tokens,
            "packed": lambda method, *args: method(*args),
        }
        return run[task](*args, **kwargs)

    def _log_likelihood(
        self, ids: Tensor, mask: Tensor, target_ids: Tensor, input_embeds: InputEmbeds
    ) -> tuple[Float[Tensor, "rows U V"], Float[Tensor, "rows U D"], Float[Tensor, "rows S D"]]:
        """Return logits and last states at the positions that predict the targets, and the last states of all positions.

        Rows are padded on the right, where nothing that is read in one direction sees it.
        """
        embed = self.model.model.embed_tokens
        inputs = input_embeds(embed(ids))
        behind = embed(target_ids.clamp_min(0)).expand(len(inputs), -1, -1, -1)
        length, num_targets = inputs.shape[2], target_ids.shape[1]
        starts = mask.sum(1, keepdim=True) + length - ids.shape[1]
        columns = torch.arange(length + num_targets - 1, device=ids.device)
        index = torch.where(columns < starts, columns, columns - starts + length).clamp(max=length + num_targets - 1)
        rows = _pick(torch.cat([inputs, behind], dim=2), index).flatten(0, 1)
        states = self.model.model(inputs_embeds=rows.to(self.model.dtype), use_cache=False).last_hidden_state
        places = (starts - 1 + torch.arange(num_targets, device=ids.device)).clamp(max=len(columns) - 1)
        of_targets = _pick(states.unflatten(0, (len(inputs), -1)), places).flatten(0, 1)
        return logits_of(self.model, of_targets), of_targets, states

    def _padded_left(
        self, ids: Tensor, mask: Tensor, input_embeds: InputEmbeds
    ) -> tuple[Float[Tensor, "rows L D"], Int[Tensor, "rows L"]]:
        """Return prompts and texts with padding before them, and the mask: what comes next is then next in every row."""
        inputs = input_embeds(self.model.model.embed_tokens(ids))
        missing = (ids.shape[1] - mask.sum(1, keepdim=True)).long()
        columns = torch.arange(inputs.shape[2], device=ids.device) - missing
        rows = _pick(inputs, columns.clamp_min(0)).flatten(0, 1).to(self.model.dtype)
        return rows, (columns >= 0).long().repeat(len(inputs), 1)

    def _rank(
        self, ids: Tensor, mask: Tensor, candidates: Int[Tensor, "C U"], input_embeds: InputEmbeds
    ) -> Float[Tensor, "rows C"]:
        """Return the log-likelihood (summed over tokens) of every candidate for every text; the source is read once."""
        inputs, seen = self._padded_left(ids, mask, input_embeds)
        positions = (seen.cumsum(1) - 1).clamp_min(0)
        read = self.model.model(inputs_embeds=inputs, attention_mask=seen, position_ids=positions, use_cache=True)
        first = logits_of(self.model, read.last_hidden_state[:, -1:]).log_softmax(-1)
        columns = []
        for candidate in candidates:
            tokens = candidate[candidate != IGNORED]
            logs, num_more = first, len(tokens) - 1
            if num_more:
                states = self.model.model(
                    inputs_embeds=self.model.model.embed_tokens(tokens[:-1]).expand(len(inputs), -1, -1),
                    attention_mask=torch.cat([seen, seen.new_ones(len(seen), num_more)], dim=1),
                    position_ids=positions[:, -1:] + 1 + torch.arange(num_more, device=ids.device),
                    past_key_values=copy.deepcopy(read.past_key_values),  # what is written behind it belongs to one candidate
                    use_cache=True,
                ).last_hidden_state
                logs = torch.cat([first, logits_of(self.model, states).log_softmax(-1)], dim=1)
            columns.append(logs[:, torch.arange(len(tokens)), tokens].sum(1))
        return torch.stack(columns, dim=-1)

    def _generate(
        self, ids: Tensor, mask: Tensor, input_embeds: InputEmbeds, max_new_tokens: int, synced: bool, average: bool
    ) -> Int[Tensor, "rows U"]:
        """Decode greedily; `synced` keeps partitioned ranks in lock-step until the last of them is done.

        With `average` the particles of a text write one target together, by the mean of their next-token distributions.
        """
        inputs, seen = self._padded_left(ids, mask, input_embeds)
        num_particles = len(inputs) // len(ids)
        processors = [lambda _written, logits: average_distributions(logits, num_particles)] if average else []
        tokens: Tensor = self.model.generate(
            inputs_embeds=inputs,
            attention_mask=seen,
            max_new_tokens=max_new_tokens,
            synced_gpus=synced,
            logits_processor=processors,
        )
        return tokens


def _pick(rows: Float[Tensor, "m N L D"], columns: Int[Tensor, "N K"]) -> Float[Tensor, "m N K D"]:
    """Return the named columns of each text's rows."""
    return rows.gather(2, columns[None, ..., None].expand(len(rows), -1, -1, rows.shape[-1]))


class DecoderBackbone(Backbone):
    """A checkpoint of a decoder-only family."""

    core: PromptedDecoder
    task_type = "CAUSAL_LM"
    packs_partitioned = True
    packs_recomputed = True
    sublayers: ClassVar[Mapping[str, str]] = {"self_attention": "self_attn", "feed_forward": "mlp"}
    linears: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "q": ("q_proj",), "k": ("k_proj",), "v": ("v_proj",), "o": ("o_proj",), "wi": ("gate_proj", "up_proj"),
        "wo": ("down_proj",),
    }  # fmt: skip

    def __init__(
        self, model: Any, tokenizer: Any, *, start: int | None, name: str, path: str, identity: str, revision: str | None = None
    ) -> None:
        core = PromptedDecoder(model.requires_grad_(False).eval())
        let_read(model)  # before anything wraps a block's `forward`: partitioning, or running it again in the backward pass
        # The settings of the decoding this project measures with; they replace the checkpoint's.
        model.generation_config = GenerationConfig(
            num_beams=1, do_sample=False, pad_token_id=model.config.pad_token_id, eos_token_id=end_tokens(model.config)
        )
        super().__init__(core, tokenizer, name=name, path=path, identity=identity, revision=revision)
        self.text_form = TextForm(continues=True, start=start)
        self.max_positions = int(model.config.max_position_embeddings)
        self.packed: PackedDecoder | None = None  # our own pass, where it is allowed

    @property
    def model(self) -> Any:
        """The stock transformers model; partitioned weights are empty outside a forward."""
        return self.core.model

    @property
    def facts(self) -> dict[str, Any]:
        """The configuration as transformers writes it, with the sizes under the names of all families."""
        return export_facts(self.model.config)

    @property
    def width(self) -> int:
        """Model width D."""
        return int(self.model.config.hidden_size)

    @property
    def vocabulary_size(self) -> int:
        """Rows of the word-embedding table."""
        return int(self.model.config.vocab_size)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def block_class(self) -> type[nn.Module]:
        """The class of the layers."""
        return type(self.model.model.layers[0])

    @property
    def word_embeddings(self) -> nn.Module:
        """The module that embeds tokens, and multiplies the result in some families."""
        table: nn.Module = self.model.model.embed_tokens
        return table

    @property
    def num_blocks(self) -> dict[str, int]:
        """How many blocks the one stack has."""
        return {"model": len(self.model.model.layers)}

    def is_norm(self, name: str) -> bool:
        """Return whether a module of that name is a layer norm over the width of the model; those of single heads are not."""
        return name == LAST_NORM or name.rsplit(".", 1)[-1] in NORMS

    def is_last_norm(self, name: str) -> bool:
        """Return whether a module of that name is the norm after the last layer."""
        return name == LAST_NORM

    def matmul_weights(self) -> tuple[int, int]:
        """Return the weights of linear layers that a source token and a target token pass."""
        layers: Any = self.model.model.layers
        linears = [module for module in layers.modules() if isinstance(module, nn.Linear)]
        source = sum(module.in_features * module.out_features for module in linears)
        return source, source + self.width * self.vocabulary_size

    def use_packed_pass(self, attention: str) -> None:
        """Read texts by our own pass wherever it applies. `attention` is `sdpa` or `eager`."""
        self.attention, self.packed = attention, PackedDecoder(self.model, ATTENTIONS[attention], self)

    def use_stock_pass(self) -> None:
        """Read texts by transformers' modules, padded."""
        self.attention = self.packed = None

    def padding_overhead(self, num_targets: int) -> float:
        """Return how many tokens cost as much as one more pass where a pass pads its texts; 0 where it does not."""
        return 0.0 if self.packed_pass() is not None else PASS_FLOPS[self.device.type] / self.width**2

    @property
    def reads_prompts_once(self) -> bool:
        """Whether our own pass reads the texts, and nothing inserted gives a prompt other states before every text."""
        return self.packed_pass() is not None and self.changes_texts_alike

    def packed_pass(self) -> PackedDecoder | None:
        """Return our own pass where it applies: nothing is trained, and positions do not depend on what follows."""
        if self.packed is None or self.word_embeddings.weight.requires_grad:
            return None
        return None if rotates_by_length(self.model.config) else self.packed

    def log_likelihood(self, texts: Any, input_embeds: InputEmbeds, reduction: Reduction, *, states: bool = False) -> Forward:
        """Return the log-likelihood [m, N] of the targets of `texts` (source_ids, source_mask, target_ids) under each particle."""
        given = texts.source_ids, texts.source_mask, texts.target_ids
        if (packed := self.packed_pass()) is not None:
            # Lengths stay on the host, also where a partitioned model would move what it is called with.
            score = partial(packed.score, send(given[0], self.device), *given[1:], input_embeds, states)
            scored = Scored(*self.call("packed", score))
            return forward_of(scored, given[2], reduction, given[0].shape[1] if states else None)
        ids, mask, targets = send_together(given, self.device)
        outputs = self.call("log_likelihood", ids, mask, targets, input_embeds)
        return forward_of_stock(outputs, targets, reduction, states=states)

    @torch.no_grad()
    def rank(self, texts: Any, candidates: Int[Tensor, "C U"], input_embeds: InputEmbeds) -> Float[Tensor, "m N C"]:
        """Return the log-likelihood, summed over tokens, of each candidate target (-100 pads) for each text."""
        if (packed := self.packed_pass()) is not None:
            ids = send(texts.source_ids, self.device)
            ranked: Tensor = self.call("packed", partial(packed.rank, ids, texts.source_mask, candidates, input_embeds))
            return ranked
        ids, mask, candidates = send_together([texts.source_ids, texts.source_mask, candidates], self.device)
        rows: Tensor = self.call("rank", ids, mask, candidates, input_embeds)
        return rows.view(-1, len(ids), len(candidates))

    @torch.no_grad()
    def generate(self, texts: Any, input_embeds: InputEmbeds, max_new_tokens: int, *, average: bool = False) -> list[list[str]]:
        """Return the greedily decoded targets, one list of N strings a particle; with `average` one list, written together."""
        packed, ids = self.packed_pass(), send(texts.source_ids, self.device)
        if packed is not None and not self.synced:  # ranks in step write as long as the slowest of them
            tokens = self.call("packed", partial(packed.generate, ids, texts.source_mask, input_embeds, max_new_tokens, average))
        else:
            mask = send(texts.source_mask, self.device)
            tokens = self.call("generate", ids, mask, input_embeds, max_new_tokens, self.synced, average)
            tokens = tokens.view(-1, len(ids), tokens.shape[-1])
        written = tokens[:1] if average else tokens  # on average all particles write the same
        return [self.tokenizer.batch_decode(rows, skip_special_tokens=True) for rows in written]

    def keep_prefixes(self, most_bytes: int) -> bool:
        """Keep keys and values of prompts from one pass of `rank_each` or `generate_each` to the next."""
        keeps = self.packed_pass() is not None
        self.prefixes = Prefixes(most_bytes) if keeps and most_bytes else None
        return keeps

    def _mixed(self, packed: PackedDecoder) -> MixedDecoder:
        """Return the pass of different prompts; ranks in step, and a model that is changed, read each prompt again."""
        keeps = self.partition is None and not self.synced and not self.changes
        return MixedDecoder(packed, self.prefixes if keeps else None)

    @torch.no_grad()
    def rank_each(
        self, texts: Texts, prompts: Sequence[Float[Tensor, "m _P D"]], candidates: Sequence[Int[Tensor, "_C _U"]]
    ) -> list[Float[Tensor, "m _C"]]:
        """Return the log-likelihood of each text's own candidates under its own prompts, in one pass where ours applies."""
        if (packed := self.packed_pass()) is None or not self.changes_texts_alike:
            return super().rank_each(texts, prompts, candidates)
        ids, mask = send(texts.source_ids, self.device), texts.source_mask  # lengths stay on the host
        ranked: list[Tensor] = self.call("packed", self._mixed(packed).rank, ids, mask, prompts, candidates)
        return ranked

    @torch.no_grad()
    def generate_each(self, texts: Texts, prompts: Sequence[Float[Tensor, "m _P D"]], max_new_tokens: Sequence[int]) -> list[str]:
        """Return what each text's own prompts write together, in one pass where ours applies."""
        packed = self.packed_pass()
        if packed is None or self.synced or not self.changes_texts_alike:
            return super().generate_each(texts, prompts, max_new_tokens)
        ids, mask = send(texts.source_ids, self.device), texts.source_mask  # lengths stay on the host
        tokens = self.call("packed", self._mixed(packed).generate, ids, mask, prompts, max_new_tokens)
        return list(self.tokenizer.batch_decode(tokens, skip_special_tokens=True))

    @torch.no_grad()
    def vocabulary_rows(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "n D"]:
        """Return word embeddings in float32 as they enter the model (through the forward, which gathers a partitioned table)."""
        rows: Tensor = self.call("embed", send(ids, self.device))
        return rows.float()
