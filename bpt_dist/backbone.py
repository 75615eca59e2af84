"""The frozen T5: the only place that knows T5's insides (and, with `mini.pretrain`, the only import of transformers).

Prompts enter as `inputs_embeds` with a mask of ones before the text's own mask. Everything a rank does with the T5 goes through ONE
forward of `PromptedT5`, so that a partitioned T5 gathers and releases its weights in the same places on every rank.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import cached_file, logging

from bpt_dist.errors import ConfigError
from bpt_dist.forward import EncoderInputs, Forward
from bpt_dist.insertion import InsertionPoints
from bpt_dist.objective import IGNORED, Reduction, sequence_log_likelihood
from bpt_dist.packed import PackedT5
from bpt_dist.packed_attention import ATTENTIONS

# FLOPs lost by the host time of a pass (1.1 ms a block) at the rate of one core or one GPU, over the 48 D^2 FLOPs that a token
# costs in a block, forward and backward.
PASS_FLOPS = {"cpu": 1.1e-3 * 5e10 / 48, "cuda": 1.1e-3 * 3e14 / 48}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class PromptedT5(nn.Module):
    """T5 whose encoder inputs a method may extend; log-likelihood, ranking and generation in one forward.

    Rows of the results are particle-major [m*N, ...]: a partitioned module must not return views, so callers cut them.
    """

    def __init__(self, model: T5ForConditionalGeneration) -> None:
        super().__init__()
        self.model = model

    def forward(self, task: str, *args: Any, **kwargs: Any) -> Any:
        """Run `log_likelihood`, `rank`, `generate` or `embed`."""
        run: dict[str, Callable[..., Any]] = {
            "log_likelihood": self._log_likelihood,
            "rank": self._rank,
            "generate": self._generate,
            "embed": self.model.shared,
        }
        return run[task](*args, **kwargs)

    def _inputs(self, ids: Int[Tensor, "N T"], mask: Int[Tensor, "N T"], encoder_inputs: EncoderInputs) -> tuple[Tensor, Tensor]:
        """Return inputs [m*N, L, D] and their mask [m*N, L]."""
        inputs = encoder_inputs(self.model.shared(ids))
        num_particles, _, length, _ = inputs.shape
        ones = mask.new_ones(mask.shape[0], length - mask.shape[1])
        full_mask = torch.cat([ones, mask], dim=1).repeat(num_particles, 1)
        return inputs.flatten(0, 1).to(self.model.dtype), full_mask

    def _log_likelihood(
        self, ids: Tensor, mask: Tensor, target_ids: Tensor, encoder_inputs: EncoderInputs, reduction: Reduction, states: bool
    ) -> tuple[Tensor, ...]:
        """Return log-likelihoods [rows] and logits [rows, U, V]; with `states`, also the last states of encoder and decoder."""
        inputs, full_mask = self._inputs(ids, mask, encoder_inputs)
        targets = target_ids.repeat(len(inputs) // len(ids), 1)
        start = self.model._shift_right(targets)
        decoded: list[Tensor] = []
        # `output_hidden_states` would keep the states of all layers.
        handle = self.model.decoder.register_forward_hook(lambda _module, _args, output: decoded.append(output[0]))
        try:
            found = self.model(inputs_embeds=inputs, attention_mask=full_mask, decoder_input_ids=start, use_cache=False)
        finally:
            handle.remove()
        last = (found.encoder_last_hidden_state, *decoded) if states else ()
        return sequence_log_likelihood(found.logits, targets, reduction), found.logits, *last

    def _rank(
        self, ids: Tensor, mask: Tensor, candidates: Int[Tensor, "C U"], encoder_inputs: EncoderInputs
    ) -> Float[Tensor, "rows C"]:
        """Return the log-likelihood (summed over tokens) of every candidate for every text; the encoder runs once."""
        inputs, full_mask = self._inputs(ids, mask, encoder_inputs)
        encoded = BaseModelOutput(last_hidden_state=self.model.encoder(inputs_embeds=inputs, attention_mask=full_mask)[0])
        columns = []
        for candidate in candidates:
            targets = candidate[candidate != IGNORED].expand(len(inputs), -1)
            start = self.model._shift_right(targets)
            logits = self.model(encoder_outputs=encoded, attention_mask=full_mask, decoder_input_ids=start, use_cache=False).logits
            columns.append(sequence_log_likelihood(logits, targets, "token_sum"))
        return torch.stack(columns, dim=-1)

    def _generate(
        self, ids: Tensor, mask: Tensor, encoder_inputs: EncoderInputs, max_new_tokens: int, synced: bool
    ) -> Int[Tensor, "rows U"]:
        """Decode greedily; `synced` keeps partitioned ranks in lock-step until the last of them is done."""
        inputs, full_mask = self._inputs(ids, mask, encoder_inputs)
        generate: Any = self.model.generate  # type: ignore[misc]  # its signature is not that of a method
        tokens: Tensor = generate(
            inputs_embeds=inputs,
            attention_mask=full_mask,
            max_new_tokens=max_new_tokens,
            num_beams=1,
            do_sample=False,
            synced_gpus=synced,
        )
        return tokens


class Backbone(InsertionPoints):
    """A T5-family checkpoint with its tokenizer: frozen, in eval mode, never written to by a frozen-model method."""

    def __init__(
        self, model: T5ForConditionalGeneration, tokenizer: Any, *, name: str, path: str, identity: str, revision: str | None = None
    ) -> None:
        super().__init__()
        self.core = PromptedT5(model.requires_grad_(False).eval())
        self.tokenizer, self.name, self.path, self.revision = tokenizer, name, path, revision
        self.identity = identity  # SHA-256 of the checkpoint's files: what a posterior belongs to, whatever the dtype
        self.call: Callable[..., Any] = self.core  # the engine replaces this by the partitioned module
        self.synced = False
        self.device = torch.device("cpu")  # where texts have to be sent; with offloaded weights not where those are
        self.partition: Any = None  # how the engine partitioned the T5, for a method that trains it
        self.packed: PackedT5 | None = None  # our own pass, where the engine allows it
        self._loaded_hash = _hash_tensors(model)
        self.tokenizer_hash = _hash_tokenizer(tokenizer)

    @property
    def model(self) -> T5ForConditionalGeneration:
        """The stock transformers model; partitioned weights are empty outside a forward."""
        return self.core.model

    @property
    def width(self) -> int:
        """Model width D."""
        return int(self.model.config.d_model)

    @property
    def block_class(self) -> type[nn.Module]:
        """The class of T5's blocks: the unit a partitioned T5 is gathered by."""
        return type(self.model.encoder.block[0])

    @property
    def num_blocks(self) -> dict[str, int]:
        """How many blocks each stack has."""
        return {"encoder": len(self.model.encoder.block), "decoder": len(self.model.decoder.block)}

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks of encoder and decoder."""
        return [module for module in self.model.modules() if isinstance(module, self.block_class)]

    def pack(self, attention: str) -> None:
        """Read texts by our own pass wherever it applies; for a whole T5 only. `attention` is `sdpa` or `eager`."""
        self.packed = PackedT5(self.model, ATTENTIONS[attention])

    def padding_for(self, num_targets: int) -> float:
        """Return how many tokens cost as much as one more pass where a pass pads its texts; 0 where it does not.

        `num_targets` is the length of the longest target.
        """
        if self.packs(num_targets) is not None:
            return 0.0
        return PASS_FLOPS[self.device.type] / self.width**2

    def packs(self, num_targets: int) -> PackedT5 | None:
        """Return our own pass where it applies to targets of that length: the T5 is whole, not trained, nothing is inserted.

        It reads the encoder's states without keys and values, which pays while the decoder has fewer positions than a head is wide.
        """
        if self.packed is None or self._handles or num_targets > self.model.config.d_kv:
            return None
        return None if self.model.shared.weight.requires_grad else self.packed

    def log_likelihood(self, texts: Any, encoder_inputs: EncoderInputs, reduction: Reduction, *, states: bool = False) -> Forward:
        """Return the log-likelihood [m, N] of the targets of `texts` (source_ids, source_mask, target_ids) under each particle."""
        ids, mask, targets = (getattr(texts, name).to(self.device) for name in ("source_ids", "source_mask", "target_ids"))
        if (packed := self.packs(targets.shape[1])) is not None:
            return packed.log_likelihood(ids, mask, targets, encoder_inputs, reduction, states)
        log_likelihood, *rest = self.call("log_likelihood", ids, mask, targets, encoder_inputs, reduction, states)
        logits, *last = [tensor.view(-1, len(ids), *tensor.shape[1:]) for tensor in rest]
        return Forward(log_likelihood.view(-1, len(ids)), lambda: logits, (last[0], last[1]) if last else None)

    @torch.no_grad()
    def rank(self, texts: Any, candidates: Int[Tensor, "C U"], encoder_inputs: EncoderInputs) -> Float[Tensor, "m N C"]:
        """Return the log-likelihood, summed over tokens, of each candidate target (-100 pads) for each text."""
        ids, mask = texts.source_ids.to(self.device), texts.source_mask.to(self.device)
        if (packed := self.packs(candidates.shape[1])) is not None:
            return packed.rank(ids, mask, candidates.to(self.device), encoder_inputs)
        found: Tensor = self.call("rank", ids, mask, candidates.to(self.device), encoder_inputs)
        return found.view(-1, len(ids), len(candidates))

    @torch.no_grad()
    def generate(self, texts: Any, encoder_inputs: EncoderInputs, max_new_tokens: int) -> list[list[str]]:
        """Return the greedily decoded targets, one list of N strings a particle."""
        ids, mask = texts.source_ids.to(self.device), texts.source_mask.to(self.device)
        if (packed := self.packs(max_new_tokens)) is not None:
            tokens = packed.generate(ids, mask, encoder_inputs, max_new_tokens)
        else:
            tokens = self.call("generate", ids, mask, encoder_inputs, max_new_tokens, self.synced)
            tokens = tokens.view(-1, len(ids), tokens.shape[-1])
        return [self.tokenizer.batch_decode(rows, skip_special_tokens=True) for rows in tokens]

    @torch.no_grad()
    def vocabulary_rows(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "n D"]:
        """Return rows of the word-embedding table in float32 (through the forward, so that a partitioned table is gathered)."""
        rows: Tensor = self.call("embed", ids.to(self.device))
        return rows.float()

    def verify_unchanged(self) -> None:
        """Assert that no weight of this rank changed since loading; a frozen-model method must never write to the T5."""
        assert _hash_tensors(self.model) == self._loaded_hash, "the frozen T5 changed during training"

    def remember_partition(self) -> None:
        """Take the weights as they lie on this rank now (a partition) as the state `verify_unchanged` compares with."""
        self._loaded_hash = _hash_tensors(self.model)


def load(
    path: str, *, name: str | None = None, revision: str | None = None, dtype: str = "fp32", attention: str = "auto"
) -> Backbone:
    """Load a T5-family checkpoint from a folder or the hub: safetensors only, no remote code, tokenizer from the same place.

    `name` is what reports call it.

    Raises ConfigError when the folder is not such a checkpoint.
    """
    local = Path(path).is_dir()
    if not local and path.startswith((".", "/", "~")):
        raise ConfigError(f"backbone.path: there is no folder {path}; give one made by `save_pretrained`, or a hub id")
    if local and not (Path(path) / "config.json").is_file():
        raise ConfigError(f"backbone.path: {path} has no config.json; give a folder made by `save_pretrained` or a hub id")
    if local and not list(Path(path).glob("*.safetensors")):
        raise ConfigError(
            f"backbone.path: {path} has no .safetensors weights (pickled weights are never read); "
            "convert them with `model.save_pretrained(path)`"
        )
    logging.disable_progress_bar()  # transformers': a bar for weights that load in a moment, on every rank
    try:
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
        if config.model_type not in ("t5", "mt5"):
            raise ConfigError(f"backbone.path: {path} is a {config.model_type!r} model; this project prompts T5-family models only")
        model = T5ForConditionalGeneration.from_pretrained(
            path,
            revision=revision or "main",
            dtype=DTYPES[dtype],
            use_safetensors=True,
            attn_implementation=None if attention == "auto" else attention,
        )
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(
            f"backbone.path: cannot load {path!r}: {str(error).splitlines()[0]}; give a folder with config.json, "
            "model.safetensors and tokenizer files, or a hub id this machine can reach"
        ) from error
    _check_tokenizer(tokenizer, path, model.config.vocab_size)
    return Backbone(model, tokenizer, name=name or path, path=path, identity=_hash_files(path, revision), revision=revision)


def _check_tokenizer(tokenizer: Any, path: str, num_rows: int) -> None:
    # Without its files transformers makes an empty tokenizer, to which every text is a row of unknown pieces.
    if len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)) <= 1:
        raise ConfigError(f"backbone.path: {path} has no tokenizer with a vocabulary; put its tokenizer.json beside the weights")
    if len(tokenizer) > num_rows:
        raise ConfigError(
            f"backbone.path: the tokenizer in {path} has {len(tokenizer)} pieces, the model only {num_rows} rows; "
            "they do not belong together"
        )


def own_part(weight: Tensor) -> Tensor:
    """Return what this rank holds of a weight, not copied: all of it, or its part where the T5 is partitioned."""
    part: Any = getattr(weight, "ds_tensor", weight).detach()  # ZeRO's; outside a forward the weight itself is empty
    return part.to_local() if hasattr(part, "to_local") else part  # FSDP2's


def _hash_tensors(model: nn.Module) -> str:
    """Return the SHA-256 over names and bytes of all parameters; of this rank's partition where the T5 is partitioned."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
        tensor = own_part(parameter)
        digest.update(name.encode())
        digest.update(tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def _hash_files(path: str, revision: str | None) -> str:
    """Return the SHA-256 over the checkpoint's safetensors files, shards in the order of their names."""
    index = cached_file(path, "model.safetensors.index.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    names = sorted(set(json.loads(Path(index).read_text())["weight_map"].values())) if index else ["model.safetensors"]
    digest = hashlib.sha256()
    for name in names:
        file = cached_file(path, name, revision=revision)
        with open(str(file), "rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def _hash_tokenizer(tokenizer: Any) -> str:
    """Return the SHA-256 over the vocabulary: two pieces swapped is another tokenizer."""
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(repr(pieces).encode()).hexdigest()
