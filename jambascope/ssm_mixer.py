"""What the mixers of both Mambas share: the convolution around padding, and states that hooks see and change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from einops import einsum
from torch import nn

from jambascope.devices import index_tensor
from jambascope.hook_point import HookPoint, indices_in, widened
from jambascope.kernels.activations import silu
from jambascope.kernels.causal_conv import causal_conv1d, causal_conv1d_step, next_past
from jambascope.kernels.selective_scan import StateEdits
from jambascope.state import MambaState, Run

Result = TypeVar("Result")


def convolve(
    conv1d: nn.Conv1d,
    hook: HookPoint,
    hook_state: HookPoint,
    x: torch.Tensor,
    run: Run,
    memory: MambaState | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """SiLU of the causal convolution over a row's tokens, as if its padding were not there; and the new past (of packed
    rows, whose hooks nobody listens to, none).

    ``hook`` sees the convolution before SiLU, ``hook_state`` the last inputs held after each position.
    x [B T E].
    """
    weight, bias, mask = conv1d.weight[:, 0], conv1d.bias, run.mask
    past = None if memory is None else memory.conv
    if run.packing is not None:
        cut = dict(cu_seqlens=run.packing.bounds, past_rows=memory.conv_rows)
        return causal_conv1d(x, weight, bias, past, silu=True, **cut), None
    silu_apart = hook.heard or hook_state.heard
    if past is not None and mask is None and x.shape[1] == 1:
        out, new_past = causal_conv1d_step(x[:, 0], weight, bias, past, silu=not silu_apart)
        out = out[:, None]
    else:
        out = causal_conv1d(x, weight, bias, past, silu=not silu_apart, mask=mask)
        new_past = None if past is None else next_past(x, past, mask)
    if hook_state.heard:
        edited = _edited(hook_state, lambda: conv_states(x, past, mask, weight.shape[1] - 1))
        if edited is not None and edited[1].numel():  # a convolution of width 1 remembers nothing
            flowing = _pinned_conv_states(x, past, mask, *edited)
            out = out + _change_of_conv(flowing - edited[1], weight, mask)
            new_past = None if past is None else flowing[:, -1]
    return (silu(hook(out)) if silu_apart else out), new_past


def conv_states(x: torch.Tensor, past: torch.Tensor | None, mask: torch.Tensor | None, width: int) -> torch.Tensor:
    """The last ``width`` inputs that the convolution holds after each position, oldest first: [B T W E]."""
    batch, length, channels = x.shape
    if past is None:
        past = x.new_zeros(batch, width, channels)
    if mask is None:
        inputs = torch.cat((past, x), dim=1)
        if width:
            return torch.stack([inputs[:, w : w + length] for w in range(1, width + 1)], dim=2)
        return x.new_empty(batch, length, 0, channels)
    order = (~mask).int().argsort(dim=1, stable=True)  # tokens first, in order
    inputs, seen = torch.cat((past, x.gather(1, order[..., None].expand_as(x))), dim=1), mask.cumsum(1)
    entry = seen[..., None] + torch.arange(width, device=x.device)
    return inputs[torch.arange(batch, device=x.device)[:, None, None], entry]


def _pinned_conv_states(
    x: torch.Tensor, past: torch.Tensor | None, mask: torch.Tensor | None, shown: torch.Tensor, original: torch.Tensor
) -> torch.Tensor:
    """What the convolution holds when the changed entries of ``shown`` are pinned and move on with time: [B T W E]."""
    length, width = original.shape[1:3]
    if width == 0:
        return shown
    if past is None:
        past = torch.zeros_like(original[:, 0])
    pinned, change = shown != original, shown - original  # the change is 0, but has a gradient, where nothing is pinned
    if mask is None:
        entries, newer = [None] * width, x
        for w in reversed(range(width)):  # an entry is what its newer neighbour was one position ago
            moved = newer if w == width - 1 else torch.cat((past[:, None, w + 1], newer[:, :-1]), dim=1)
            newer = entries[w] = torch.where(pinned[:, :, w], shown[:, :, w], moved + change[:, :, w])
        return torch.stack(entries, dim=2)
    held, states = past, []
    for t in range(length):  # padding holds on to what it finds, so that rows do not move together
        moved = torch.where(mask[:, t, None, None], torch.cat((held[:, 1:], x[:, t, None]), dim=1), held)
        held = torch.where(pinned[:, t], shown[:, t], moved + change[:, t])
        states.append(held)
    return torch.stack(states, dim=1)


def _change_of_conv(change: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """What a change of the held inputs [B T W E] adds to the convolution of the position after each: [B T E]."""
    before = F.pad(change[:, :-1], (0, 0, 0, 0, 1, 0))
    added = einsum(before, weight[:, :-1], "b t w e, e w -> b t e")
    return added if mask is None else added * mask[..., None]


def scan_with_listeners(
    scan: Callable[..., Result],
    write: Callable[[], torch.Tensor],
    read: Callable[[torch.Tensor, Sequence[int]], torch.Tensor],
    mixer: nn.Module,
    like: torch.Tensor,
    length: int,
) -> Result:
    """A scan with its writes and states shown, scanned again with whatever was changed.

    A changed write is added to the state at its position. A changed entry of the state is pinned to the new value,
    and later positions follow from it; entries a hook left alone are scanned again. A change of what the read-out
    sees changes ``y`` at its position only.

    Args:
        scan: takes ``capture`` and ``edits``; its result has ``captured``, of the shape of the edits.
        write: what is written to the state at every position, [B E T N]; asked for only when heard.
        read: a change of the state [B E P N] at positions P of this call -> what it adds to y, [B P ...].
        mixer: has hook_ssm_write, hook_ssm_state and hook_ssm_read.
        like: [B E N], of the states' dtype and device.
    """
    edits = None
    if mixer.hook_ssm_write.heard:
        written = write()
        shown = mixer.hook_ssm_write(written.clone())
        edits = StateEdits.add(range(length), shown - written)
    hook = mixer.hook_ssm_state
    start = hook.start
    for edit in hook.state_edits:
        edits = edit.applied(edits, range(start, start + length), like)
    looked_at = hook.wanted(length) if hook.heard else ()
    read_at = mixer.hook_ssm_read.wanted(length) if mixer.hook_ssm_read.heard else ()
    if looked_at:
        result = scan(capture=looked_at, edits=edits)
        edited = _edited(hook, lambda: scan(capture=looked_at, edits=edits).captured, result.captured, looked_at)
        if edited is not None:
            edits = _with_pins(edits, looked_at, *edited, like)
        elif not read_at:
            return result
    if not read_at:
        return scan(capture=None, edits=edits)
    result = scan(capture=read_at, edits=edits)
    hook = mixer.hook_ssm_read
    edited = _edited(hook, lambda: scan(capture=read_at, edits=edits).captured, result.captured, read_at)
    if edited is None:
        return result
    rows = index_tensor(read_at, like.device)
    shown, original = edited
    return result._replace(y=result.y.index_add(1, rows, read(shown - original, read_at).to(result.y.dtype)))


def _edited(
    hook: HookPoint,
    compute: Callable[[], torch.Tensor],
    value: torch.Tensor | None = None,
    at: Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What listeners made of a value, and what it was; None if they only looked (as far as that can be told without
    waiting for the device). ``compute`` gives the value, again after it was edited in place."""
    value = compute() if value is None else value
    counts_edits = not value.is_inference()  # inference tensors have no version
    version = value._version if counts_edits else None
    original = value if counts_edits else value.clone()
    alias = value.view_as(value)  # so that a gradient which a listener retains is not also that of the original
    shown = hook(alias, at)
    if counts_edits and value._version != version:
        return shown, compute()
    if counts_edits and shown is alias and not (hook.wants_gradient or alias.retains_grad):
        return None
    return shown, original


def _with_pins(
    edits: StateEdits | None, at: Sequence[int], shown: torch.Tensor, original: torch.Tensor, like: torch.Tensor
) -> StateEdits:
    """``edits``, and then the changed entries of ``shown`` pinned at positions ``at`` of this call."""
    pinned = shown != original
    edits = widened(edits, at, like)
    index = index_tensor(indices_in(edits.positions, at), like.device)
    scale, shift = edits.scale.index_select(2, index), edits.shift.index_select(2, index)
    # Where nothing was changed `shown - original` is zero, but carries the state's gradient into what is shown.
    scale, shift = torch.where(pinned, 0.0, scale), torch.where(pinned, shown, shift + (shown - original))
    return edits._replace(scale=edits.scale.index_copy(2, index, scale), shift=edits.shift.index_copy(2, index, shift))
