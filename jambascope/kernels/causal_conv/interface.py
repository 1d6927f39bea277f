"""Which input each output meets, when rows hold padding or several documents."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int


class Neighbours(NamedTuple):
    """Inputs are numbered as in ``cat(past, x)``, from 0 to K - 2 + T; -1 is none."""

    source: Int[torch.Tensor, "batch pos tap"]
    """The input that tap k of the output at t is multiplied with; all -1 at padding."""
    target: Int[torch.Tensor, "batch d_conv-1+pos tap"]
    """The position of the output that met an input with tap k: the inverse of ``source``."""


def neighbours(
    mask: Bool[torch.Tensor, "batch pos"] | None, resets: Bool[torch.Tensor, "batch pos"] | None, width: int
) -> Neighbours | None:
    """The tables for rows with padding or resets, int32; None when every output meets the inputs just before it."""
    if mask is None and resets is None:
        return None
    if mask is None:
        mask = torch.ones_like(resets)
    (batch, length), device = mask.shape, mask.device
    past = width - 1
    earlier = mask.long().cumsum(1) - mask.long()  # tokens before a position
    # Inputs in the order of tokens: the past, then the row's tokens. Padding goes into a last slot that nobody reads.
    inputs = torch.arange(past + length, device=device).expand(batch, -1)
    slot = torch.where(mask, past + earlier, past + length)
    ordered = torch.zeros(batch, past + length + 1, dtype=torch.long, device=device)
    ordered[:, :past] = inputs[:, :past]
    ordered.scatter_(1, slot, inputs[:, past:])
    tap = earlier[..., None] + torch.arange(width, device=device)
    source = ordered.gather(1, tap.flatten(1)).view(batch, length, width)
    visible = mask[..., None]
    if resets is not None:
        first = torch.where(resets, past + earlier, 0).cummax(1).values
        visible = visible & (tap >= first[..., None])
    source = torch.where(visible, source, -1)
    target = torch.full((batch, past + length + 1, width), -1, dtype=torch.int32, device=device)
    positions = torch.arange(length, dtype=torch.int32, device=device)[None, :, None].expand_as(source)
    target.scatter_(1, torch.where(visible, source, past + length), positions)
    return Neighbours(source.int().contiguous(), target[:, :-1].contiguous())


def next_past(
    x: Float[torch.Tensor, "batch pos d_inner"],
    past: Float[torch.Tensor, "batch d_conv-1 d_inner"],
    mask: Bool[torch.Tensor, "batch pos"] | None = None,
    resets: Bool[torch.Tensor, "batch pos"] | None = None,
) -> Float[torch.Tensor, "batch d_conv-1 d_inner"]:
    """The ``past`` that the positions after ``x`` meet: a row's last inputs, zero where a document began since."""
    count = past.shape[1]
    if not count:
        return past
    if mask is None and resets is None:
        return torch.cat((past, x[:, max(0, x.shape[1] - count) :]), dim=1)[:, -count:]
    # What an output at one more token after the row would meet.
    mask = None if mask is None else F.pad(mask, (0, 1), value=True)
    resets = None if resets is None else F.pad(resets, (0, 1), value=False)
    source = neighbours(mask, resets, count + 1).source[:, -1, :-1]
    taken = torch.cat((past, x), dim=1).gather(1, source.clamp_min(0).long()[..., None].expand(-1, -1, x.shape[2]))
    return torch.where((source >= 0)[..., None], taken, 0)
