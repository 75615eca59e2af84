"""A model without its weights, whatever its family: its sizes, and what a row costs, counted on torch's meta device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bpt_dist.backbones.base import DTYPES, Backbone
from bpt_dist.backbones.checkpoint import CONFIG, PLACES, Checkpoint, first_line
from bpt_dist.backbones.insertion import InsertionPoints
from bpt_dist.distributed.hub import REMEDY, reach_hub
from bpt_dist.errors import ConfigError

KEPT_WHOLE = 1000  # numbers of a tensor; ZeRO keeps smaller ones whole: `stage3_param_persistence_threshold` of our settings
Counted = tuple[int, int, int]  # FLOPs forward and backward, bytes kept


@dataclass(frozen=True)
class RowCost:
    """What a row of a pass costs: multiply-adds count two, bytes are those kept for the backward pass."""

    forward_flops: int
    backward_flops: int
    activation_bytes: int

    @property
    def flops(self) -> int:
        """Return the FLOPs of a training pass."""
        return self.forward_flops + self.backward_flops


NOTHING = RowCost(0, 0, 0)


@dataclass
class ModelShape(ABC):
    """A model of which only the configuration is known; `dtype` is that of weights and activations."""

    config: Any
    dtype: str = "fp32"
    noun: ClassVar[str] = "backbone"  # what a plan calls such a model
    lookups: ClassVar[int] = 1  # of word embeddings in a pass

    @property
    @abstractmethod
    def facts(self) -> Mapping[str, Any]:
        """The configuration as an export records it."""

    @property
    @abstractmethod
    def num_blocks(self) -> tuple[int, ...]:
        """The number of blocks of each stack."""

    @property
    @abstractmethod
    def feed_forward(self) -> tuple[int, int]:
        """The width of the model, and that inside its feed-forward layers."""

    @cached_property
    @abstractmethod
    def num_parameters(self) -> int:
        """How many numbers the checkpoint holds."""

    @property
    def item_bytes(self) -> int:
        """Bytes of one number."""
        return DTYPES[self.dtype].itemsize

    @property
    def weight_bytes(self) -> int:
        """Bytes of the whole model."""
        return self.num_parameters * self.item_bytes

    @property
    def gathered_bytes(self) -> int:
        """Bytes a partitioned model has gathered at once, at most: two blocks, and a third or the head."""
        blocks = (self.weight_bytes - self.table_bytes) // sum(self.num_blocks)
        return 2 * blocks + max(blocks, self.table_bytes)

    @property
    @abstractmethod
    def is_tied(self) -> bool:
        """Whether the head is the table of word embeddings."""

    @property
    def table_bytes(self) -> int:
        """Bytes of the word embeddings."""
        return int(self.config.vocab_size) * self.feed_forward[0] * self.item_bytes

    def gathered_in_a_pass(self, shard: str, forwards: int, *, prefetched: bool = True) -> int:
        """Return the bytes that a partitioned model makes whole in so many passes forward and one backward.

        Of word embeddings that are not the head, only rows are sent. `prefetched`: frozen, and ZeRO with our settings.
        """
        only_looked_up = 0 if self.is_tied else self.table_bytes
        gathered = self.weight_bytes - only_looked_up
        if shard != "deepspeed":
            last = self.item_bytes * sum(weight.numel() for weight in self.backbone().blocks[-1].parameters())
            return (forwards + 1) * gathered - (self.table_bytes + last if prefetched else 0)

        # With ZeRO the head, and the last block where there is room for more, are prefetched before they are released.
        def numbers(block: nn.Module) -> int:
            return sum(weight.numel() for weight in block.parameters() if weight.numel() > KEPT_WHOLE)

        blocks = list(map(numbers, self.backbone().blocks))
        again = self.table_bytes + self.item_bytes * (blocks[-1] if self.table_bytes < self.item_bytes * min(blocks) else 0)
        return (forwards + 1) * (gathered - self._kept_whole) - (again if prefetched else 0)

    @cached_property
    def _kept_whole(self) -> int:
        """Bytes of the tensors that ZeRO does not partition."""
        return self.item_bytes * sum(weight.numel() for weight in self.model().parameters() if weight.numel() <= KEPT_WHOLE)

    @abstractmethod
    def model(self) -> Any:
        """Return the model on the meta device."""

    @abstractmethod
    def backbone(self) -> Backbone:
        """Return a replacement for the model while a method creates its tensors: right shapes, no weights, nothing runs."""

    @abstractmethod
    def row_cost(
        self, num_prompt: int, num_source: int, num_target: int, *, trains_weights: bool = False, recomputed: bool = False
    ) -> RowCost:
        """Return the cost of one text with its prompt through the modules of the model.

        `recomputed` blocks are run forward twice, and all but one of each stack keep their input only.
        """

    def shared_costs(
        self, num_prompt: int, num_source: int, num_target: int, *, recomputed: bool = False
    ) -> tuple[RowCost, RowCost]:
        """Return the cost of a prompt, once a pass, and of a text that reads it; `recomputed` as in `row_cost`.

        By default a pass reads the prompt with each text.
        """
        return NOTHING, self.row_cost(num_prompt, num_source, num_target, recomputed=recomputed)

    @abstractmethod
    def prediction_bytes(self, num_prompt: int, num_source: int, num_nodes: int, attention: str, kind: str = "cpu") -> int:
        """Return the bytes that a pass without gradients has at once for each text of so many tokens behind its prompt.

        `num_nodes` is how many tokens of candidates are scored, `attention` is `sdpa` or `eager`, `kind` that of the device.
        """


def count_pass(model: nn.Module, logits_of: Callable[[], Tensor]) -> Counted:
    """Return what a forward pass that ends in logits, and its backward pass, take on the meta device."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # held, or its address would be used again
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = logits_of()
        forward = counter.get_total_flops()
        labels = torch.zeros(logits.shape[:-1], device=logits.device, dtype=torch.long)
        logits.float().log_softmax(-1).gather(-1, labels[..., None]).sum().backward()
    return forward, counter.get_total_flops() - forward, sum(storage.nbytes() for storage in kept.values())


