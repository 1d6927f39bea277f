"""What the mixers of both Mambas share: the convolution around padding, and states that hooks see and change."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from jambascope.hook_point import HookPoint
from jambascope.kernels.activations import silu
from jambascope.kernels.causal_conv import causal_conv1d, causal_conv1d_step, next_past
from jambascope.kernels.selective_scan import StateEdits

Result = TypeVar("Result")


def convolve(
    conv1d: nn.Conv1d, hook: HookPoint, x: torch.Tensor, mask: torch.Tensor | None, past: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """SiLU of the causal convolution over a row's tokens, as if its padding were not there; and the new past.

    ``hook`` sees the convolution before SiLU. x [B T E], mask [B T], past [B d_conv-1 E].
    """
    heard = hook.heard
    if past is not None and mask is None and x.shape[1] == 1:
        out, past = causal_conv1d_step(x[:, 0], conv1d.weight[:, 0], conv1d.bias, past, silu=not heard)
        return (silu(hook(out[:, None])) if heard else out[:, None]), past
    out = causal_conv1d(x, conv1d.weight[:, 0], conv1d.bias, past, silu=not heard, mask=mask)
    new_past = None if past is None else next_past(x, past, mask)
    return silu(hook(out)) if heard else out, new_past


def scan_with_listeners(
    scan: Callable[..., Result], write: Callable[[], torch.Tensor], hook_write: HookPoint, hook_state: HookPoint
) -> Result:
    """A scan with its writes and states shown, scanned again with whatever was changed.

    A changed write is added to the state at its position. A changed entry of the state is pinned to the new value,
    and later positions follow from it; entries a hook left alone are scanned again.

    Args:
        scan: takes ``capture`` and ``edits``; its result has ``captured``, of the shape of the edits.
        write: what is written to the state at every position, [B E T N]; asked for only when heard.
    """
    edits = None
    if hook_write.heard:
        written = write()
        shown = hook_write(written.clone())
        edits = StateEdits.add(range(written.shape[2]), shown - written)
    result = scan(capture="all", edits=edits)
    if not hook_state.heard:
        return result
    states = result.captured
    counts_edits = not states.is_inference()  # inference tensors have no version
    version = states._version if counts_edits else None
    original = states if counts_edits else states.clone()
    shown = hook_state(states)
    if counts_edits and states._version != version:
        # Edited in place: what was there before has to be computed again.
        original = scan(capture="all", edits=edits).captured
    elif counts_edits and shown is states:
        if not (hook_state.wants_gradient or states.retains_grad):
            return result
    pinned = shown != original
    shift = torch.zeros_like(original) if edits is None else edits.shift
    # Where nothing was changed `shown - original` is zero, but carries the state's gradient into what is shown.
    shift = torch.where(pinned, shown, shift + (shown - original))
    return scan(capture=None, edits=StateEdits(range(shown.shape[2]), (~pinned).to(shown.dtype), shift))
