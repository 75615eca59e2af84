"""Removable insertion points on the stock modules: a method changes the backbone from outside and leaves it without trace.

Every insertion is a forward hook that holds the method's own tensors only. The backbone's weights are never read, so an insertion
works alike while they are whole, partitioned by DeepSpeed (blocks as leaves) or by FSDP2, and in scoring, ranking and generation
with a cache. A family's own pass that does not call those modules applies `changes` at the same places; one that calls them with
tokens in another order says in `rows` how they are put into rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bpt_dist.errors import ConfigError

Change = Callable[[Tensor, Tensor], Tensor]  # input x and output y of a module -> what takes the place of y


class Site(NamedTuple):
    """A module of the backbone that something is inserted at."""

    name: str
    module: nn.Module

    @property
    def stack(self) -> str:
        """`encoder` or `decoder`; `model` where there is one stack; or `lm_head`."""
        return self.name.split(".")[0]

    @property
    def block(self) -> int:
        """Number of the block within its stack, from 0; only a module of a block has one."""
        return int(self.name.split(".")[2])

    @property
    def key(self) -> str:
        """The name as torch accepts it for a parameter: without dots."""
        return self.name.replace(".", "/")


MakeChange = Callable[[Site], Change]
Observe = Callable[[Float[Tensor, "rows L D"], Int[Tensor, "rows L"]], None]
FOR_EACH = "bpt_dist_each"  # the mark of `each_token`
RUN = "run"  # the argument by which a family's own pass gives its computation to a module


def each_token(change: Change) -> Change:
    """Mark a change whose value at a token depends on x and y at that token alone, and is the same for all texts.

    The packed pass then hands over its tokens as one row [1, tokens, ...]. Other changes get the rows of the stock pass, with zeros
    where a text is padded, which costs two copies.
    """
    setattr(change, FOR_EACH, True)
    return change


def is_for_each_token(change: Change) -> bool:
    """Return whether a change was marked so."""
    return getattr(change, FOR_EACH, False)


class Rows(Protocol):
    """The places of packed tokens in the rows of the stock pass."""

    def changed(self, change: Change, x: Float[Tensor, "*tokens i"], y: Float[Tensor, "*tokens o"]) -> Float[Tensor, "*tokens o"]:
        """Return what a change makes of packed tokens."""


class InsertionPoints:
    """The backbone as methods may change it; every function returns how many modules matched and raises ConfigError for none.

    Rows of x and y are particle-major [m*N, ...] in both stacks, as `of_rows` lays out what belongs to each text.
    """

    name: str
    # What the family calls its sub-layers, and its linear layers where several answer to one name, or one to another.
    sublayers: ClassVar[Mapping[str, str]] = {
        "self_attention": "SelfAttention", "cross_attention": "EncDecAttention", "feed_forward": "DenseReluDense",
    }  # fmt: skip
    linears: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    def __init__(self) -> None:
        self._handles: list[Any] = []
        # What is inserted, for a pass that does not call the modules: the changes of a module, and who observes the encoder.
        self.changes: dict[nn.Module, list[Change]] = {}
        self.observers: list[Observe] = []
        self.rows: Rows | None = None  # while a family's own pass calls the modules with packed tokens

    @property
    def model(self) -> nn.Module:
        """The stock model."""
        raise NotImplementedError

    def wrap_sublayer(self, make: MakeChange, where: Sequence[str], *, stack: str | None = None, residual: bool = False) -> int:
        """Replace the output of each sub-layer of `where` (self_attention, cross_attention, feed_forward) by `make(place)(x, y)`.

        x is normed, y without the residual; with `residual`, x is the hidden state before the norm and y after the residual.
        `stack` picks one of encoder and decoder.
        """
        wanted = {self.sublayers.get(kind, kind) for kind in where}

        def matches(place: Site) -> str | None:
            of_stack = stack is None or place.stack == stack
            last = place.name.rsplit(".", 1)[-1]
            inner = {name for name, _ in place.module.named_children()} if residual else {last}
            return next(iter(wanted & inner), None) if of_stack else None

        return self._attach(make, matches, wanted)

    def wrap_linear(self, make: MakeChange, which: Sequence[str] | None) -> int:
        """Replace the output of each linear layer called as in `which` (q, k, v, o, wi, wo, lm_head; None for all)."""
        wanted = {own for name in which or () for own in self.linears.get(name, (name,))}

        def matches(place: Site) -> str | None:
            last = place.name.rsplit(".", 1)[-1]
            return last if isinstance(place.module, nn.Linear) and (which is None or last in wanted) else None

        return self._attach(make, matches, wanted)

    def wrap_norm(self, make: MakeChange) -> int:
        """Replace the output of every layer norm over the width of the model, in the blocks and after each stack."""
        return self._attach(make, lambda place: "norm" if self.is_norm(place.name) else None, {"norm"})

    def is_norm(self, name: str) -> bool:
        """Return whether a module of that name is a layer norm over the width of the model."""
        return name.endswith("layer_norm")

    def is_last_norm(self, name: str) -> bool:
        """Return whether a module of that name is the layer norm after a stack."""
        return name.endswith("final_layer_norm")

    def after_encoder(self, observe: Observe) -> None:
        """Call `observe` with the encoder's last hidden states and attention mask, once a pass and before the decoder."""

        def hook(_module: nn.Module, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
            observe(output[0], kwargs["attention_mask"])

        self._handles.append(self.model.get_submodule("encoder").register_forward_hook(hook, with_kwargs=True))
        self.observers.append(observe)

    @property
    def changes_texts_alike(self) -> bool:
        """Return whether all that is inserted depends on a token alone, so that a prompt has the same states before every text."""
        return all(is_for_each_token(change) for changes in self.changes.values() for change in changes)

    def detach(self) -> None:
        """Remove everything the insertion points added; the backbone is the stock one again, bit for bit."""
        while self._handles:
            self._handles.pop().remove()
        self.changes.clear()
        self.observers.clear()

    def _attach(self, make: MakeChange, matches: Callable[[Site], str | None], wanted: set[str]) -> int:
        places = [Site(name, module) for name, module in self.model.named_modules()]
        matching = [(place, matched) for place in places if (matched := matches(place)) is not None]
        missing = wanted - {matched for _, matched in matching}
        if missing or not matching:
            names = sorted({name for place in places if (name := place.name.rsplit(".", 1)[-1]) and not name.isdigit()})
            raise ConfigError(
                f"{self.name}: no layer of this backbone matches {', '.join(sorted(missing))}; its layers are called "
                f"{', '.join(names)}"
            )
        for place, _ in matching:
            change = make(place)
            self._handles.append(place.module.register_forward_hook(self._hook(change), with_kwargs=True))
            self.changes.setdefault(place.module, []).append(change)
        return len(matching)

    def _hook(self, change: Change) -> Callable[[nn.Module, Any, Any, Any], Any]:
        def hook(_module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
            if RUN in kwargs:  # our own pass has applied the change already
                return output
            x, is_many = args[0] if args else kwargs["hidden_states"], isinstance(output, tuple)
            y = output[0] if is_many else output
            y = change(x, y) if self.rows is None else self.rows.changed(change, x, y)
            return (y, *output[1:]) if is_many else y

        return hook


def of_rows(values: Float[Tensor, "N ..."], num_rows: int) -> Float[Tensor, "rows ..."]:
    """Return the value of each text for every row of a pass: every particle sees the texts in their order."""
    return values if len(values) == num_rows else values.repeat(num_rows // len(values), *[1] * (values.dim() - 1))


def rms_normalised(states: Float[Tensor, "*rows D"], epsilon: float) -> Float[Tensor, "*rows D"]:
    """Return what such a layer norm multiplies by its gain: no mean is subtracted (Zhang & Sennrich 2019), float32 throughout."""
    states = states.to(torch.float32)
    return states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + epsilon)
