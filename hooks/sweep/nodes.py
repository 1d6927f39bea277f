"""What is patched: nodes, the cells of a sweep over them, and one cell as interventions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from jambascope.errors import HookError, InputError
from jambascope.hook_table import HookRow
from jambascope.hooks.interventions import AddDirection, Intervention, Patch, PinState
from jambascope.hooks.interventions.places import AXES, find_points

if TYPE_CHECKING:
    from jambascope.model import HookedJamba

HEADS = ("H", "K")
STATE, CONV_STATE, CONV = "mixer.hook_ssm_state", "mixer.hook_conv_state", "mixer.hook_conv"
UNITS = {"H": "head", "K": "key_value_head", "H2": "head", "X": "expert", "expert": "expert"}
"""Axis -> what its cells are called."""
EXPERT_OUT, ROUTE = "mlp.hook_expert_out", "mlp.router.hook_expert_indices"
MLP_OUT, MIDDLE = "hook_mlp_out", "hook_resid_mid"


DEFAULT = ("z", "mixer_out", "mlp_out")
"""The components that a question is about where it names none, as far as a model has them."""


@dataclass(frozen=True)
class Node:
    """A component of a layer that a sweep patches, and what one cell of it is.

    The state of a Mamba layer is patched ``ssm_state``: from its position on (persistent), or with ``window`` for as
    many read-outs (windowed); ``ssm_read`` is one read-out alone (transient).
    """

    component: str
    """As interventions take it: "resid_pre", "attn_out", "mixer_out", "mlp_out", "q", "pattern", "x", "dt", "B", "C",
    "y", "ssm_state", "ssm_read", "router_logits", "expert_weights", "expert_out", "mixer.hook_z"...; "z" is that of
    attention, as in TransformerLens."""
    by: Literal["head", "expert", None] | str = "auto"
    """What has a cell of its own: "head", "expert" (of ``expert_out``: what one expert adds to the stream), or None for
    the whole component. "auto": heads and experts where the component has them."""
    channels: int | None = None
    """Cells are groups of as many neighbouring channels, of each head or expert where ``by`` tells them apart; of B and
    C, which have none, of the state's entries."""
    window: int | None = None
    """Of ``ssm_state``: read-outs that see the patch; after them the state is that of the unpatched run again."""
    conv: bool = False
    """Of ``ssm_state``: the last inputs of the convolution are patched too. What they change comes after the position,
    so that a window of 1 read-out sees none of it."""

    def __post_init__(self) -> None:
        if not isinstance(self.component, str):
            raise InputError(f"component={self.component!r} must be a component's name, as 'resid_pre'")
        for name, value in (("channels", self.channels), ("window", self.window)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise InputError(f"{name}={value!r} must be a whole number of at least 1")
        if self.by not in ("auto", "head", "expert", None):
            raise InputError(f"by={self.by!r} must be 'head', 'expert', None or 'auto'")

    @property
    def name(self) -> str:
        """Short, and different for different nodes."""
        name = self.component.removeprefix("hook_")
        name += f" of {self.by}s" if self.by in ("head", "expert") else " whole" if self.by is None else ""
        name += f" by {self.channels} channels" if self.channels else ""
        return name + (f", {self.window} read-outs" if self.window else "") + (" with conv" if self.conv else "")


@dataclass(frozen=True)
class Target:
    """A node in one layer of a model."""

    node: Node
    layer: int
    row: HookRow
    axis: str | None = None
    """The axis of heads or experts that have cells of their own, "expert" for experts' addends; None for all of it."""
    units: int = 1
    """How many there are."""
    channel_axis: str | None = None
    """The axis that groups of channels are taken from; None for all of them."""
    width: int = 1
    """Of that axis."""

    @property
    def name(self) -> str:
        """The hook point."""
        return self.row.name.format(L=self.layer)

    @property
    def tail(self) -> str:
        return self.row.name.removeprefix("blocks.{L}.")

    @property
    def unit_name(self) -> str:
        """What its heads or experts are called."""
        return UNITS.get(self.axis, "")

    @property
    def groups(self) -> int:
        """Of channels; 1 where they are not told apart."""
        return -(-self.width // self.node.channels) if self.channel_axis else 1

    @property
    def axes(self) -> dict[str, int]:
        """What tells the cells at a position apart: name and number, heads or experts before channels."""
        named = {self.unit_name: self.units} if self.axis else {}
        return named | ({"channels": self.groups} if self.channel_axis else {})

    @property
    def cells(self) -> int:
        """At each position."""
        return self.units * self.groups

    def place(self, cell: int) -> tuple[int, ...]:
        """Of a cell among ``axes``."""
        unit, group = divmod(cell, self.groups)
        return (unit,) * (self.axis is not None) + (group,) * (self.channel_axis is not None)

    @property
    def read_again(self) -> bool:
        """Whether a cell's values are told by the base run, too: see :func:`read_again`."""
        return self.tail in (MLP_OUT, EXPERT_OUT) or self.node.window is not None

    def channels(self, cell: int) -> tuple[int, ...]:
        """Those of a cell that is a group of them."""
        first = cell % self.groups * self.node.channels
        return tuple(range(first, min(first + self.node.channels, self.width)))


def targets(model: HookedJamba, node: Node | str, layers: Sequence[int] | None = None) -> list[Target]:
    """A node in every layer that has it, or in the given ones.

    Raises:
        HookError: no layer, or one of ``layers``, has the component, or it cannot be patched cell by cell.
    """
    node = Node(node) if isinstance(node, str) else node
    if not isinstance(node, Node):
        raise InputError(f"nodes: {node!r} is no Node and no name of a component")
    component = "attn.hook_z" if node.component in ("z", "hook_z") else node.component
    names = find_points(model, component, None if layers is None else tuple(layers))
    return [_target(model, node, name) for name in names]


def targets_of(
    model: HookedJamba, field: str, nodes: str | Node | Iterable[str | Node] | None, layers: Sequence[int] | None
) -> list[list[Target]]:
    """The targets of each node; of ``DEFAULT`` where None, in those of the layers that have them.

    Raises:
        HookError: as :func:`targets`.
        InputError: no node, or one twice.
    """
    if nodes is not None:
        return [targets(model, node, layers) for node in distinct(field, nodes)]
    tails = {name.split(".", 2)[-1] for name in model.hook_rows}
    points = ("attn.hook_z", "hook_mixer_out", "hook_mlp_out")
    found = [targets(model, node) for node, point in zip(DEFAULT, points, strict=True) if point in tails]
    within = [[t for t in of_node if layers is None or t.layer in layers] for of_node in found]
    return [of_node for of_node in within if of_node]


def axes_of(of_node: Sequence[Target]) -> dict[str, int]:
    """What tells cells at a position apart in all layers of a node, whose widths may differ: name and largest count."""
    return {name: max(target.axes[name] for target in of_node) for name in of_node[0].axes}


def distinct(field: str, given: str | Node | Iterable[str | Node]) -> list[str | Node]:
    """One or several of what a sweep is about, as a list.

    Raises:
        InputError: none, one twice, or something else.
    """
    found = [given] if isinstance(given, (str, Node)) or not isinstance(given, Iterable) else list(given)
    if wrong := [one for one in found if not isinstance(one, (str, Node))]:
        raise InputError(f"{field}={wrong[0]!r} must be a component's name, as 'resid_pre', or a Node")
    if not found:
        raise InputError(f"{field}=[] holds nothing; give at least one")
    names = [one.name if isinstance(one, Node) else one for one in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"{field}: {twice!r} is given twice")
    return found


def _target(model: HookedJamba, node: Node, name: str) -> Target:
    if not name.startswith("blocks."):
        raise HookError(
            f"{node.component} belongs to no layer; the stream that enters the first is resid_pre of layer 0"
        )
    row, layer = model.hook_rows[name], int(name.split(".")[1])
    tail = row.name.removeprefix("blocks.{L}.")
    if tail == ROUTE:
        raise HookError(
            f"{name} holds expert numbers; patch router_logits or expert_weights, and they are chosen again"
        )
    if (node.window or node.conv) and tail != STATE:
        raise InputError(f"{node.name}: window and conv are of ssm_state")
    sizes = dict(zip(row.axes, row.shape(model.config, 1, 1), strict=True))
    if model.config.d_conv == 1 and (node.conv or tail == CONV_STATE):
        raise HookError(f"{node.name}: with d_conv=1 a convolution remembers no inputs; patch the state alone")
    channels = {}
    if node.channels:
        axis = next((a for field in ("channels", "states") for a in row.axes if a in AXES[field]), None)
        if axis is None or tail != EXPERT_OUT and "S" in row.axes:
            raise HookError(f"{node.name}: {name} has no channels to group; its axes are {' '.join(row.axes)}")
        channels = dict(channel_axis=axis, width=sizes[axis])
    if tail == EXPERT_OUT and node.by != "expert" and node.by != "auto":
        raise HookError(f"{node.name}: slots hold different experts in different runs; patch mlp_out, or by='expert'")
    if tail == EXPERT_OUT:
        return Target(node, layer, row, "expert", model.config.num_experts, **channels)
    letters = {"head": (*HEADS, "H2"), "expert": ("X",), "auto": HEADS, None: ()}[node.by]
    axis = next((a for a in row.axes if a in letters), None)
    if axis is None and node.by not in ("auto", None):
        raise HookError(f"{node.name}: {name} has no {node.by}s; its axes are {' '.join(row.axes)}")
    return Target(node, layer, row, axis, sizes.get(axis, 1), **channels)


def interventions(
    model: HookedJamba,
    target: Target,
    positions: Sequence[int],
    cell: int,
    source: Mapping[str, torch.Tensor],
    base: Mapping[str, torch.Tensor],
) -> list[Intervention]:
    """One cell of a sweep, to be run on its own: what the sweep computes by other means.

    Args:
        cell: its number among the target's: of each head or expert all groups of channels, one after the other; 0
            where a cell is the whole component.
        source, base: caches of the run whose values are put in, and of the run that they are put into, with the hook
            points of ``needed``.
    """
    node, layer, positions = target.node, target.layer, tuple(positions)
    selection, unit = {}, cell // target.groups
    if target.tail == EXPERT_OUT:
        change = expert_addend(source, layer, unit) - expert_addend(base, layer, unit)
        if target.channel_axis:
            chosen = torch.zeros(target.width, dtype=change.dtype, device=change.device)
            chosen[list(target.channels(cell))] = 1
            change = change * chosen
        return [AddDirection("mlp_out", layer, positions, value=change[:, list(positions)])]
    if target.channel_axis:
        selection["states" if target.channel_axis == "N" else "channels"] = target.channels(cell)
    if target.axis in (*HEADS, "H2"):
        selection["heads"] = unit
    elif target.axis == "X":
        selection["experts"] = unit
    if target.tail != STATE:
        return [Patch.from_cache(model, source, target.tail, layer, positions=positions, **selection)]
    put = PinState.from_cache(model, source, layer, positions=positions, with_conv=node.conv, **selection)
    length = base[target.name].shape[2]
    end = length if node.window is None else positions[-1] + node.window
    if end >= length:
        return [put]
    restored = [put, PinState.from_cache(model, base, layer, positions=end, **selection)]
    # What the convolution still remembers of the patch does not reach beyond the window.
    rest = range(end, min(positions[-1] + model.config.d_conv, length))
    if node.conv and rest:
        restored.append(Patch.from_cache(model, base, CONV, layer, positions=tuple(rest), **selection))
    return restored


def enters(target: Target) -> bool:
    """Whether a patch is of the whole of what enters its layer."""
    return target.tail == "hook_resid_pre" and target.channel_axis is None


def needed(target: Target) -> list[str]:
    """The hook points of the source run that a target's values come from."""
    prefix = f"blocks.{target.layer}."
    if target.tail == EXPERT_OUT:
        return [target.name, prefix + ROUTE]
    return [target.name, *([prefix + CONV_STATE] if target.node.conv else [])]


def read_again(target: Target, positions: Sequence[int], length: int, d_conv: int) -> dict[str, Sequence[int]]:
    """The hook points of the base run that a cell's values are told by, and where."""
    if target.tail == EXPERT_OUT:
        return dict.fromkeys(needed(target), positions)
    if target.tail == MLP_OUT:
        return {f"blocks.{target.layer}.{MIDDLE}": positions}
    if target.node.window is None:
        return {}
    end = positions[-1] + target.node.window
    rest = range(end, min(positions[-1] + d_conv, length)) if target.node.conv else ()
    found = {target.name: [end] if end < length else (), f"blocks.{target.layer}.{CONV}": rest}
    return {name: at for name, at in found.items() if at}


def expert_addend(cache: Mapping[str, torch.Tensor], layer: int, expert: int) -> torch.Tensor:
    """What one expert of a layer adds to the stream, [B T D]; 0 where it was not chosen."""
    chosen = cache[f"blocks.{layer}.{ROUTE}"] == expert
    return (cache[f"blocks.{layer}.{EXPERT_OUT}"] * chosen[..., None]).sum(2)
