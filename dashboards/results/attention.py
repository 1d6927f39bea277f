"""What the Attention page shows, reduced while the forward pass runs. T position, H head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import streamlit as st
import torch

from jambascope.dashboards.session import View
from jambascope.dashboards.work import Report
from jambascope.hooks.heads import KINDS, Kind, has_targets, score_heads
from jambascope.hooks.hidden_attention import Form, attention_map
from jambascope.hooks.looks import looks_by_layer
from jambascope.hooks.mixer_terms import capture_terms
from jambascope.hooks.pattern_difference import pattern_difference
from jambascope.studies.figures.attention import GRID_CELLS, LARGE_CELLS, block_edges, pool
from jambascope.studies.figures.theme import MAX_NAMED_TOKENS

ONE_HEAD, MAMBA, DIFFERENCE = "one head", "attention and Mamba", "difference"
KIND_WORDS: dict[Kind, str] = {
    "induction": "induction",
    "previous_token": "previous token",
    "duplicate_token": "duplicate",
}


class Extent(NamedTuple):
    """Which part of a pattern is shown: all of it in blocks, or ``span`` queries and keys from here on."""

    pooled: bool
    first_query: int
    first_key: int
    span: int


def everything(length: int) -> Extent:
    """Of a short prompt token by token, of a long one in blocks."""
    return Extent(length > MAX_NAMED_TOKENS, 0, 0, length)


# -- attention -------------------------------------------------------------------------------------------------


@st.cache_data(max_entries=16, show_spinner=False)
def _grid(key: tuple, _view: View) -> dict[int, np.ndarray]:
    found: dict[int, np.ndarray] = {}

    def reduce(pattern: torch.Tensor, hook) -> None:
        found[hook.layer()] = np.stack([pool(one.float().cpu().numpy(), GRID_CELLS) for one in pattern[0]])

    names = [f"blocks.{layer}.attn.hook_pattern" for layer in _view.model.config.attention_layers]
    with torch.no_grad(), _view.model.hooks([(name, reduce) for name in names]):
        _view.model(_view.tokens, return_type=None)
    return found


def grid(view: View) -> dict[int, np.ndarray]:
    """Attention layer -> every head's pattern [H cells cells], the maximum over blocks."""
    return _grid(view.key, view)


@st.cache_resource(max_entries=8, show_spinner=False)
def _pattern(key: tuple, layer: int, head: int, _view: View) -> np.ndarray:
    kept: list[np.ndarray] = []

    def keep(pattern: torch.Tensor, hook) -> None:
        kept.append(pattern[0, head].float().cpu().numpy().copy())

    with torch.no_grad(), _view.model.hooks([(f"blocks.{layer}.attn.hook_pattern", keep)]):
        _view.model(_view.tokens, return_type=None)
    return kept[0]


def pattern(view: View, layer: int, head: int) -> np.ndarray:
    """One head's pattern, [T T]. Shared, not copied, between reruns: read only."""
    return _pattern(view.key, layer, head, view)


@st.cache_data(max_entries=32, show_spinner=False)
def _scores(key: tuple, _view: View) -> dict[Kind, tuple[np.ndarray, float]]:
    kinds = [kind for kind in KINDS if has_targets(kind, _view.tokens)]
    if not kinds:
        return {}
    found = score_heads(_view.model, _view.tokens, kinds, control=False)
    return {kind: (found[kind].mean.numpy(), found[kind].uniform) for kind in kinds}


def scores(view: View) -> dict[Kind, tuple[np.ndarray, float]]:
    """Of each kind that the prompt has something to look at for: every head's score [layers H], and that of even
    attention."""
    return _scores(view.key, view)


def badges(view: View, kind: Kind | None) -> tuple[dict, dict]:
    """What the corner of each small pattern shows, the score of ``kind`` or (None) the highest; what hovering tells."""
    found = scores(view)
    corners: dict[int, list[tuple[str, float]]] = {}
    notes: dict[int, list[str]] = {}
    if not found or (kind is not None and kind not in found):
        return corners, notes
    shape = next(iter(found.values()))[0].shape
    for row, layer in enumerate(view.model.config.attention_layers):
        for head in range(shape[1]):
            own = {name: float(values[row, head]) for name, (values, _) in found.items()}
            first = kind or max(own, key=own.get)
            corners.setdefault(layer, []).append((KIND_WORDS[first], own[first]))
            said = [f"{KIND_WORDS[k]} {v:.3f} (even attention {found[k][1]:.3f})" for k, v in own.items()]
            notes.setdefault(layer, []).append("<br>".join(said))
    return corners, notes


