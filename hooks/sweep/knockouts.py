"""Edge knock-outs: what the metric loses when one position no longer sees another, in one layer.

In attention the key's score becomes -inf for one query of one head, and the softmax renormalises the rest (attention
knockout, Geva et al., arXiv 2304.14767). A Mamba layer has no weights that sum to one: there the key's write is taken
out of the state as the query reads it, the entry alpha[query, key] of its hidden attention in every channel, and what
other positions read stays. Both change one position of what the layer mixes, so a cell costs what one of
``patch_sweep`` at that position does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import xarray as xr

from jambascope.errors import HookError, InputError
from jambascope.hooks.hidden_attention import hidden_attention, inputs
from jambascope.hooks.mixer_terms import capture_terms
from jambascope.hooks.sweep.batches import measured, starts_of
from jambascope.hooks.sweep.engine import Engine
from jambascope.hooks.sweep.metrics import Metric
from jambascope.hooks.sweep.nodes import Node, targets
from jambascope.hooks.sweep.patches import Row
from jambascope.hooks.sweep.progress import Progress, watched
from jambascope.hooks.sweep.question import Measure, Question, position
from jambascope.hooks.sweep.recorded import Base, Recording, record
from jambascope.hooks.sweep.result import Effects

if TYPE_CHECKING:
    from jambascope.model import HookedJamba, Input

Edge = tuple[int, int]
"""(query, key)"""


@torch.no_grad()
def knock_out_sweep(
    model: HookedJamba,
    prompt: Input,
    metric: Metric | Callable | Sequence[Metric | Callable],
    edges: Iterable[Edge] | None = None,
    *,
    layers: Iterable[int] | None = None,
    by_head: bool = True,
    progress: bool | Progress = True,
) -> Effects:
    """The metrics when one edge is knocked out, for every edge and layer: ``changes()`` says what that does.

    ``values["attention"]`` has axes metric, pair (the prompt), layer, edge, and head unless all heads of a layer are
    knocked out together; ``values["mamba"]`` metric, pair, layer, edge. Ctrl-C ends it early with what is done.

    Args:
        prompt: one, or several of one length.
        edges: (query, key) pairs of positions, negative ones from the end; every pair when None.
        layers: all when None.

    Raises:
        HookError: a layer that does not exist.
        InputError: as ``patch_sweep``, and for an edge whose key stands after its query.
    """
    question = Question.of(model, prompt, prompt, metric)
    chosen = range(model.config.n_layers) if layers is None else tuple(layers)
    if unknown := [layer for layer in chosen if layer not in range(model.config.n_layers)]:
        raise HookError(f"layers: this model has layers 0..{model.config.n_layers - 1}, not {unknown[0]!r}")
    sweep = _KnockOuts(question, _edges(edges, question), sorted(chosen), by_head)
    with watched(progress) as show:
        try:
            for share in sweep.run():
                if show(share, sweep.result) is False:
                    return sweep.result()
        except KeyboardInterrupt:
            return sweep.result()
    return sweep.result(complete=True)


def _edges(edges: Iterable[Edge] | None, question: Question) -> list[Edge]:
    n = question.prompt_length
    if edges is None:
        return [(query, key) for query in range(question.length) for key in range(query + 1)]
    found = []
    for edge in edges:
        if not isinstance(edge, (tuple, list)) or len(edge) != 2:
            raise InputError(f"edges: {edge!r} must be a pair (query, key)")
        query, key = (position(p, n, f"edges: {edge}") for p in edge)
        if key > query:
            raise InputError(f"edges {edge}: the key stands after its query, which cannot see it anyway")
        if (query, key) in found:
            raise InputError(f"edges: {edge} is given twice")
        found.append((query, key))
    if not found:
        raise InputError("edges=[] knocks out nothing; leave it out for every pair of positions")
    return found


class _KnockOuts:
    """Every edge in every layer."""

    def __init__(self, question: Question, edges: list[Edge], layers: list[int], by_head: bool) -> None:
        self.question, self.model, self.edges, self.layers = question, question.model, edges, layers
        config, n = self.model.config, len(question.metrics)
        self._place: dict[Edge, int] = {}
        """Edge -> how many of its query's edges come before it."""
        seen: dict[int, int] = {}
        for query, key in edges:
            self._place[query, key] = seen[query] = seen.get(query, -1) + 1
        self.queries, self._most = sorted(q for q in seen if q < question.length), max(seen.values()) + 1
        self.heads = config.n_heads if by_head else 1
        self._node = Node("attn.hook_z", by="head" if by_head else None)
        shape = n, question.pairs, config.n_layers, len(edges)
        self.values = {}
        if set(layers) & set(config.attention_layers):
            self.values["attention"] = np.full((*shape, self.heads), np.nan)
        if set(layers) & set(config.ssm_layers):
            self.values["mamba"] = np.full((*shape, 1), np.nan)
        self.by_head, self.runs = by_head, {}

    def run(self) -> Iterator[float]:
        """Measure layer by layer; the share that is done."""
        question, config = self.question, self.model.config
        rows = [Row(0, 0, 0, (query,), 0, ()) for query in self.queries]
        starts = starts_of(self.model, rows, question.length, question.pairs, 1 << 29)
        base = Base.record(self.model, question.base, starts, range(self.layers[0], config.n_layers), {})
        measure = Measure(question, base.logits, base.logits)
        self.runs = measure.runs()
        for i, layer in enumerate(self.layers):
            attends = layer in config.attention_layers
            found = self.values["attention" if attends else "mamba"]
            found[:, :, layer] = self.runs["clean"][..., None, None]  # of queries that nothing read comes after
            for batch, metrics in self._layer(layer, attends, base, measure) if self.queries else ():
                for row, values in zip(batch, metrics.T, strict=True):
                    found[:, row.pair, layer, row.place[0], row.unit] = values
                yield (i + len(batch) / (len(self.edges) * question.pairs * found.shape[-1])) / len(self.layers)
            yield (i + 1) / len(self.layers)

    def _layer(self, layer: int, attends: bool, base: Base, measure: Measure) -> Iterator[tuple[list[Row], np.ndarray]]:
        (target,) = targets(self.model, self._node if attends else Node("mixer.hook_y"), [layer])
        values = self._attention(layer) if attends else self._mamba(layer)
        pairs = self.question.pairs
        source = Recording({target.name: values.flatten(0, 1)}, {target.name: self.queries})
        rows = [
            Row(pair, self._place[edge] * pairs + pair, 0, (edge[0],), unit, (i,))
            for i, edge in enumerate(self.edges)
            if edge[0] < self.question.length
            for pair in range(pairs)
            for unit in range(target.units)
        ]
        yield from measured(Engine(self.model, [target], base, source, self.question.all_reads), measure, rows)

    def _keys(self, query: int) -> list[int]:
        return [key for q, key in self.edges if q == query]

    def _attention(self, layer: int) -> torch.Tensor:
        """What heads mix without each key of a query, [edge of the query, pair, query, H, P]."""
        names = {f"blocks.{layer}.attn.hook_attn_scores": self.queries}
        names[f"blocks.{layer}.attn.hook_v"] = range(self.question.length)
        seen = record(self.model, self.question.base, names)[0].values
        scores, v = (seen[name] for name in names)
        v = v.repeat_interleave(self.model.config.n_heads // self.model.config.n_key_value_heads, dim=2)
        mixed = v.new_zeros(self._most, self.question.pairs, len(self.queries), *v.shape[2:])
        for i, query in enumerate(self.queries):
            keys = torch.tensor(self._keys(query), device=v.device)
            without = torch.arange(v.shape[1], device=v.device) == keys[:, None]
            left = scores[:, :, i].masked_fill(without[:, None, None], float("-inf"))  # [key pair H S]
            pattern = left.softmax(-1, dtype=torch.promote_types(v.dtype, torch.float32)).nan_to_num().to(v.dtype)
            mixed[: len(keys), :, i] = torch.einsum("kbhs,bshp->kbhp", pattern, v)
        return mixed

    def _mamba(self, layer: int) -> torch.Tensor:
        """What a scan reads out without each key of a query, [edge of the query, pair, query, E]."""
        name = f"blocks.{layer}.mixer.hook_y"
        y = record(self.model, self.question.base, {name: self.queries})[0].values[name]
        terms = capture_terms(self.model, self.question.base, [layer])[layer]
        x = inputs(terms, "alpha")
        read = y.expand(self._most, *y.shape).clone()
        for i, query in enumerate(self.queries):
            keys = self._keys(query)
            weights = hidden_attention(terms, [query], "alpha").weights[:, :, 0, keys]  # [pair E key]
            read[: len(keys), :, i] -= (weights * x[:, keys].transpose(1, 2)).permute(2, 0, 1).to(y.dtype)
        return read

    def result(self, complete: bool = False) -> Effects:
        """What is known so far."""
        runs = {"metric": [m.name for m in self.question.metrics], "pair": list(range(self.question.pairs))}
        arrays = {}
        for name, values in self.values.items():
            coords = runs | {"layer": list(range(values.shape[2])), "edge": [f"{q} <- {k}" for q, k in self.edges]}
            dims = list(coords)
            if name == "attention" and self.by_head:
                coords, dims = coords | {"head": list(range(self.heads))}, [*dims, "head"]
            else:
                values = values[..., 0]
            of_edge = {
                name: ("edge", list(column))
                for name, column in zip(("query", "key"), zip(*self.edges, strict=True), strict=True)
            }
            arrays[name] = xr.DataArray(values, coords | of_edge, dims)
        end = xr.DataArray(self.runs["clean"], runs, list(runs))
        return Effects(arrays, end, end, "noise", complete)