class Pieces:
    """As much of a tokenizer as the start of a prompt asks for."""

    all_special_ids = (0, 1, 2)

    def __init__(self, num_pieces: int) -> None:
        self.num_pieces = num_pieces
        self.input_ids = [3]

    def __len__(self) -> int:
        return self.num_pieces

    def __call__(self, _text: str, **_options: Any) -> Pieces:
        """Return the pieces of a text: any."""
        return self


class Weightless:
    """Makes of a family's `Backbone` a replacement for the time a method creates its tensors: nothing ever runs through it."""

    def vocabulary_rows(self: Any, ids: Int[Tensor, " n"]) -> Float[Tensor, "n D"]:
        """Return noise in the place of rows of the word-embedding table."""
        return torch.randn(len(ids), self.width, generator=torch.Generator().manual_seed(0))


def begin_weightless(backbone: Any, core: nn.Module, num_pieces: int) -> None:
    """Give a `Weightless` backbone what a loaded one has; `core` is on the meta device."""
    backbone.core = backbone.call = core
    InsertionPoints.__init__(backbone)
    backbone.synced, backbone.packed = False, None
    backbone.tokenizer = Pieces(num_pieces)
    backbone.name = backbone.path = backbone.identity = backbone.tokenizer_hash = "plan"
    backbone.revision = None
    backbone.device = torch.device("cpu")  # where a method's own tensors live; the model is on the meta device


def known_config(
    path: str,
    revision: str | None,
    *,
    read: Callable[[Checkpoint], Any],
    published: Callable[[str], Any | None],
    ask_hub: bool,
) -> Any:
    """Return the configuration of a checkpoint: of a folder, of a hub id in the local cache, by its published name, or of the hub.

    `read` reads it from config.json, `published` knows it by its name. Raises ConfigError when none of them knows it.
    """
    checkpoint = Checkpoint(path, revision, local_only=True)
    try:
        try:
            return read(checkpoint)
        except (OSError, ValueError):
            if checkpoint.is_folder:
                raise
            found = published(path.rpartition("/")[2])
            if found is not None:
                return found
            if not ask_hub or not checkpoint.may_be_on_hub:
                raise
        reach_hub()
        return read(Checkpoint(path, revision))
    except (OSError, ValueError) as error:
        remedy = "give" if path.startswith(PLACES) else f"{REMEDY}, or give"
        raise ConfigError(
            f"backbone.path: the shape of {path!r} is not known here ({first_line(error)}); {remedy} a folder with {CONFIG}"
        ) from error
