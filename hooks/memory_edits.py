"""What if a Mamba layer had forgotten the prompt so far, or remembered another moment of it: edits of its states."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int

from jambascope.errors import InputError
from jambascope.hooks.capture import Capture
from jambascope.hooks.interventions import Intervention, Patch, PinState
from jambascope.hooks.runner import run
from jambascope.hooks.ssm import capture_states, channel_groups, check_layers, half_life

if TYPE_CHECKING:
    from jambascope.model import HookedJamba

STATE, CONV, READ = "mixer.hook_ssm_state", "mixer.hook_conv_state", "mixer.hook_ssm_read"


@torch.no_grad()
def memory_edits(
    model: HookedJamba,
    tokens: Int[torch.Tensor, "1 pos"],
    layers: Iterable[int] | None,
    position: int,
    *,
    source: int | None = None,
    lasting: bool = True,
    conv: bool = False,
    group: int | None = None,
    groups: int = 8,
) -> list[Intervention]:
    """One intervention for each layer: its state after ``position`` is erased, or is what it was after ``source``.

    Args:
        tokens: the prompt [1 T]; states of ``source`` and step sizes are those of its unedited run.
        layers: Mamba and Mamba-2 layers; None for all.
        source: another position of the prompt; None erases, which is to pin to zero.
        lasting: the recurrence goes on from the edited state; False changes the read-out at ``position`` alone.
        conv: the last inputs of the convolution as well.
        group: only these channels of each layer, the ``group``-th of its ``groups`` by half-life on this prompt
            (:func:`jambascope.hooks.ssm.channel_groups`; 0 forgets fastest); None for all channels.

    Raises:
        InputError: layers, positions or groups that there are not, or ``conv`` where only a read-out changes.
    """
    layers = check_layers(model, layers)
    if conv and not lasting:
        raise InputError("conv=True: the convolution has no read-out to change alone; leave conv out, or lasting in")
    for name, place in (("position", position), ("source", source)):
        if place is not None and not 0 <= place < tokens.shape[-1]:
            raise InputError(f"{name}={place!r} must be a position in 0..{tokens.shape[-1] - 1}")
    cache = None
    if source is not None:
        points = (STATE, CONV) if conv else (STATE,)
        wanted = Capture([f"blocks.{layer}.{point}" for layer in layers for point in points], positions=source)
        cache = run(model, tokens[..., : source + 1], capture=wanted).cache
    edits: list[Intervention] = []
    for layer in layers:
        where = dict(positions=position, channels=_channels(model, tokens, layer, group, groups))
        if lasting and cache is not None:
            edits.append(PinState.from_cache(model, cache, layer, source_positions=0, with_conv=conv, **where))
        elif lasting:
            edits.append(PinState(layer, value=0.0, conv=0.0 if conv else None, **where))
        elif cache is not None:
            held = Patch.from_cache(model, cache, STATE, layer, source_positions=0, **where)
            edits.append(Patch(READ, layer, value=held.value, **where))
        else:
            edits.append(Patch(READ, layer, value=0.0, **where))
    return edits


def _channels(
    model: HookedJamba, tokens: Int[torch.Tensor, "1 pos"], layer: int, group: int | None, groups: int
) -> tuple[int, ...] | None:
    if group is None:
        return None
    captured = capture_states(model, tokens, layer, [0])
    found = channel_groups(half_life(captured.A, captured.dt), groups)
    if not 0 <= group < len(found):
        raise InputError(f"group={group!r}: layer {layer} has groups 0..{len(found) - 1}")
    return tuple(sorted(found[group].tolist()))
