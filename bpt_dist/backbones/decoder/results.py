"""From what a pass of a decoder-only model has computed to what every family returns."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bpt_dist.backbones.base import Forward
from bpt_dist.backbones.decoder.packed import Scored
from bpt_dist.backbones.transfer import send, send_together
from bpt_dist.objective import IGNORED, Reduction, sequence_log_likelihood


def forward_of(scored: Scored, targets: Int[Tensor, "N U"], reduction: Reduction, num_padded: int | None) -> Forward:
    """Return the results of our own pass; with `num_padded`, the length of the padded sources, also the last states.

    `targets` are read where they are, on the host best.
    """
    sums, device = scored.sums, scored.sums.device
    if reduction != "token_sum":
        sums = sums / send((targets != IGNORED).sum(1).clamp_min(1), device)

    def in_rows(values: Float[Tensor, "m targets W"]) -> Float[Tensor, "m N U W"]:
        full = values.new_zeros(len(values), *targets.shape, values.shape[-1])
        rows, columns = send_together((targets != IGNORED).nonzero(as_tuple=True), device)
        return full.index_put((torch.arange(len(values), device=device)[:, None], rows, columns), values)

    last = None
    if num_padded is not None:
        last = (_read_states(scored, num_padded), in_rows(scored.target_states))
    return Forward(sums, lambda: in_rows(scored.logits), last)


def forward_of_stock(
    outputs: tuple[Tensor, Tensor, Tensor], targets: Int[Tensor, "N U"], reduction: Reduction, *, states: bool
) -> Forward:
    """Return the results of the stock pass, whose rows are particle-major."""
    logits, of_targets, all_states = outputs
    num_particles = len(logits) // len(targets)
    sums = sequence_log_likelihood(logits, targets.repeat(num_particles, 1), reduction).view(num_particles, -1)
    by_particle = [tensor.unflatten(0, (num_particles, -1)) for tensor in (logits, of_targets, all_states)]
    last = None
    if states:
        num_read = all_states.shape[1] - targets.shape[1] + 1  # behind a shorter source its target
        last = (by_particle[2][:, :, :num_read], by_particle[1])
    return Forward(sums, lambda: by_particle[0], last)


def _read_states(scored: Scored, num_padded: int) -> Float[Tensor, "m N L D"]:
    """Return the last states of prompts and sources in rows of one length, 0 on padding."""
    layout, states = scored.layout, scored.states
    num_particles, num_texts = layout.first.shape
    shape = (num_particles, layout.num_prompts, layout.prompt_length, states.shape[-1])
    prefix = states[: layout.num_prefix].view(shape)[:, send(torch.tensor(layout.choice), states.device)]
    longest = num_padded if layout.prompt_length else max(layout.num_source)
    columns = torch.arange(longest)
    places = send((layout.first[..., None] + columns).clamp(max=len(states) - 1), states.device)
    is_read = columns < torch.tensor(layout.num_source)[:, None]
    own = states[places] * send(is_read.to(states.dtype), states.device)[None, :, :, None]
    return torch.cat([prefix, own.view(num_particles, num_texts, longest, -1)], dim=2)
