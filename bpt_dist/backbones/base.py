"""The interface of a frozen model: what methods, training and evaluation may ask of any family, and what a pass returns."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bpt_dist.backbones.insertion import InsertionPoints
from bpt_dist.backbones.prefixes import Prefixes
from bpt_dist.backbones.shared_prompts import note_shared_prompts
from bpt_dist.backbones.transfer import send
from bpt_dist.errors import BackboneChanged
from bpt_dist.objective import Reduction
from bpt_dist.tasks.text_to_text import TextForm

InputEmbeds = Callable[[Tensor], Tensor]  # word embeddings [N, T, D] -> inputs [m, N, L, D], L >= T: what is added comes first
# FLOPs lost by the host time of a pass (1.1 ms a block) at the rate of one core or one GPU, over the 48 D^2 FLOPs that a token
# costs in a block, forward and backward.
PASS_FLOPS = {"cpu": 1.1e-3 * 5e10 / 48, "cuda": 1.1e-3 * 3e14 / 48}
AnyRank = Callable[[bool], bool]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Forward:
    """The results of one pass for m particles and N texts."""

    log_likelihood: Float[Tensor, "m N"]
    make_logits: Callable[[], Float[Tensor, "m N U V"]]
    # On request, the last hidden states of what is read [m, N, L, D] and of the target positions [m, N, U, D].
    states: tuple[Float[Tensor, "m N L D"], Float[Tensor, "m N U D"]] | None = None

    @property
    def logits(self) -> Float[Tensor, "m N U V"]:
        """Return the logits of every target position; where a target has none (padding) they mean nothing."""
        return self.make_logits()


@dataclass(frozen=True)
class Texts:
    """N source texts, padded; as much of a batch as ranking and generation read."""

    source_ids: Int[Tensor, "N T"]
    source_mask: Int[Tensor, "N T"]

    @classmethod
    def of(cls, ids: Sequence[Sequence[int]]) -> Texts:
        """Pad the ids of texts to the longest."""
        longest = max(map(len, ids))
        padded, mask = torch.zeros(len(ids), longest, dtype=torch.long), torch.zeros(len(ids), longest, dtype=torch.long)
        for row, of_text in enumerate(ids):
            padded[row, : len(of_text)], mask[row, : len(of_text)] = torch.as_tensor(of_text), 1
        return cls(padded, mask)

    def select(self, rows: Sequence[int]) -> Texts:
        """Return some of the texts, cut to the longest of them."""
        longest = int(self.source_mask[rows].sum(1).max())
        return Texts(self.source_ids[rows, :longest], self.source_mask[rows, :longest])


class Backbone(InsertionPoints, ABC):
    """A checkpoint with its tokenizer: frozen, in eval mode, never written to by a frozen-model method.

    A family (a folder beside `t5/`) fills in what is abstract here. Files outside `backbones/` know this class only.
    """

    # What the family is to others: how texts are written for it, and what PEFT calls the kind of model.
    text_form = TextForm()
    task_type = "SEQ_2_SEQ_LM"
    # The most positions of prompt, text and target together; None where positions have no end.
    max_positions: int | None = None
    # Whether the family's own pass also reads through a partitioned model, and through blocks that the backward pass runs again.
    packs_partitioned = False
    packs_recomputed = False

    core: nn.Module  # one forward for everything a rank computes, so that a partitioned model is gathered alike on every rank
    call: Callable[..., Any]  # `core`, or the partitioned module that training put in its place

    def __init__(
        self, core: nn.Module, tokenizer: Any, *, name: str, path: str, identity: str, revision: str | None = None
    ) -> None:
        super().__init__()
        self.core = self.call = core
        self.tokenizer, self.name, self.path, self.revision = tokenizer, name, path, revision
        self.identity = identity  # SHA-256 of the checkpoint's files: what a posterior belongs to, whatever the dtype
        self.tokenizer_hash = hash_tokenizer(tokenizer)
        self.synced = False  # whether generation must keep the ranks in step
        self.any_rank: AnyRank = bool  # whether something holds on any of the ranks that are kept in step (collective)
        self.device = torch.device("cpu")  # where texts have to be sent; with offloaded weights not where those are
        self.attention: str | None = None  # how the family's own pass computes attention, where it is used
        self.prefixes: Prefixes | None = None  # what passes of many prompts keep of them, where `keep_prefixes` could
        self.partition: Any = None  # how training partitioned the model, for a method that trains it
        self._loaded_hash = _hash_tensors(core)

    # --- what it is -------------------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def model(self) -> Any:
        """The stock model, whose parameters are the weights; partitioned ones are empty outside a forward."""

    @property
    @abstractmethod
    def facts(self) -> Mapping[str, Any]:
        """The configuration of the model as an export records it."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Model width D."""

    @property
    @abstractmethod
    def vocabulary_size(self) -> int:
        """Rows of the word-embedding table; a tokenizer may have fewer pieces."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Type of the weights."""

    @property
    @abstractmethod
    def block_class(self) -> type[nn.Module]:
        """The class of the blocks: the unit a partitioned model is gathered by."""

    @property
    @abstractmethod
    def word_embeddings(self) -> nn.Module:
        """The module that turns ids into the vectors that prompts are put before."""

    @property
    @abstractmethod
    def num_blocks(self) -> dict[str, int]:
        """How many blocks each stack has, by the stack's name."""

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks of all stacks."""
        return [module for module in self.model.modules() if isinstance(module, self.block_class)]

    # --- which pass reads the texts ---------------------------------------------------------------------------------------------

    @abstractmethod
    def use_packed_pass(self, attention: str) -> None:
        """Read texts by the family's own pass without padding wherever it applies; `attention` is `sdpa` or `eager`."""

    @abstractmethod
    def use_stock_pass(self) -> None:
        """Read texts by the modules of the model, padded."""

    @property
    def reads_prompts_once(self) -> bool:
        """Whether a pass reads a prompt once for all its texts, so that it costs the same however many they are."""
        return False

    def keep_prefixes(self, _most_bytes: int) -> bool:
        """Keep what `rank_each` and `generate_each` read of a prompt for their next passes; 0 bytes keep nothing.

        Return False, and keep nothing, where each prompt is read together with its text.
        """
        return False

    @abstractmethod
    def padding_overhead(self, num_targets: int) -> float:
        """Return how many tokens cost as much as one more pass where a pass pads its texts; 0 where it does not.

        `num_targets` is the length of the longest target.
        """

    # --- what it computes -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def log_likelihood(self, texts: Any, input_embeds: InputEmbeds, reduction: Reduction, *, states: bool = False) -> Forward:
        """Return the log-likelihood [m, N] of the targets of `texts` (source_ids, source_mask, target_ids) under each particle."""

    @abstractmethod
    def rank(self, texts: Any, candidates: Int[Tensor, "C U"], input_embeds: InputEmbeds) -> Float[Tensor, "m N C"]:
        """Return the log-likelihood, summed over tokens, of each candidate target (-100 pads) for each text."""

    @abstractmethod
    def generate(self, texts: Any, input_embeds: InputEmbeds, max_new_tokens: int, *, average: bool = False) -> list[list[str]]:
        """Return the greedily decoded targets, one list of N strings a particle.

        With `average` there is one list: each next token is the likeliest under the mean distribution of all particles.
        """

    def rank_each(
        self, texts: Texts, prompts: Sequence[Float[Tensor, "m _P D"]], candidates: Sequence[Int[Tensor, "_C _U"]]
    ) -> list[Float[Tensor, "m _C"]]:
        """Return what `rank` returns, where each text has m prompts and candidates of its own; lengths and counts may differ.

        There is one pass for each length of prompts and each list of candidates; other prompts of that length share it, and texts
        with the very same tensor of prompts share its reading where a family reads prompts once. A family may do better.
        """
        found: dict[int, Tensor] = {}
        contents = {id(of_text): str(of_text.tolist()) for of_text in candidates}
        for rows in places_of_equal([(len(p[0]), contents[id(c)]) for p, c in zip(prompts, candidates, strict=True)]):
            ranked = self.rank(texts.select(rows), candidates[rows[0]], _before_each([prompts[row] for row in rows]))
            found |= dict(zip(rows, ranked.unbind(1), strict=True))
        return [found[row] for row in range(len(prompts))]

    def generate_each(self, texts: Texts, prompts: Sequence[Float[Tensor, "m _P D"]], max_new_tokens: Sequence[int]) -> list[str]:
        """Return the target of each text, written together by its m prompts, of at most so many tokens of its own.

        There is one pass for each length of prompts and each limit, as in `rank_each`.
        """
        found: dict[int, str] = {}
        for rows in places_of_equal([(len(p[0]), limit) for p, limit in zip(prompts, max_new_tokens, strict=True)]):
            own, limit = [prompts[row] for row in rows], max_new_tokens[rows[0]]
            written = self.generate(texts.select(rows), _before_each(own), limit, average=len(own[0]) > 1)
            found |= dict(zip(rows, written[0], strict=True))
        return [found[row] for row in range(len(prompts))]

    @abstractmethod
    def vocabulary_rows(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "n D"]:
        """Return rows of the word-embedding table in float32."""

    def matmul_weights(self) -> tuple[int, int] | None:
        """Return how many weights multiply the state of a source token, and of a target token; None where nobody has counted."""
        return None

    # --- frozen -----------------------------------------------------------------------------------------------------------------

    def verify_unchanged(self) -> None:
        """Raise BackboneChanged unless every weight of this rank is as it was loaded, bit for bit."""
        if _hash_tensors(self.core) != self._loaded_hash:
            raise BackboneChanged(
                "backbone: a weight of the frozen model changed during training; fix the method, which may write to its own "
                "tensors only, and rerun in an empty output folder"
            )

    def remember_partition(self) -> None:
        """Take this rank's share of the weights as it is now as the state `verify_unchanged` compares with."""
        self._loaded_hash = _hash_tensors(self.core)