@dataclass(frozen=True)
class Difference:
    variation: dict[int, np.ndarray]
    """Attention layer -> total variation of each head, [H]."""
    pattern: np.ndarray
    """[T T] of the chosen head, second prompt less first."""


@st.cache_resource(max_entries=8, show_spinner=False)
def _difference(key: tuple, other: tuple[int, ...], layer: int, head: int, _view: View, _other: View) -> Difference:
    found = pattern_difference(_view.model, _view.tokens, _other.tokens, layer, head)
    return Difference(dict(zip(found.layers, found.variation.numpy(), strict=True)), found.difference.numpy())


def difference(view: View, other: View, layer: int, head: int) -> Difference:
    """Patterns on another prompt less those on this one. Shared between reruns: read only.

    Raises:
        InputError: prompts of different lengths.
    """
    return _difference(view.key, other.ids, layer, head, view, other)


# -- Mamba -----------------------------------------------------------------------------------------------------


def hidden(view: View, layer: int, form: Form, extent: Extent, report: Report) -> np.ndarray | None:
    """Hidden attention of a Mamba layer, [span span] or in blocks [cells cells]; None where it was stopped."""
    terms = capture_terms(view.model, view.tokens, [layer])[layer]
    length, shown = len(view.ids), slice(extent.first_key, extent.first_key + extent.span)
    if extent.pooled:
        edges = block_edges(length, LARGE_CELLS)
    else:
        edges = block_edges(extent.span, 16)
    rows = []
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        queries = range(extent.first_query + low, extent.first_query + high)
        part = attention_map(terms, queries, form)[0].cpu().numpy()
        if extent.pooled:
            starts = block_edges(length, LARGE_CELLS)[:-1]
            rows.append(np.maximum.reduceat(part.max(0, keepdims=True), starts, axis=1))
        else:
            rows.append(part[:, shown])
        if not report(high / edges[-1], f"hidden attention of layer {layer}"):
            return None
    return np.concatenate(rows)


@st.cache_data(max_entries=32, show_spinner=False)
def _looks(key: tuple, position: int, form: Form, _view: View) -> dict[int, np.ndarray]:
    found = looks_by_layer(_view.model, _view.tokens, position, form)
    return {layer: row.cpu().numpy() for layer, row in found.items()}


def looks(view: View, position: int, form: Form) -> dict[int, np.ndarray]:
    """Where one query looks in every layer: layer -> [T], each summing to 1."""
    return _looks(view.key, position, form, view)


# -- the code that computes it -----------------------------------------------------------------------------------


def code_of_head(layer: int, head: int, position: int, kinds: tuple[Kind, ...]) -> str:
    lines = [
        "from jambascope.hooks import run",
        "",
        f'name = "blocks.{layer}.attn.hook_pattern"',
        f"pattern = run(model, prompt, capture=[name]).cache[name][0, {head}]  # [query, key]",
        f"looks_at = pattern[{position}]",
        f"looked_at_by = pattern[:, {position}]",
    ]
    if kinds:
        lines[1:1] = ["from jambascope.hooks.heads import score_heads"]
        lines += [
            "",
            f"scores = score_heads(model, prompt, {kinds!r}, control=False)",
            "badges = {kind: score.mean for kind, score in scores.items()}  # each [attention layer, head]",
        ]
    return "\n".join(lines)


def code_of_mixer(layer: int, form: Form, position: int) -> str:
    return f"""\
from jambascope.hooks.hidden_attention import attention_map
from jambascope.hooks.looks import looks_by_layer
from jambascope.hooks.mixer_terms import capture_terms

tokens = model.to_tokens(prompt)
terms = capture_terms(model, tokens, [{layer}])[{layer}]
hidden = attention_map(terms, range(tokens.shape[1]), form={form!r})[0]  # [query, key]
rows = looks_by_layer(model, tokens, {position}, form={form!r})  # layer -> [key]"""


def code_of_difference(layer: int, head: int, other_prompt: str) -> str:
    return f"""\
from jambascope.hooks.pattern_difference import pattern_difference

other_prompt = {other_prompt!r}
found = pattern_difference(model, model.to_tokens(prompt), model.to_tokens(other_prompt), {layer}, {head})
difference = found.difference  # [query, key], other prompt less prompt
variation = found.variation  # [attention layer, head]"""
