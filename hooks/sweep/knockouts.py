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
from jambascope.hooks.sweep.memory import Need, base_bytes, room, states_bytes, values_bytes
from jambascope.hooks.sweep.metrics import Metric
from jambascope.hooks.sweep.nodes import Node, Target, targets
from jambascope.hooks.sweep.progress import Progress
from jambascope.hooks.sweep.question import Question, layers_of, listed, position
from jambascope.hooks.sweep.recorded import Base, Prompts, Recording, record
from jambascope.hooks.sweep.result import KnockOuts
from jambascope.hooks.sweep.rows import Row
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
) -> KnockOuts:
    """The metrics when one edge is knocked out, for every edge and layer: ``changes()`` says what that does.

    ``values["attention"]`` has axes metric, pair (the prompt), layer, edge, and head unless all heads of a layer are
    knocked out together; ``values["mamba"]`` metric, pair, layer, edge. Ctrl-C ends it early with what is done.

    Args:
        prompt: one, or several of one length.
        edges: (query, key) pairs of positions, negative ones from the end; every pair when None.
        layers: all when None.
        form: of the hidden attention of Mamba layers whose entry is taken out.
        max_bytes: of what is kept: streams, keys and values, states, logits, and what is read without an edge. Prompts,
            and the queries of a layer, are swept in several goes where it is not enough for all.

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

    made = KnockOuts

    def __init__(
        self, question: Question, edges: list[Edge], layers: Sequence[int], by_head: bool, form: Form, max_bytes: int
    ) -> None:
        """
        Raises:
            InputError: ``max_bytes`` too small for one prompt.
        """
        super().__init__(question)
        self.form: Form = form
        config = self.model.config
        self.edges, self.layers, self.by_head = edges, layers, by_head
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

        self.passed, length = range(layers[0], config.n_layers), question.length
        of_pair = base_bytes(self.model, length, self.passed, {})
        if self.queries:
            of_pair += max(self._layer_bytes(layer) + self._query_bytes(layer) for layer in layers)
        need = Need(of_pair, states_bytes(self.model, self.passed), self.queries)
        self.room = room(question, max_bytes, need, f"knocking out {len(edges)} edges")

    def run(self) -> Iterator[float]:
        """Measure layer by layer; the share that is done."""
        n = self.room.pairs
        unread = [i for i, (query, _) in enumerate(self.edges) if query >= self.question.length]
        steps, done = len(self.layers) * math.ceil(self.question.pairs / n), 0
        for first in range(0, self.question.pairs, n):
            question = self.question.some(first, n)
            starts = starts_of(self.queries, self.room.states)
            base, _ = Base.record(self.model, question.base, question.all_reads, starts, self.passed, {})
            self.ends(first, base, base.logits)
            yield done / steps
            for layer in self.layers:
                attends = layer in self.model.config.attention_layers
                values = self.values["attention" if attends else "mamba"][:, first : first + n, layer]
                unchanged = self.runs_of_base[:, first : first + n]
                values[:, :, unread] = unchanged.reshape(*unchanged.shape, *(1,) * (values.ndim - 2))
                work, rows = len(self.edges) * question.pairs * math.prod(values.shape[3:]), 0
                for batch in self._layer(question, first, layer, attends, base) if self.queries else ():
                    rows += len(batch)
                    yield (done + rows / work) / steps
                done += 1
                yield done / steps
            del base  # before the next is recorded beside it

    def _layer(self, question: Question, first: int, layer: int, attends: bool, base: Base) -> Iterator[list[Row]]:
        """Edges of one layer, of the pairs from ``first`` on."""
        target, name = self._target(layer), "attention" if attends else "mamba"
        read = (self._attention if attends else self._mamba)(question, layer)
        n = 1 + self.room.left // (question.pairs * self._query_bytes(layer))
        for some in (self.queries[i : i + n] for i in range(0, len(self.queries), n)):
            values = pad_sequence([read(query) for query in some])  # [edge of a query, query, pair, ...]
            source = Recording({target.name: values.transpose(1, 2).flatten(0, 1)}, {target.name: some})
            del values
            rows = list(self._rows(target, name, set(some), first, question.pairs))
            yield from self.batches(Engine(self.model, [target], base, source, question.all_reads), rows)

    def _target(self, layer: int) -> Target:
        attends = layer in self.model.config.attention_layers
        node = Node("attn.hook_z", by="head" if self.by_head else None) if attends else Node("mixer.hook_y")
        return targets(self.model, node, [layer])[0]

    def _query_bytes(self, layer: int) -> int:
        """Of one prompt: what a layer computes without each key of a query, three times as it is put together."""
        most = max(map(len, self.keys.values()))
        return 3 * most * values_bytes(self.model, {self._target(layer).name: (0,)}, 1)

    def _layer_bytes(self, layer: int) -> int:
        """Of one prompt: what the values of a layer without a key are computed from."""
        config, length, dtype = self.model.config, self.question.length, self.model.dtype
        if layer in config.attention_layers:
            seen = values_bytes(self.model, self._seen(layer), length)
            return seen + length * config.n_heads * config.d_head * dtype.itemsize  # values head by head
        wide = torch.promote_types(dtype, torch.float32).itemsize
        inner = config.d_inner * length
        terms = [f"blocks.{layer}.mixer.hook_{name}" for name in ("in_proj", "B", "C")]
        size = values_bytes(self.model, dict.fromkeys(terms, range(length)), length) * wide // dtype.itemsize
        # x, slopes, scales, steps and inputs; one row of weights twice; y; elapsed time in float64 (mixer_terms).
        return size + inner * (8 * wide + torch.float64.itemsize)

    def _rows(self, target: Target, name: str, queries: set[int], begin: int, pairs: int) -> Iterator[Row]:
        for i, (query, key) in enumerate(self.edges):
            if query in queries:
                first = self.keys[query].index(key) * pairs
                for pair in range(pairs):
                    for cell in range(target.cells):
                        place = (name, begin + pair, target.layer, i, *target.place(cell))
                        yield Row(pair, first + pair, 0, (query,), cell, place)

    def _seen(self, layer: int) -> dict[str, Sequence[int]]:
        """Scores and values of an attention layer."""
        prefix = f"blocks.{layer}.attn."
        return {prefix + "hook_attn_scores": self.queries, prefix + "hook_v": range(self.question.length)}

    def _attention(self, question: Question, layer: int) -> Callable[[int], torch.Tensor]:
        """What heads mix without each key of a query, [edge of the query, pair, H, P]."""
        names = self._seen(layer)
        [(recording, _)] = record(self.model, Prompts(question.base, names))
        seen = recording.values
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

    def _mamba(self, question: Question, layer: int) -> Callable[[int], torch.Tensor]:
        """What a scan reads out without each key of a query, [edge of the query, pair, E]."""
        name = f"blocks.{layer}.mixer.hook_y"
        [(recording, _)] = record(self.model, Prompts(question.base, {name: self.queries}))
        y = recording.values[name]
        terms = capture_terms(self.model, question.base, [layer])[layer]
        x = inputs(terms, self.form)

        def read(query: int) -> torch.Tensor:
            keys = self.keys[query]
            weights = hidden_attention(terms, [query], self.form).weights[:, :, 0, keys]  # [pair E key]
            missing = (weights * x[:, keys].transpose(1, 2)).permute(2, 0, 1)
            return y[:, self.queries.index(query)] - missing.to(y.dtype)

        return read

    def result(self, complete: bool = False) -> KnockOuts:
        """What is known so far; queries and keys of the edges are coordinates of their own."""
        found = super().result(complete)
        queries, keys = zip(*self.edges, strict=True)
        ends = {"query": ("edge", list(queries)), "key": ("edge", list(keys))}
        return replace(found, values={name: values.assign_coords(ends) for name, values in found.values.items()})
