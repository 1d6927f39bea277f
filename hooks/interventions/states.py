"""Edits of what a Mamba layer remembers: its SSM state and the last inputs of its convolution.

One state can be edited in three ways, all written with the kinds of ``jambascope.hooks.interventions.activations``:

- persistent, component ``ssm_state``: the recurrence goes on from the changed state;
- transient, component ``ssm_read``: one read-out sees the change, no later position does;
- windowed: persistent at the first position, and :class:`PinState` to the states of the unedited run at the last.
  What the convolution remembers of a patch with ``conv`` goes on for ``d_conv - 1`` positions, unless
  ``mixer.hook_conv`` is patched, too.

A layer also remembers the last ``d_conv - 1`` inputs of its convolution (``conv_state``). Patching the state alone
leaves those of the run at hand; :class:`PinState` with ``conv`` patches both, so that the two can be told apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from jambascope.errors import HookError, InputError
from jambascope.hooks.interventions.activations import Indices, Patch
from jambascope.hooks.interventions.base import Hooks, Intervention, Value

if TYPE_CHECKING:
    from jambascope.model import HookedJamba


@dataclass(frozen=True, eq=False, repr=False)
class PinState(Intervention):
    """Set the SSM state after chosen positions, and with ``conv`` the convolution's memory there; both flow on.

    Args:
        value: broadcasts to the selected part of [B E P N] (P positions).
        conv: broadcasts to the selected part of [B P W E], of Mamba-2 to [B P W E+2GN]; left out, the convolution's
            memory stays that of the run.
        channels: of d_inner; in a Mamba-2 layer ``conv`` then holds those of x, and B and C stay.
    """

    layer: Indices
    positions: Indices
    value: Value
    conv: Value | None = None
    rows: Indices = None
    channels: Indices = None
    states: Indices = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positions is None:
            raise InputError("positions=None: say after which positions the state is pinned")

    @classmethod
    def from_cache(
        cls,
        model: HookedJamba,
        cache: Mapping[str, torch.Tensor],
        layer: int,
        positions: Indices,
        *,
        source_positions: Indices = None,
        with_conv: bool = False,
        rows: Indices = None,
        channels: Indices = None,
        states: Indices = None,
    ) -> PinState:
        """The memory of another run, whose cache holds ``mixer.hook_ssm_state`` (and ``mixer.hook_conv_state``)."""
        where = dict(positions=positions, source_positions=source_positions, rows=rows, channels=channels)
        value = Patch.from_cache(model, cache, "mixer.hook_ssm_state", layer, states=states, **where).value
        conv = Patch.from_cache(model, cache, "mixer.hook_conv_state", layer, **where).value if with_conv else None
        return cls(layer, positions, value, conv, rows, channels, states)

    def hooks(self, model: HookedJamba, batch: int | None = None, length: int | None = None, past: int = 0) -> Hooks:
        where = dict(layer=self.layer, positions=self.positions, rows=self.rows, channels=self.channels)
        edits = [Patch("mixer.hook_ssm_state", **where, states=self.states, value=self.value)]
        if self.conv is not None:
            if model.config.d_conv == 1:
                raise HookError("conv: with d_conv=1 a convolution remembers no inputs; leave conv out")
            edits.append(Patch("mixer.hook_conv_state", **where, value=self.conv))
        return [hook for edit in edits for hook in edit.hooks(model, batch, length, past)]
