"""Rows of a batch, each a prompt with one cell patched, taken from where they first differ to the logits.

Nothing below a patched layer and nothing left of a patched position changes, so a row enters at its layer and at the
first position of its batch, with what the layers remember of earlier positions taken from the base run. Rows of higher
layers join those of lower ones on the way up, and what leaves the last mixer is computed where the metrics read it. The
matrix products that this takes are half of the time (the sides of ``jambascope bench sweep``, d_model 128, CPU time of
one thread: 2.0 times the products alone at 8 layers x 64 positions, 1.5 at every 16th of 32 x 256); of the rest the
scans are the largest part. R row, read: the positions whose logits are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float

from jambascope.devices import index_tensor
from jambascope.hooks.sweep.nodes import Target
from jambascope.hooks.sweep.patches import Entries, Row, by_target, changed_stream, patch_hooks
from jambascope.hooks.sweep.recorded import Base, Recording
from jambascope.state import Run

if TYPE_CHECKING:
    from jambascope.model import HookedJamba


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
    def logits(self, rows: Sequence[Row], start: int) -> Float[torch.Tensor, "R read vocab"]:
        """The logits of rows that are patched at ``start`` (one of the base's starts) or later.

        ``rows`` are sorted by :meth:`order`.
        """
        model, here = self.model, [p - start for p in self.reads if p >= start]
        layers = [self.targets[row.target].layer for row in rows]
        x: torch.Tensor | None = None
        with model._lock:
            for layer in range(layers[0], model.config.n_layers):
                last = layer == model.config.n_layers - 1
                joining = [row for row, at in zip(rows, layers, strict=True) if at == layer]
                entering = [row for row in joining if self._enters(row)]
                if entering:
                    x = _joined(x, self._patched_stream(layer, entering, start))
                present = [row for row, at in zip(rows, layers, strict=True) if at < layer] + entering
                if x is not None:
                    x = self._block(layer, x, present, start, here if last else None)
                for rows_of_target in by_target([row for row in joining if not self._enters(row)]):
                    within = self._after_layer(layer, *rows_of_target, start)
                    x = _joined(x, within[:, here] if last else within)
            logits = model.unembed(model.ln_final(x))
        if len(here) == len(self.reads):
            return logits
        pairs = index_tensor([row.pair for row in rows], logits.device)
        earlier = self.base.logits[:, : -len(here)].index_select(0, pairs)
        return torch.cat((earlier, logits), dim=1)

    def order(self, row: Row) -> tuple:
        """What rows are sorted by."""
        return self.targets[row.target].layer, not self._enters(row), row.target

    def _enters(self, row: Row) -> bool:
        """Whether a row's patch is of what enters its layer."""
        target = self.targets[row.target]
        return target.tail == "hook_resid_pre" and target.channel_axis is None

    def _patched_stream(self, layer: int, rows: list[Row], start: int) -> torch.Tensor:
        pairs = index_tensor([row.pair for row in rows], self.model.device)
        x = self.base.stream(layer, pairs, start)
        entries = Entries.of(rows, self.base.length, x.device)
        places = index_tensor([p - start for p in entries.positions], x.device)
        x[entries.rows, places] = self.source.at(f"blocks.{layer}.hook_resid_pre", entries.prompts, entries.positions)
        return x

    def _after_layer(self, layer: int, target: int, rows: list[Row], start: int) -> torch.Tensor:
        """The stream after a layer within which rows are patched."""
        found = changed_stream(self.model, self.base, self.source, self.targets[target], rows, start)
        if found is not None:
            return found
        pairs = index_tensor([row.pair for row in rows], self.model.device)
        hooks = patch_hooks(self.model, self.base, self.source, self.targets[target], rows)
        return self._block(layer, self.base.stream(layer, pairs, start), rows, start, hooks=hooks)

    def _block(
        self,
        layer: int,
        x: torch.Tensor,
        rows: Sequence[Row],
        start: int,
        reads: list[int] | None = None,
        hooks: Sequence[tuple[str, Callable]] = (),
    ) -> torch.Tensor:
        """One layer; where only ``reads`` are wanted of what leaves it, [R read D]."""
        model, block = self.model, self.model.blocks[layer]
        pairs = index_tensor([row.pair for row in rows], x.device)
        run = Run(len(x), x.shape[1], x.device, None, self.base.memory(model, layer, pairs, start))
        model._clock.start, model._clock.length = start, x.shape[1]
        if not hooks:  # not block(x, run), which for one token takes the kernel of generation: seconds to compile
            return block.feed(block.mix(x, run, reads), run)
        with model.hooks(list(hooks)):
            return block(x, run)


def _joined(x: torch.Tensor | None, more: torch.Tensor) -> torch.Tensor:
    return more if x is None else torch.cat((x, more))
