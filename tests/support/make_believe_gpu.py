"""A GPU that is not there: programs that use `cuda:0` run on the CPU, and what a real GPU would refuse or wait for is noted.

A tensor is on the make-believe GPU when its storage carries a tag. Inside `MakeBelieveGpu` a function mode answers for `.device`
and carries out moves (`to`, `cuda`, `cpu`, `pin_memory`, factories with `device=`); a dispatch mode sees every operator that is
left, of the backward pass too. It notes

- operators that mix devices as CUDA does not allow (`mismatches`),
- operators that start a kernel (`launches`; views and empty tensors start none, an operator counts as one launch),
- moments in which the host waits for the device (`waits`): reading a number, operators whose result has a size the host must know,
  and every copy between the devices but that of pinned memory which need not block: CUDA's other copies synchronise the stream.

Each is kept by the line that caused it. A new tensor of an operator without inputs belongs to no device until it meets a tensor
that does: formulas of torch make such tensors, and here they cannot know better. Nothing of the program is replaced.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bpt_dist

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
ON_GPU, PINNED, UNDECIDED = "gpu", "pinned", "undecided"  # what a storage may carry; one without a tag is on the CPU
PACKAGE, TORCH = str(Path(bpt_dist.__file__).parent), str(Path(torch.__file__).parent)
# Operators whose result has a size that only the device knows, or that hand a number to the host.
WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal", "bincount",
    "argwhere", "is_nonzero", "repeat_interleave",
}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}  # which accept indices on the CPU
# One kernel on a GPU where a CPU makes several operators of it.
FUSED = {
    torch.ops.aten._fused_rms_norm.default: torch.ops.aten._fused_rms_norm.default,
    torch.ops.aten._fused_rms_norm_backward.default: decomposition_table[torch.ops.aten._fused_rms_norm_backward.default],
}


@dataclass
class Notes:
    """What was noted since the last `forget`; all but `launches` by the line of the program that caused it."""

    launches: int = 0
    operators: Counter[str] = field(default_factory=Counter)  # launches by the name of the operator
    lines: Counter[str] = field(default_factory=Counter)  # launches by line
    waits: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)  # from pinned memory, which nobody waits for
    mismatches: Counter[str] = field(default_factory=Counter)


class MakeBelieveGpu:
    """The make-believe GPU; a context manager, which may be entered again. Tensors on it stay on it outside."""

    device = GPU

    def __init__(self) -> None:
        self.notes = Notes()
        self._quiet = False  # inside an operator that has been counted as a whole
        self._open = ExitStack()

    def __enter__(self) -> MakeBelieveGpu:
        self._open.enter_context(mock.patch.object(torch.cuda, "get_device_name", return_value="make-believe GPU"))
        self._open.enter_context(_Operators(self))
        self._open.enter_context(_Functions(self))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._open.close()

    def forget(self) -> Notes:
        """Return what was noted and begin again."""
        noted, self.notes = self.notes, Notes()
        return noted

    @contextmanager
    def counting(self) -> Iterator[Notes]:
        """Note what happens inside apart, for the numbers of one step; mismatches are noted in `notes` as well."""
        outside, self.notes = self.notes, Notes()
        inside = self.notes
        try:
            yield inside
        finally:
            outside.mismatches.update(inside.mismatches)
            self.notes = outside

    # --- what the modes report ----------------------------------------------------------------------------------------------------

    def launch(self, name: str) -> None:
        if not self._quiet:
            self.notes.launches += 1
            self.notes.operators[name] += 1
            self.notes.lines[cause()] += 1

    def wait(self, reason: str) -> None:
        self.notes.waits[f"{reason} at {cause()}"] += 1

    def refuse(self, problem: str) -> None:
        self.notes.mismatches[f"{problem} at {cause()}"] += 1

    def transfer(self, pinned: bool, to_gpu: bool) -> None:
        """Note a copy between the devices."""
        self.launch("copy between devices")
        if pinned:
            self.notes.copies[cause()] += 1
        else:
            self.wait("copy to the GPU" if to_gpu else "copy to the CPU")


def cause() -> str:
    """Return the two innermost lines of the package that led here, or else the innermost line outside torch and this file."""
    frame, found, other = sys._getframe(1), [], ""
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(PACKAGE):
            found.append(f"{file[len(PACKAGE) + 1 :]}:{frame.f_lineno}")
            if len(found) == 2:
                break
        elif not other and file != __file__ and not file.startswith(TORCH) and "/lib/python" not in file:
            other = f"{Path(file).name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(found) or other or "?"


# --- tags -------------------------------------------------------------------------------------------------------------------------


def place_of(tensor: Tensor) -> str | None:
    """Return the tag of a tensor's storage; storages keep their attributes as long as they live."""
    return getattr(tensor.untyped_storage(), "make_believe", None)


