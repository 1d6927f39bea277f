"""Edge knock-outs: what the metric loses when one position no longer sees another, in one layer.

In attention the key's score becomes -inf for one query of one head, and the softmax renormalises the rest (attention
knockout, Geva et al., arXiv 2304.14767). A Mamba layer has no weights that sum to one: there the key's write is taken
out of the state as the query reads it, the entry alpha[query, key] of its hidden attention in every channel, and what
other positions read stays; or, with ``form="conv"``, all that the key's input to the convolution gives to the query,
convolution and direct path included. Both change one position of what the layer mixes, so a cell costs what one of
``patch_sweep`` at that position does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from torch.nn.utils.rnn import pad_sequence

from jambascope.errors import InputError
from jambascope.hooks.hidden_attention import Form, hidden_attention, inputs
from jambascope.hooks.intervals import at_least
from jambascope.hooks.mixer_terms import capture_terms
from jambascope.hooks.sweep.batches import starts_of
from jambascope.hooks.sweep.engine import Engine
from jambascope.hooks.sweep.metrics import Metric
from jambascope.hooks.sweep.nodes import Node, Target, targets
from jambascope.hooks.sweep.patches import Row
from jambascope.hooks.sweep.progress import Progress
from jambascope.hooks.sweep.question import Measure, Question, layers_of, listed, position
from jambascope.hooks.sweep.recorded import Base, Recording, record
from jambascope.hooks.sweep.result import Effects
from jambascope.hooks.sweep.running import Running

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
    form: Literal["alpha", "conv"] = "alpha",
    progress: bool | Progress = True,
    max_bytes: int = 1 << 30,
) -> Effects:
    """The metrics when one edge is knocked out, for every edge and layer: ``changes()`` says what that does.

    ``values["attention"]`` has axes metric, pair (the prompt), layer, edge, and head unless all heads of a layer are
    knocked out together; ``values["mamba"]`` metric, pair, layer, edge. Ctrl-C ends it early with what is done.

    Args:
        prompt: one, or several of one length.
        edges: (query, key) pairs of positions, negative ones from the end; every pair when None.
        layers: all when None.
        form: of the hidden attention of Mamba layers whose entry is taken out.
        max_bytes: of what is read without an edge. The queries of a layer are swept in several goes where it is not
            enough for all.

    Raises:
        HookError: a layer that does not exist.
        InputError: an unknown form; as ``patch_sweep``, and for an edge whose key stands after its query.
    """
    at_least("max_bytes", max_bytes)
    if form not in ("alpha", "conv"):
        raise InputError(f"form={form!r} must be 'alpha' (what is written to the state) or 'conv' (with convolution)")
    question = Question.of(model, prompt, prompt, metric)
    chosen = layers_of(model, layers) or range(model.config.n_layers)
    return _KnockOuts(question, _edges(edges, question), chosen, by_head, form, max_bytes).until_done(progress)


def _edges(edges: Iterable[Edge] | None, question: Question) -> list[Edge]:
    n = question.prompt_length
    if edges is None:
        return [(query, key) for query in range(question.length) for key in range(query + 1)]
    found: dict[Edge, None] = {}
    for edge in listed(edges):
        if not isinstance(edge, (tuple, list)) or len(edge) != 2:
            raise InputError(f"edges: {edge!r} must be a pair (query, key)")
        query, key = (position(p, n, f"edges: {edge}") for p in edge)
        if key > query:
            raise InputError(f"edges {edge}: the key stands after its query, which cannot see it anyway")
        if (query, key) in found:
            raise InputError(f"edges: {edge} is given twice")
        found[query, key] = None
    if not found:
        raise InputError("edges=[] knocks out nothing; leave it out for every pair of positions")
    return list(found)


class _KnockOuts(Running):
    """Every edge in every layer."""

    def __init__(
        self, question: Question, edges: list[Edge], layers: Sequence[int], by_head: bool, form: Form, max_bytes: int
    ) -> None:
        super().__init__(question)
        self.form: Form = form
        config = self.model.config
        self.edges, self.layers, self.by_head, self.max_bytes = edges, layers, by_head, max_bytes
        self.keys: dict[int, list[int]] = {}
        """Query -> the keys that it loses, one at a time."""
        for query, key in edges:
            self.keys.setdefault(query, []).append(key)
        self.queries = sorted(query for query in self.keys if query < question.length)
        """Those that something read comes after."""
        coords = {"layer": list(range(config.n_layers)), "edge": [f"{q} <- {k}" for q, k in edges]}
        if set(layers) & set(config.attention_layers):
            self.add("attention", coords | ({"head": list(range(config.n_heads))} if by_head else {}))
        if set(layers) & set(config.ssm_layers):
            self.add("mamba", coords)

    def run(self) -> Iterator[float]:
        """Measure layer by layer; the share that is done."""
        question, config = self.question, self.model.config
        layers = range(self.layers[0], config.n_layers)
        rows = [Row(0, 0, 0, (query,), 0, ()) for query in self.queries]
        starts = starts_of(self.model, rows, question.length, question.pairs, self.max_bytes)
        base = Base.record(self.model, question.base, question.all_reads, starts, layers, {})
        measure = Measure(question, base.logits, base.logits)
        self.runs = measure.runs()
        unread = [i for i, (query, _) in enumerate(self.edges) if query >= question.length]
        for i, layer in enumerate(self.layers):
            attends = layer in config.attention_layers
            values = self.values["attention" if attends else "mamba"][:, :, layer]
            values[:, :, unread] = self.base.reshape(*self.base.shape, *(1,) * (values.ndim - 2))
            work, done = len(self.edges) * question.pairs * math.prod(values.shape[3:]), 0
            for batch in self._layer(layer, attends, base, measure) if self.queries else ():
                done += len(batch)
                yield (i + done / work) / len(self.layers)
            yield (i + 1) / len(self.layers)

    def _layer(self, layer: int, attends: bool, base: Base, measure: Measure) -> Iterator[list[Row]]:
        node = Node("attn.hook_z", by="head" if self.by_head else None) if attends else Node("mixer.hook_y")
        (target,) = targets(self.model, node, [layer])
        read = (self._attention if attends else self._mamba)(layer)
        n = self._queries_at_once(target)
        for some in (self.queries[i : i + n] for i in range(0, len(self.queries), n)):
            values = pad_sequence([read(query) for query in some])  # [edge of a query, query, pair, ...]
            source = Recording({target.name: values.transpose(1, 2).flatten(0, 1)}, {target.name: some})
            rows = list(self._rows(target, "attention" if attends else "mamba", set(some)))
            yield from self.measure(Engine(self.model, [target], base, source, self.question.all_reads), measure, rows)

    def _rows(self, target: Target, name: str, queries: set[int]) -> Iterator[Row]:
        pairs = self.question.pairs
        for i, (query, key) in enumerate(self.edges):
            if query in queries:
                first = self.keys[query].index(key) * pairs
                for pair in range(pairs):
                    for unit in range(target.units):
                        place = (name, pair, target.layer, i, unit)
                        yield Row(pair, first + pair, 0, (query,), unit, place if target.axis else place[:-1])

    def _queries_at_once(self, target: Target) -> int:
        most = max(map(len, self.keys.values()))
        size = target.row.nbytes(self.model.config, self.question.pairs, most, self.model.dtype)
        return max(1, self.max_bytes // (3 * size))

    def _attention(self, layer: int) -> Callable[[int], torch.Tensor]:
        """What heads mix without each key of a query, [edge of the query, pair, H, P]."""
        names = {f"blocks.{layer}.attn.hook_attn_scores": self.queries}
        names[f"blocks.{layer}.attn.hook_v"] = range(self.question.length)
        seen = record(self.model, self.question.base, names)[0].values
        scores, v = (seen[name] for name in names)
        v = v.repeat_interleave(self.model.config.n_heads // self.model.config.n_key_value_heads, dim=2)

        def read(query: int) -> torch.Tensor:
            keys = torch.tensor(self.keys[query], device=v.device)
            without = torch.arange(v.shape[1], device=v.device) == keys[:, None]
            left = scores[:, :, self.queries.index(query)].masked_fill(without[:, None, None], float("-inf"))
            # A query that has lost its only key sees nothing.
            pattern = left.softmax(-1, dtype=torch.promote_types(v.dtype, torch.float32)).nan_to_num().to(v.dtype)
            return torch.einsum("kbhs,bshp->kbhp", pattern, v)

        return read

    def _mamba(self, layer: int) -> Callable[[int], torch.Tensor]:
        """What a scan reads out without each key of a query, [edge of the query, pair, E]."""
        name = f"blocks.{layer}.mixer.hook_y"
        y = record(self.model, self.question.base, {name: self.queries})[0].values[name]
        terms = capture_terms(self.model, self.question.base, [layer])[layer]
        x = inputs(terms, self.form)

        def read(query: int) -> torch.Tensor:
            keys = self.keys[query]
            weights = hidden_attention(terms, [query], self.form).weights[:, :, 0, keys]  # [pair E key]
            missing = (weights * x[:, keys].transpose(1, 2)).permute(2, 0, 1)
            return y[:, self.queries.index(query)] - missing.to(y.dtype)

        return read

    def result(self, complete: bool = False) -> Effects:
        """What is known so far; queries and keys of the edges are coordinates of their own."""
        found = super().result(complete)
        queries, keys = zip(*self.edges, strict=True)
        ends = {"query": ("edge", list(queries)), "key": ("edge", list(keys))}
        return replace(found, values={name: values.assign_coords(ends) for name, values in found.values.items()})
