"""How attention is computed in the packed pass: two ways with the same result, and which is faster on this machine."""

from __future__ import annotations

import json
import logging
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

log = logging.getLogger(__name__)
Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# Sequences, heads, positions and head width of the probe: a text of middling length with its prompt.
PROBED = (4, 8, 256, 64)
REPETITIONS = 5
# The expected way is left only for a clear gain: a choice by noise would change the last bits of a run from start to start.
CLEARLY = 1.25


def plain_attention(
    q: Float[Tensor, "r H S d"], k: Float[Tensor, "r H K d"], v: Float[Tensor, "r H K d"], bias: Float[Tensor, "#r #H S K"]
) -> Float[Tensor, "r H S d"]:
    """Return softmax(q k^T + bias) v by matrix products; who wants scores divided by sqrt(d) divides the queries."""
    scores = q @ k.mT
    scores += bias
    return scores.softmax(-1) @ v


def sdpa_attention(
    q: Float[Tensor, "r H S d"], k: Float[Tensor, "r H K d"], v: Float[Tensor, "r H K d"], bias: Float[Tensor, "#r #H S K"]
) -> Float[Tensor, "r H S d"]:
    """Return the same by torch's fused kernel."""
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)


ATTENTIONS: dict[str, Attention] = {"sdpa": sdpa_attention, "eager": plain_attention}


def default_attention(device: torch.device, dtype: torch.dtype) -> str:
    """Return what is usually faster: torch's kernel, but for bf16 on a CPU, where its products are plain loops."""
    return "eager" if device.type == "cpu" and dtype == torch.bfloat16 else "sdpa"


def measured_attention(device: torch.device, dtype: torch.dtype, cache: Path) -> str:
    """Return which way this machine computes faster, from `cache` where it was measured before (about 0.3 s otherwise)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    key = f"{name} | {str(dtype).removeprefix('torch.')} | {torch.get_num_threads()} thread(s) | torch {torch.__version__}"
    file = cache / "attention.json"
    known = _read(file)
    if known.get(key) in ATTENTIONS:
        return known[key]
    usual = default_attention(device, dtype)
    other = next(kind for kind in ATTENTIONS if kind != usual)
    seconds = _seconds(device, dtype)
    known[key] = other if seconds[usual] > CLEARLY * seconds[other] else usual
    _write(file, known)
    return known[key]


def _read(file: Path) -> dict[str, str]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(file: Path, known: dict[str, str]) -> None:
    """Keep what was measured, if that is possible; several processes may do so at once, each by a file of its own."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=f"{file.name}.", delete=False) as own:
            own.write(json.dumps(known, indent=2, sort_keys=True))
        Path(own.name).replace(file)
    except OSError as error:
        log.info("%s: cannot be written (%s); attention is measured again at the next start", file, error)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _seconds(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Return the best time of each way, forward and backward, taken in turns."""
    num_rows, num_heads, length, width = PROBED
    q, k, v = (torch.ones(num_rows, num_heads, length, width, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    bias = torch.zeros(1, num_heads, length, length, device=device, dtype=dtype)
    best = dict.fromkeys(ATTENTIONS, float("inf"))
    for _ in range(REPETITIONS):
        for kind, attention in ATTENTIONS.items():
            began = time.perf_counter()
            attention(q, k, v, bias).sum().backward()
            if q.grad is not None:
                float(q.grad.flatten()[0])  # waits for a GPU
            best[kind] = min(best[kind], time.perf_counter() - began)
    return best