def is_on_gpu(tensor: Tensor) -> bool:
    """Return whether a tensor is on the make-believe GPU."""
    with torch._C.DisableTorchFunction():
        return place_of(tensor) == ON_GPU


def put(tensor: Tensor, place: str | None) -> Tensor:
    """Tag the storage of a tensor."""
    tensor.untyped_storage().make_believe = place  # type: ignore[attr-defined]
    return tensor


def tensors_of(*values: Any) -> list[Tensor]:
    """Return the tensors among nested values."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


# --- operators --------------------------------------------------------------------------------------------------------------------


class _Operators(TorchDispatchMode):
    """Sees every operator below autograd: checks where its tensors are, and tags what it makes."""

    def __init__(self, gpu: MakeBelieveGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            return self._run(func, args, kwargs or {})

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        name, inputs = func.overloadpacket.__name__, tensors_of(args, kwargs)
        places = self._decided(inputs)
        on_gpu = ON_GPU in places
        if name == "copy_":
            self._copy(args, places, kwargs)
            return func(*args, **kwargs)
        if on_gpu:
            self._check(name, args, inputs, places)
        result = func(*args, **kwargs)
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        made = [tensor for tensor in tensors_of(result) if tensor.untyped_storage()._cdata not in known]
        for tensor in made:
            put(tensor, ON_GPU if on_gpu else None if inputs else UNDECIDED)
        if on_gpu and (made or func._schema.is_mutable) and "empty" not in name:
            self.gpu.launch(name)
        return result

    def _decided(self, inputs: list[Tensor]) -> list[str | None]:
        """Return where inputs are; those that belong nowhere yet join the others."""
        places = [place_of(tensor) for tensor in inputs]
        if UNDECIDED in places and any(place != UNDECIDED for place in places):
            there = ON_GPU if ON_GPU in places else None
            for tensor, place in zip(inputs, places, strict=True):
                if place == UNDECIDED:
                    put(tensor, there)
            places = [there if place == UNDECIDED else place for place in places]
        return places

    def _copy(self, args: Any, places: list[str | None], kwargs: dict[str, Any]) -> None:
        to_gpu, from_gpu = places[0] == ON_GPU, places[1] == ON_GPU
        non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        if to_gpu != from_gpu:
            self.gpu.transfer(bool(non_blocking) and to_gpu and places[1] == PINNED, to_gpu)
        elif to_gpu:
            self.gpu.launch("copy_")

    def _check(self, name: str, args: Any, inputs: list[Tensor], places: list[str | None]) -> None:
        """Note what CUDA would refuse, and what the host would wait for."""
        elsewhere = [tensor for tensor, place in zip(inputs, places, strict=True) if place != ON_GPU]
        indexes = name in INDEXING and places[0] == ON_GPU
        if elsewhere and indexes:
            self.gpu.transfer(pinned=False, to_gpu=True)  # of the indices, or of a number that is written
        elif any(tensor.dim() for tensor in elsewhere) or (elsewhere and name.endswith("_") and places[0] != ON_GPU):
            self.gpu.refuse(f"{name}: tensors {[list(tensor.shape) for tensor in elsewhere]} are on the CPU, others on the GPU")
        masks = [tensor for tensor in tensors_of(args[1]) if tensor.dtype in (torch.bool, torch.uint8)] if indexes else []
        if name in WAITING or masks:
            self.gpu.wait("index by a mask" if masks else name)


# --- functions --------------------------------------------------------------------------------------------------------------------


class _Functions(TorchFunctionMode):
    """Answers for devices, and carries out what moves tensors or makes them on a device."""

    def __init__(self, gpu: MakeBelieveGpu) -> None:
        super().__init__()
        self.gpu = gpu
        tensor: Any = Tensor
        self.special = {
            tensor.device.__get__: lambda own: GPU if place_of(own) == ON_GPU else CPU,
            tensor.is_cuda.__get__: lambda own: place_of(own) == ON_GPU,
            tensor.is_cpu.__get__: lambda own: place_of(own) != ON_GPU,
            tensor.get_device: lambda own: 0 if place_of(own) == ON_GPU else -1,
            tensor.is_pinned: lambda own, *_: place_of(own) == PINNED,
            tensor.pin_memory: lambda own, *_: put(own.clone(), PINNED),
            tensor.cpu: lambda own, *_, **__: self._move(own, CPU, non_blocking=False),
            tensor.cuda: lambda own, *_, non_blocking=False, **__: self._move(own, GPU, non_blocking=non_blocking),
            tensor.to: self._to,
            tensor.numpy: self._numpy,
            tensor.__array__: self._numpy,
            tensor.tolist: self._tolist,
            tensor.__deepcopy__: self._deepcopy,
            tensor.backward: self._backward,
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.special:
            return self.special[func](*args, **kwargs)
        if func in FUSED or getattr(func, "default", None) in FUSED:
            return self._fused(getattr(func, "default", func), args, kwargs)
        device = kwargs.get("device")
        if device is None:
            result, device = func(*args, **kwargs), self._device_of(args, kwargs)
        elif torch.device(device).type == "meta":
            return func(*args, **kwargs)
        else:
            result = func(*args, **{**kwargs, "device": CPU})
        self._settle(func, args, kwargs, result, torch.device(device))
        return result

    def _device_of(self, args: Any, kwargs: Any) -> torch.device:
        return GPU if any(place_of(tensor) == ON_GPU for tensor in tensors_of(args, kwargs)) else CPU

    def _settle(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any, device: torch.device) -> None:
        """Tag what a function has made by itself, and note what that costs."""
        name, on_gpu = getattr(func, "__name__", ""), device.type == "cuda"
        if on_gpu and isinstance(kwargs.get("generator"), torch.Generator):
            self.gpu.refuse(f"{name}: a generator of the CPU draws on the GPU")
        for tensor in tensors_of(result):
            here = place_of(tensor) != ON_GPU and ("device" in kwargs or name == "new_tensor")
            if place_of(tensor) == UNDECIDED or (on_gpu and here):
                put(tensor, ON_GPU if on_gpu else None)
                if on_gpu and name in ("tensor", "as_tensor", "new_tensor"):
                    self.gpu.transfer(pinned=False, to_gpu=True)
                elif on_gpu and "empty" not in name:
                    self.gpu.launch(name)

    def _to(self, own: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        other = args[0] if args and isinstance(args[0], Tensor) else kwargs.pop("other", None)
        if other is not None:
            device: Any = GPU if place_of(other) == ON_GPU else CPU
            dtype, non_blocking = other.dtype, bool(kwargs.get("non_blocking", False))
        else:
            device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type == "meta":
            return own.to(device, dtype)
        found = own if dtype is None else own.to(dtype)
        found = found if device is None else self._move(found, device, non_blocking=non_blocking)
        return found.clone() if copy and found is own else found

    def _move(self, own: Tensor, device: torch.device, *, non_blocking: bool) -> Tensor:
        place = place_of(own)
        if (place == ON_GPU) == (device.type == "cuda"):
            return own
        self.gpu.transfer(non_blocking and place == PINNED, device.type == "cuda")
        moved: Tensor = _Moved.apply(own, ON_GPU if device.type == "cuda" else None)
        return moved

    def _numpy(self, own: Tensor, *args: Any, **kwargs: Any) -> Any:
        if place_of(own) == ON_GPU:
            self.gpu.refuse("numpy: the tensor is on the GPU")
        return own.numpy(*args, **kwargs)

    def _tolist(self, own: Tensor) -> Any:
        if place_of(own) == ON_GPU:
            self.gpu.wait("tolist")
        return own.tolist()

    def _deepcopy(self, own: Tensor, memo: dict[int, Any]) -> Tensor:
        copied: Tensor = own.__deepcopy__(memo)
        if place_of(own) == ON_GPU:
            self.gpu.launch("copy")
        return put(copied, place_of(own))

    def _backward(self, own: Tensor, gradient: Tensor | None = None, retain_graph: bool = False, **_: Any) -> None:
        seeds = (torch.ones_like(own) if gradient is None else gradient,)
        with self:  # a mode is off while it answers, and the backward pass runs functions of the program
            run: Any = torch.autograd.graph._engine_run_backward
            run((own,), seeds, bool(retain_graph), False, (), allow_unreachable=True, accumulate_grad=True)

    def _fused(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        places = {place_of(tensor) for tensor in tensors_of(args, kwargs)}
        if ON_GPU in places and len(places) > 1:
            self.gpu.refuse(f"{func.overloadpacket.__name__}: tensors are on the CPU and on the GPU")
        if ON_GPU in places:
            self.gpu.launch(func.overloadpacket.__name__)
        self.gpu._quiet = True
        try:
            return FUSED[func](*args, **kwargs)
        finally:
            self.gpu._quiet = False


class _Moved(torch.autograd.Function):
    """A copy on another device, whose gradient goes back."""

    @staticmethod
    def forward(context: Any, own: Tensor, place: str | None) -> Tensor:
        context.back = None if place == ON_GPU else ON_GPU
        return _copied(own, place)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _copied(gradients[0], context.back), None


def _copied(own: Tensor, place: str | None) -> Tensor:
    with torch.utils._python_dispatch._disable_current_modes():
        return put(own.clone(), place)
