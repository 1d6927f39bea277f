"""Rows of a batch, each a prompt with one cell patched, taken from where they first differ to the logits.

Nothing below a patched layer and nothing left of a patched position changes, so a row enters at its layer and its
first position, with what the layers remember of earlier positions taken from the base run. Rows run one behind the
other, each as long as it is; those of higher layers join on the way up, and what leaves the last mixer is computed
where the metrics read it. In the Mamba layer that a row enters all but a few positions read what they read in the base
run, and only the state is carried on. The matrix products that this takes are half of the time (``jambascope bench
sweep``, d_model 128). R row, read: the positions whose logits are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float

from jambascope.devices import index_tensor
from jambascope.hooks.sweep.nodes import Target, enters
from jambascope.hooks.sweep.patches import changed_stream, patch_hooks
from jambascope.hooks.sweep.recorded import Base, Recording
from jambascope.hooks.sweep.rows import Row, Together, by_target
from jambascope.packing import Packing
from jambascope.state import InferenceState, Run

if TYPE_CHECKING:
    from jambascope.model import HookedJamba

TOKENS_AT_ONCE = {"cpu": 8192}
"""Tokens of a batch, about, by device."""
MOST_TOKENS = 1 << 16
"""On other devices."""
NEAR = 8
"""Positions within which rows that hooks patch run side by side."""


def tokens_at_once(model: HookedJamba) -> int:
    return TOKENS_AT_ONCE.get(model.device.type, MOST_TOKENS)


@dataclass
class Engine:
    """A model, the run that is patched into, and the values that are put in."""

    model: HookedJamba
    targets: Sequence[Target]
    base: Base
    source: Recording
    reads: tuple[int, ...]
    """Ascending."""

    @torch.no_grad()
    def logits(self, rows: Sequence[Row]) -> Float[torch.Tensor, "R read vocab"]:
        """The logits of rows, which are sorted by :meth:`order`."""
        model, x, together, joined = self.model, None, None, 0
        whole = self._together(rows)
        by_layer = {
            layer: list(group) for layer, group in groupby(rows, key=lambda row: self.targets[row.target].layer)
        }
        with model._lock:
            for layer in range(min(by_layer), model.config.n_layers):
                joining = by_layer.get(layer, [])
                entering = sum(self._entering[row.target] for row in joining)
                mixed, last = None, layer == model.config.n_layers - 1
                if entering:
                    more, joined = whole.part(joined, joined + entering), joined + entering
                    mixed = self._mixed_from_base(layer, more)
                    if mixed is None:
                        x, together = _joined(x, self._patched_stream(layer, more)), whole.part(0, joined)
                    elif last:
                        mixed = mixed.index_select(1, more.at(self.reads))
                if together is not None:
                    x = self._mix(layer, x, together, together.at(self.reads) if last else None)
                if mixed is not None:
                    x, together = _joined(x, mixed), whole.part(0, joined)
                if x is not None:
                    run = Run(1, x.shape[1], x.device, None, None)
                    run.into_stream = True  # nobody else has it
                    x = model.blocks[layer].feed(x, run)
                for target, rows_of_target in by_target(joining[entering:]):
                    more, joined = whole.part(joined, joined + len(rows_of_target)), joined + len(rows_of_target)
                    within = self._after_layer(layer, target, more)
                    if last:
                        within = within.index_select(1, more.at(self.reads))
                    x, together = _joined(x, within), whole.part(0, joined)
            logits = model.unembed(model.ln_final(x))[0]
        having, read = together.having(self.reads)
        if len(having) == len(rows) * len(self.reads):
            return logits.view(len(rows), len(self.reads), -1)
        found = self.base.logits.index_select(0, together.pairs)
        found[index_tensor(having, x.device), index_tensor(read, x.device)] = logits
        return found

    def __post_init__(self) -> None:
        self._entering = [enters(target) for target in self.targets]
        """Of each target, whether its patch is of what enters the layer."""

    def order(self, row: Row) -> tuple:
        """What rows are sorted by: those that share a base run's scan stand together, and those that hooks patch at one
        position."""
        entering, where = self._entering[row.target], (row.pair, row.positions)
        return self.targets[row.target].layer, not entering, row.target, *(where if entering else where[::-1])

    def _together(self, rows: Sequence[Row]) -> Together:
        return Together(rows, self.base, self.model.device)

    def _patched_stream(self, layer: int, together: Together) -> torch.Tensor:
        x, (entries, at) = together.stream(layer), together.patched()
        x[0, at] = self.source.at(f"blocks.{layer}.hook_resid_pre", entries.prompts, entries.positions)
        return x

    def _mixed_from_base(self, layer: int, together: Together) -> Float[torch.Tensor, "1 token d_model"] | None:
        """The stream after the mixer of the layer that rows enter, where little of what it reads differs from the base
        run: the layer runs from a row's start to where the convolution forgets the patch, and from there on only the
        state still does. None for other mixers, and where what the base's scan read is not kept."""
        model, block, base, packing = self.model, self.model.blocks[layer], self.base, together.packing
        inputs = base.mixing(layer)
        if inputs is None:
            return None
        device, last = self.model.device, np.array([row.positions[-1] for row in together.rows])
        ends = np.minimum(last + model.config.d_conv, base.length)
        begun = Packing(packing.starts, base.length, device, ends)
        in_begun = packing.tokens(begun.row_of, begun.position_of)
        later = np.ones(packing.bounds[-1], dtype=bool)
        later[in_begun] = False
        in_begun, later = index_tensor(in_begun, device), index_tensor(np.flatnonzero(later), device)

        x = self._patched_stream(layer, together)
        state = InferenceState([base.memory(model, layer, together.pair_of, together.entries)] * model.config.n_layers)
        run = Run(1, len(in_begun), device, None, state, packing=begun)
        run.packed_states = {}
        mixed = block.mix(x.index_select(1, in_begun), run)
        added = block.mixer.carry_on(run.packed_states[layer], together.pair_of, ends, inputs)
        return x.index_copy_(1, in_begun, mixed).index_add_(1, later, added.to(x.dtype))

    def _mix(
        self, layer: int, x: torch.Tensor, together: Together, reads: torch.Tensor | None
    ) -> Float[torch.Tensor, "1 token d_model"]:
        """The first half of a layer; where only the tokens ``reads`` are wanted of what leaves it, those."""
        model, packing = self.model, together.packing
        memory = self.base.memory(model, layer, together.pair_of, together.entries)
        state = InferenceState([memory] * model.config.n_layers)
        run = Run(1, x.shape[1], x.device, None, state, packing=packing)
        run.into_stream = True
        return model.blocks[layer].mix(x, run, reads)

    def _after_layer(self, layer: int, target: int, together: Together) -> Float[torch.Tensor, "1 token d_model"]:
        """The stream after a layer within which rows are patched."""
        found = changed_stream(self.model, self.base, self.source, self.targets[target], together)
        if found is not None:
            return found
        parts = [self._hooked(layer, target, rows) for rows in self._near(together)]
        return torch.cat(parts, dim=1)

    def _near(self, together: Together) -> list[list[Row]]:
        """Rows that begin at one position or, while they are few, close to each other."""
        groups: list[list[Row]] = []
        begin = before = 0
        few = tokens_at_once(self.model) // 4
        for row, start in zip(together.rows, together.packing.starts, strict=True):
            full = groups and len(groups[-1]) * (self.base.length - begin) >= few
            if not groups or not begin <= start < begin + NEAR or (full and start > before):
                groups.append([])
                begin = start
            groups[-1].append(row)
            before = start
        return groups

    def _hooked(self, layer: int, target: int, rows: list[Row]) -> Float[torch.Tensor, "1 token d_model"]:
        """The stream after a layer that hooks patch: of each row from where it begins, run side by side from where the
        first does."""
        model, together = self.model, self._together(rows)
        start, packing = int(together.packing.starts.min()), together.packing
        x = self.base.stream(layer)[:, start:].index_select(0, together.pairs)
        state = None
        if start:
            starts = partial(self.base.entries, together.pair_of, np.full(len(rows), start))
            memory = self.base.memory(model, layer, together.pair_of, starts)
            state = InferenceState([memory.gathered()] * model.config.n_layers, start)
        model._clock.start, model._clock.length = start, x.shape[1]
        hooks = patch_hooks(model, self.base, self.source, self.targets[target], rows)
        with model.hooks(hooks):
            after = model.blocks[layer](x, Run(len(x), x.shape[1], x.device, None, state))
        return after[packing.rows, packing.positions - start][None]


def _joined(x: torch.Tensor | None, more: torch.Tensor) -> torch.Tensor:
    return more if x is None else torch.cat((x, more), dim=1)
