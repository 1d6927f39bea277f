"""Many cells patched in one pass: each row of a batch has a cell of its own.

Axes as in the hook table; R row, A prompt of the source run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int

from jambascope.devices import index_tensor
from jambascope.hook_point import At, HookPoint, StateEdit
from jambascope.hook_table import HookRow
from jambascope.hooks.sweep.nodes import CONV, CONV_STATE, EXPERT_OUT, MIDDLE, MLP_OUT, ROUTE, STATE, Target
from jambascope.hooks.sweep.recorded import Base, Recording
from jambascope.hooks.sweep.rows import Entries, Row, Together
from jambascope.state import Run

if TYPE_CHECKING:
    from jambascope.model import HookedJamba


def changed_stream(
    model: HookedJamba, base: Base, source: Recording, target: Target, together: Together
) -> Float[torch.Tensor, "1 token d_model"] | None:
    """The stream after a layer whose rows are patched where only the patched positions of it change, so that the layer
    itself need not run again; None where that is not so."""
    layer, tail, block = target.layer, target.tail, model.blocks[target.layer]
    if tail not in ("hook_attn_out", "hook_mixer_out", "hook_resid_mid", MLP_OUT, EXPERT_OUT, "hook_resid_post"):
        return None
    if target.channel_axis and tail != EXPERT_OUT:
        return None
    entries, at = together.patched()
    after = together.stream(layer + 1)
    if tail == EXPERT_OUT:
        after[0, at] += _change_of_experts(base, source, target, entries)
        return after
    new = source.at(target.name, entries.prompts, entries.positions)
    if tail == MLP_OUT:
        new = base.recording.at(f"blocks.{layer}.{MIDDLE}", entries.pairs, entries.positions) + new
    elif tail in ("hook_attn_out", "hook_mixer_out"):
        new = together.stream(layer)[0, at] + new
    if block.has_feed_forward and tail not in (MLP_OUT, "hook_resid_post"):
        new = block.feed(new[:, None], Run(len(new), 1, model.device, None, None))[:, 0]
    after[0, at] = new
    return after


def _change_of_experts(
    base: Base, source: Recording, target: Target, entries: Entries
) -> Float[torch.Tensor, "entry d_model"]:
    """What patches of single experts add to what the feed-forward had written."""
    cells = index_tensor(entries.cells, entries.rows.device)
    new, old = (
        _expert_addends(recording, target.layer, prompts, entries.positions, cells // target.groups)
        for recording, prompts in ((source, entries.prompts), (base.recording, entries.pairs))
    )
    if target.channel_axis is None:
        return new - old
    return torch.where(_in_group(target, cells), new - old, 0.0)


def _in_group(target: Target, cells: Int[torch.Tensor, " entry"]) -> Bool[torch.Tensor, "entry channel"]:
    """Which channels belong to each cell."""
    channels = torch.arange(target.width, device=cells.device)
    return channels // target.node.channels == (cells % target.groups)[:, None]


def _expert_addends(
    recording: Recording, layer: int, prompts: torch.Tensor, positions: list[int], units: torch.Tensor
) -> Float[torch.Tensor, "entry d_model"]:
    points = [f"blocks.{layer}.{tail}" for tail in (EXPERT_OUT, ROUTE)]
    out, chosen = (recording.at(name, prompts, positions) for name in points)
    return (out * (chosen == units[:, None])[..., None]).sum(1)


def patch_hooks(
    model: HookedJamba,
    base: Base,
    source: Recording,
    target: Target,
    rows: Sequence[Row],
) -> list[tuple[str, Callable]]:
    """Hooks that patch the rows of a batch, each with its own cell of one target."""
    entries = Entries.of(rows, base.length, model.device)
    if target.tail != STATE:
        return [(target.name, _put(source, target, entries, target.row))]
    ends = _entries_after(base, target, rows, 1, model.device)
    hooks = [(target.name, _state_edit(base, source, target, entries, ends))]
    if target.node.conv:
        row = model.hook_rows[f"blocks.{target.layer}.{CONV_STATE}"]
        hooks.append((row.name.format(L=target.layer), _put(source, target, entries, row)))
        # What the convolution still remembers of the patch does not reach beyond the window.
        rest = (
            _entries_after(base, target, rows, model.config.d_conv - target.node.window, model.device) if ends else None
        )
        if rest:
            row = model.hook_rows[f"blocks.{target.layer}.{CONV}"]
            hooks.append((row.name.format(L=target.layer), _put(base.recording, target, rest, row)))
    return hooks


def _put(source: Recording, target: Target, entries: Entries, row: HookRow) -> At:
    """A hook that puts the values of a hook point of the target's layer in, each entry in its row."""
    name, axes = row.name.format(L=target.layer), row.axes
    value = source.values[name]
    if target.tail == STATE and row != target.row:
        axes = (*axes[:-1], "E")  # of Mamba-2 the convolution is wider: the channels of the state are its first
    cells = index_tensor(entries.cells, value.device)
    units = {target.axis: cells // target.groups} if target.axis else {}
    channels = {}
    if target.channel_axis:
        within = torch.arange(target.node.channels, device=value.device)
        first = (cells % target.groups * target.node.channels)[:, None]
        channels = {target.channel_axis: (first + within).clamp(max=target.width - 1)}

    def index(rows: torch.Tensor, places: Sequence[int]) -> tuple:
        found = {"B": rows, "T": index_tensor(places, value.device)} | units
        if channels:
            found = {axis: i[:, None] for axis, i in found.items()} | channels
        return tuple(found.get(a, slice(None)) for a in axes)

    new = value[index(entries.prompts, source.places(name, entries.positions))]

    def put(part: torch.Tensor, hook: HookPoint) -> torch.Tensor:
        where = {p: i for i, p in enumerate(hook.positions)}
        part = part.clone()
        part[index(entries.rows, [where[p] for p in entries.positions])] = new
        return part

    return At(sorted(set(entries.positions)), put)


def _state_edit(base: Base, source: Recording, target: Target, entries: Entries, ends: Entries | None) -> StateEdit:
    """The states of cells put in by the scan itself; those of the base put back where their windows end."""
    parts = [(source, entries.prompts, entries)]
    if ends:
        parts.append((base.recording, ends.prompts, ends))
    positions = sorted({p for _, _, e in parts for p in e.positions})
    where = {p: i for i, p in enumerate(positions)}
    like = source.values[target.name]
    batch, n_channels, n_states = entries.batch, like.shape[1], like.shape[3]
    scale = like.new_ones(batch, n_channels, len(positions), 1)
    shift = like.new_zeros(batch, n_channels, len(positions), n_states)
    for recording, prompts, e in parts:
        places = index_tensor(recording.places(target.name, e.positions), like.device)
        at = index_tensor([where[p] for p in e.positions], like.device)
        new = recording.values[target.name][prompts, :, places]  # [entry E N]
        mine = like.new_ones(len(new), n_channels, dtype=torch.bool)
        if target.channel_axis:
            mine = _in_group(target, index_tensor(e.cells, like.device))
        scale[e.rows, :, at] = torch.where(mine[..., None], 0.0, scale[e.rows, :, at])
        shift[e.rows, :, at] = torch.where(mine[..., None], new, shift[e.rows, :, at])
    return StateEdit(positions, scale, shift)


def _entries_after(base: Base, target: Target, rows: Sequence[Row], n: int, device: torch.device) -> Entries | None:
    """The ``n`` positions that follow the windows of rows, where they lie within the prompt; values are the base's."""
    if target.node.window is None:
        return None
    each = [
        (i, row.pair, end, row.cell)
        for i, row in enumerate(rows)
        for end in range(row.positions[-1] + target.node.window, row.positions[-1] + target.node.window + n)
        if end < base.length
    ]
    if not each:
        return None
    at, pairs, positions, cells = zip(*each, strict=True)
    prompts = index_tensor(pairs, device)
    return Entries(index_tensor(at, device), prompts, prompts, list(positions), list(cells), len(rows))