def places_of_equal(keys: Sequence[Any]) -> list[list[int]]:
    """Return the places of equal keys, together."""
    groups: dict[Any, list[int]] = {}
    for place, key in enumerate(keys):
        groups.setdefault(key, []).append(place)
    return list(groups.values())


def _before_each(prompts: Sequence[Float[Tensor, "m P D"]]) -> InputEmbeds:
    """Put before the n-th text the n-th prompt of each hypothesis, noting which texts have the very same ones."""
    places: dict[int, int] = {}
    choice = torch.tensor([places.setdefault(id(of_text), len(places)) for of_text in prompts])
    known = {id(of_text): of_text for of_text in prompts}
    different = torch.stack([known[key] for key in places], dim=1)

    def inputs(embeds: Float[Tensor, "N T D"]) -> Float[Tensor, "m N L D"]:
        shared = different.to(embeds)
        own = shared[:, send(choice, embeds.device)]
        joined = torch.cat([own, embeds[None].expand(len(shared), -1, -1, -1)], dim=2)
        return note_shared_prompts(joined, shared, choice)

    return inputs


def average_distributions(logits: Float[Tensor, "rows V"], num_particles: int) -> Float[Tensor, "rows V"]:
    """Return for each row the logarithm of the mean next-token distribution over the particles of its text.

    Rows are particle-major: those of one text are `rows / num_particles` apart, and all of them get the same mean.
    """
    of_particles = logits.float().log_softmax(-1).unflatten(0, (num_particles, -1))
    mean = of_particles.logsumexp(0) - math.log(num_particles)
    return mean.repeat(num_particles, 1)


def end_tokens(config: Any) -> list[int]:
    """Return the ids that end a generated text."""
    return config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]


def is_partitioned(weight: Tensor) -> bool:
    """Return whether a rank holds a shard of a weight only, ZeRO's or FSDP2's."""
    return hasattr(weight, "ds_tensor") or hasattr(weight, "to_local")


def local_shard(weight: Tensor) -> Tensor:
    """Return what this rank holds of a weight, not copied: all of it, or its shard where the model is partitioned."""
    part: Any = getattr(weight, "ds_tensor", weight).detach()  # ZeRO's; outside a forward the weight itself is empty
    return part.to_local() if hasattr(part, "to_local") else part  # FSDP2's


def _hash_tensors(model: nn.Module) -> str:
    """Return the SHA-256 over names and bytes of all parameters; of this rank's shard where the model is partitioned."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
        tensor = local_shard(parameter)
        digest.update(name.encode())
        digest.update(tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def hash_tokenizer(tokenizer: Any) -> str:
    """Return the SHA-256 over the vocabulary: two pieces swapped is another tokenizer."""
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(repr(pieces).encode()).hexdigest()
