"""A first screen by gradients, and the truth for the cells that it names: attribution patching before patching.

Two passes and a backward one estimate every cell (``jambascope.hooks.attribution_patching``); the largest estimates are
then patched in truth, which says how far the screen can be trusted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import xarray as xr

from jambascope.errors import HookError, InputError
from jambascope.hooks.attribution_patching import attribution_patching
from jambascope.hooks.intervals import at_least
from jambascope.hooks.sweep.memory import Need, Needs, room, values_bytes
from jambascope.hooks.sweep.metrics import Metric
from jambascope.hooks.sweep.nodes import EXPERT_OUT, Node, Target, axes_of
from jambascope.hooks.sweep.progress import Progress
from jambascope.hooks.sweep.question import Direction, Measure, Question
from jambascope.hooks.sweep.recorded import Prompts, record
from jambascope.hooks.sweep.result import PatchSweep, SweepError
from jambascope.hooks.sweep.rows import Row
from jambascope.hooks.sweep.sweep import Cells, Sweep

if TYPE_CHECKING:
    from jambascope.model import HookedJamba, Input


@dataclass(frozen=True, eq=False)
class Screen:
    """Estimates of all cells, and the truth of the largest."""

    estimates: dict[str, xr.DataArray]
    """Node -> the estimated change of the metric's mean over pairs: axes layer, position, and head or
    expert, and channels, where cells are told apart by them."""
    true: PatchSweep
    """The cells that were patched; NaN elsewhere."""

    def compared(self) -> tuple[np.ndarray, np.ndarray]:
        """Estimate and true change of the metric's mean over pairs, of the cells that were patched."""
        estimated, true = [], []
        for name, values in self.true.values.items():
            change = (values[0] - self.true.base[0]).mean("pair").values
            patched = ~np.isnan(change)
            estimated.append(self.estimates[name].values[patched])
            true.append(change[patched])
        return np.concatenate(estimated), np.concatenate(true)

    @property
    def correlation(self) -> float:
        """Pearson's, of estimate and truth; nan with fewer than two cells or where one of the two does not vary."""
        estimated, true = self.compared()
        if len(true) < 2 or not estimated.std() or not true.std():
            return float("nan")
        return float(np.corrcoef(estimated, true)[0, 1])


def screen(
    model: HookedJamba,
    clean: Input,
    corrupted: Input,
    metric: Metric | Callable,
    nodes: str | Node | Sequence[str | Node] | None = None,
    *,
    top: int = 50,
    layers: Iterable[int] | None = None,
    positions: Iterable[int] | None = None,
    direction: Direction = "denoise",
    progress: bool | Progress = True,
    max_bytes: int = 1 << 30,
) -> Screen:
    """Estimate every cell, and patch the ``top`` largest estimates.

    Arguments and errors are those of ``patch_sweep``; one metric, which must have a gradient; z, mixer_out and mlp_out
    where the model has them when ``nodes`` is None; positions one by one; and no windows, ``conv`` or experts' addends,
    which have no gradient of their own. ``max_bytes`` is also of values, gradients and logits of the estimates; what
    autograd keeps of a pass comes on top. A SweepError's ``result`` is the screen with what was patched by then.
    """
    at_least("top", top)
    at_least("max_bytes", max_bytes)
    question = Question.of(model, clean, corrupted, metric, direction)
    if len(question.metrics) != 1:
        raise InputError("metric: a screen takes one; its estimates are of one gradient")
    cells = Cells(model, nodes, layers, positions, question.prompt_length)
    _check(cells, question)
    at_once = _pairs_at_once(question, cells, max_bytes)
    one_of_each = (Row(0, 0, i, cells.positions[0], 0, ()) for i in range(len(cells.targets)))
    Needs(question, cells.targets, one_of_each).groups(max_bytes)  # refused before the estimates are made
    estimates = _estimates(question, cells, at_once)
    sizes = np.concatenate([np.abs(values).ravel() for values in estimates.values()])
    largest = np.argsort(-np.nan_to_num(sizes, nan=-1.0), kind="stable")[: min(top, int((~np.isnan(sizes)).sum()))]
    chosen = np.isin(np.arange(sizes.size), largest)
    parts = np.split(chosen, np.cumsum([values.size for values in estimates.values()])[:-1])
    chosen = {name: part.reshape(estimates[name].shape) for name, part in zip(estimates, parts, strict=True)}

    def wanted(row: Row) -> bool:
        node, _, *cell = row.place
        return chosen[node][tuple(cell)]

    sweep = Sweep(question, cells, max_bytes, wanted)
    try:
        return _screen(estimates, sweep.until_done(progress))
    except Exception as problem:
        true = problem.result if isinstance(problem, SweepError) else sweep.result()
        raise SweepError(str(problem), _screen(estimates, true)) from problem.__cause__ or problem


def _screen(estimates: dict[str, np.ndarray], true: PatchSweep) -> Screen:
    named = {
        name: values[0, 0].copy(data=estimates[name]).drop_vars(["metric", "pair"])
        for name, values in true.values.items()
    }
    return Screen(named, true)


def _check(cells: Cells, question: Question) -> None:
    for target in cells.targets:
        if target.tail == EXPERT_OUT or target.node.window or target.node.conv:
            raise HookError(f"nodes: {target.node.name} has no gradient of its own; give it to patch_sweep")
    if any(len(positions) > 1 for positions in cells.positions):
        raise InputError("positions: a screen estimates them one by one; give single positions")


def _estimates(question: Question, cells: Cells, at_once: int) -> dict[str, np.ndarray]:
    """Node -> estimated change of the metric's mean over pairs, [layer position], and heads or experts, and channels,
    where cells are told apart by them; 0 after the last reading."""
    model, reads, measure = question.model, list(question.all_reads), Measure(question)
    positions = sorted(p for (p,) in cells.positions if p < question.length)
    found = []
    for of_node in cells.nodes:
        shape = model.config.n_layers, len(cells.positions), *axes_of(of_node).values()
        found.append(np.full(shape, np.nan))
        for target in of_node:
            found[-1][target.layer, :, *map(slice, target.axes.values())] = 0.0
    axes = sorted({"T", *(a for t in cells.targets for a in (t.axis, t.channel_axis) if a)})
    columns = [i for i, (p,) in enumerate(cells.positions) if p < question.length]
    order = [positions.index(cells.positions[i][0]) for i in columns]
    names = [target.name for target in cells.targets]
    for first in range(0, question.pairs, at_once):
        some = question.some(first, at_once)
        prompts = (Prompts(tokens, {}) for tokens in (some.base, some.source))
        measure.add(first, *(logits for _, logits in record(model, *prompts, reads=reads)))
        if not columns:
            continue
        pairs = torch.arange(first, first + some.pairs, device=model.device)
        result = attribution_patching(
            model, some.source, some.base, _mean_share(measure, reads, pairs), names, axes=axes, positions=positions
        )
        for n, of_node in enumerate(cells.nodes):
            for target in of_node:
                own = target.layer, columns, *map(slice, target.axes.values())
                found[n][own] += _by_cell(result.estimates[target.name], target)[order]
    return {of_node[0].node.name: values for of_node, values in zip(cells.nodes, found, strict=True)}


def _pairs_at_once(question: Question, cells: Cells, max_bytes: int) -> int:
    """How many pairs are estimated together: there are values of both runs, zeros with a gradient and their gradients,
    and logits of every position with theirs.

    Raises:
        InputError: ``max_bytes`` too small for one.
    """
    model, length = question.model, question.length
    logits = 2 * length * model.config.d_vocab * model.dtype.itemsize
    positions = [p for (p,) in cells.positions if p < length]
    names = dict.fromkeys((target.name for target in cells.targets), positions)
    need = Need(logits + 4 * values_bytes(model, names, length))
    return room(question, max_bytes, need, f"screening {len(names)} hook points").pairs


def _mean_share(measure: Measure, reads: list[int], pairs: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """What some pairs give to the metric's mean over all."""
    return lambda logits: measure(logits[:, reads], pairs)[0].sum() / measure.question.pairs


def _by_cell(estimate, target: Target) -> np.ndarray:
    """[position, and heads or experts, and groups of channels where cells are told apart by them]"""
    values, axes = estimate.values, list(estimate.axes)
    kept = ["T", *(axis for axis in (target.axis, target.channel_axis) if axis)]
    for axis in [a for a in axes if a not in kept]:
        values = values.sum(axes.index(axis))
        axes.remove(axis)
    values = values.permute([axes.index(axis) for axis in kept]).double().cpu().numpy()
    if target.channel_axis:
        values = np.add.reduceat(values, list(range(0, target.width, target.node.channels)), axis=-1)
    return values
