"""What the Patching page shows: the sweep between two prompts, its maps, one cell run by itself. V vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import streamlit as st
import torch
from jaxtyping import Float

from jambascope import HookedJamba
from jambascope.dashboards.session import View
from jambascope.dashboards.work import Report
from jambascope.errors import HookError, InputError
from jambascope.hooks import run, sweep
from jambascope.hooks.sweep import metrics
from jambascope.hooks.sweep.nodes import Node, Target, interventions, needed, targets
from jambascope.studies.prompt_pairs import one_token

WINDOWED, WITH_CONV = "ssm_state windowed", "ssm_state with conv"
KINDS = {
    "resid_pre": "the stream that enters a layer",
    "attn_out": "what attention adds to the stream",
    "mixer_out": "what a Mamba mixer adds to the stream",
    "mlp_out": "what the feed-forward adds to the stream",
    "z": "output of each attention head",
    "q": "queries of each head",
    "k": "keys of each key-value head",
    "v": "values of each key-value head",
    "pattern": "attention of each head",
    "ssm_state": "the SSM state, which flows on (persistent)",
    WINDOWED: "the SSM state, seen by a few read-outs only",
    WITH_CONV: "the SSM state and the convolution's last inputs",
    "ssm_read": "one read-out of the SSM state (transient)",
    "x": "input of the scan, after convolution and SiLU",
    "dt": "step sizes of the scan",
    "B": "what is written to the state",
    "C": "what is read from the state",
    "y": "output of the scan, before the gate",
    "router_logits": "router logits: experts are chosen again",
    "expert_weights": "expert weights: experts are chosen again",
    "expert_out": "what each expert adds to the stream",
}
"""Node kind -> its meaning."""
FIRST_KINDS = ("resid_pre", "attn_out", "mixer_out", "mlp_out")
DIFFERENCE, MASS = "logit difference", "label-set mass"
METRICS = {
    DIFFERENCE: "logits",
    "probability": "probability",
    "log probability": "nats",
    "KL divergence": "nats",
    "rank": "tokens that are likelier",
    MASS: "probability",
}
"""Metric -> its unit."""
NEVER_NEGATIVE = ("probability", "KL divergence", "rank", MASS)
EFFECT, CHANGE, VALUE = "normalised effect", "change", "raw value"
AT_ONCE = 1500
"""Sweeps of up to so many cells begin without being asked."""


@dataclass(frozen=True)
class Asked:
    """What decides a sweep, besides the model and the two prompts."""

    metric: str
    correct: int
    wrong: int
    labels: tuple[int, ...]
    kinds: tuple[str, ...]
    window: int
    direction: Literal["denoise", "noise"]
    layers: tuple[int, int]
    """First and last."""
    positions: tuple[int, int]

    def node(self, kind: str) -> Node:
        return node_of(kind, self.window)


@dataclass(frozen=True)
class Cell:
    """One patch."""

    kind: str
    layer: int
    position: int
    unit: int = 0
    """Head or expert; 0 where there is no such choice."""


# -- what is asked -----------------------------------------------------------------------------------------------


def node_of(kind: str, window: int) -> Node:
    if kind in (WINDOWED, WITH_CONV):
        return Node("ssm_state", window=window) if kind == WINDOWED else Node("ssm_state", conv=True)
    return Node(kind)


def kinds_of(model: HookedJamba) -> list[str]:
    """The node kinds that some layer of a model has."""

    def has(kind: str) -> bool:
        try:
            return bool(targets(model, node_of(kind, 1)))
        except HookError:
            return False

    return [kind for kind in KINDS if has(kind)]


def targets_of(model: HookedJamba, asked: Asked, kind: str) -> list[Target]:
    """A kind in those of the chosen layers that have it."""
    first, last = asked.layers
    return [target for target in targets(model, asked.node(kind)) if first <= target.layer <= last]


def cells_of(model: HookedJamba, asked: Asked, first: int) -> int:
    """How many patches a sweep is, of prompts that are the same before ``first``."""
    positions = max(0, asked.positions[1] + 1 - max(first, asked.positions[0]))
    return sum(t.cells * positions for kind in asked.kinds for t in targets_of(model, asked, kind))


def parts_of(model: HookedJamba, asked: Asked) -> list[tuple[list[str], list[int] | None]]:
    """Kinds that are swept together, and their layers: one part where all layers are asked for.

    Raises:
        InputError: none of the chosen layers has any of the kinds.
    """
    if asked.layers == (0, model.config.n_layers - 1):
        return [(list(asked.kinds), None)]
    parts: dict[tuple[int, ...], list[str]] = {}
    for kind in asked.kinds:
        parts.setdefault(tuple(t.layer for t in targets_of(model, asked, kind)), []).append(kind)
    parts.pop((), None)
    if not parts:
        raise InputError(
            f"layers {asked.layers[0]} to {asked.layers[1]} have no {', '.join(asked.kinds)}; choose more layers, or "
            "other nodes"
        )
    return [(kinds, list(layers)) for layers, kinds in parts.items()]


def metric_of(asked: Asked) -> sweep.Metric:
    makes = {
        DIFFERENCE: lambda: metrics.logit_difference(asked.correct, asked.wrong),
        "probability": lambda: metrics.probability(asked.correct),
        "log probability": lambda: metrics.log_probability(asked.correct),
        "KL divergence": metrics.kl_divergence,
        "rank": lambda: metrics.rank(asked.correct),
        MASS: lambda: metrics.label_mass(list(asked.labels)),
    }
    return makes[asked.metric]()


def token_of(model: HookedJamba, field: str, text: str) -> int:
    """The id of a token given by its text, or by its number where a model has no tokenizer.

    Raises:
        InputError: no token, or several.
    """
    if model.tokenizer is not None:
        return one_token(model, field, text)
    highest = model.config.d_vocab - 1
    if not text.strip().isdecimal() or int(text) > highest:
        raise InputError(f"{field}={text!r} is no token id; this checkpoint has no tokenizer, so give 0 to {highest}")
    return int(text)


def text_of(view: View, token: int) -> str:
    return view.model.to_string(torch.tensor([token]))


def both_texts(view: View, other: View) -> list[str]:
    """The tokens of two prompts of one length; both where they differ."""
    return [a if a == b else f"{a}/{b}" for a, b in zip(view.texts, other.texts, strict=True)]


def differing(view: View, other: View) -> list[int]:
    """Positions in which two prompts differ.

    Raises:
        InputError: prompts of different lengths, or equal ones.
    """
    n, m = len(view.ids), len(other.ids)
    pairs = enumerate(zip(view.ids, other.ids, strict=False))
    found = [position for position, (a, b) in pairs if a != b]
    if n != m:
        first = found[0] if found else min(n, m)
        remedy = f"{'shorten' if m > n else 'lengthen'} the corrupted one by {abs(n - m)} (they part at {first})"
        raise InputError(
            f"the clean prompt has {n} tokens and the corrupted one {m}; a patch needs prompts that correspond token "
            f"by token, so {remedy}"
        )
    if not found:
        raise InputError("the clean and the corrupted prompt are the same; change a word of the corrupted one")
    return found


# -- what is found -----------------------------------------------------------------------------------------------


@st.cache_data(max_entries=32, show_spinner=False)
def _first_tokens(key: tuple, ids: tuple[int, ...], _view: View, _other: View) -> tuple[int, int]:
    with torch.no_grad():
        clean, corrupted = _view.model(torch.cat([_view.tokens, _other.tokens]))[:, -1].float()
    correct = int(clean.argmax())
    order = corrupted.argsort(descending=True, stable=True)[:2].tolist()
    return correct, next((token for token in order if token != correct), correct)


def first_tokens(view: View, other: View) -> tuple[int, int]:
    """The likeliest next token of the clean run; and of the corrupted run its likeliest other than that."""
    return _first_tokens(view.key, other.ids, view, other)


def key_of(view: View, other: View, asked: Asked) -> tuple:
    return view.key, other.ids, asked


def computing(view: View, other: View, asked: Asked) -> Callable[[Report], sweep.PatchSweep]:
    """What :func:`jambascope.dashboards.work.result` is to run."""

    def compute(report: Report) -> sweep.PatchSweep:
        parts, done = parts_of(view.model, asked), None
        first, last = asked.positions
        positions = None if last - first + 1 == len(view.ids) else range(first, last + 1)
        for i, (kinds, layers) in enumerate(parts):

            def told(share: float, found: sweep.PatchSweep, i=i, kinds=kinds, done=done) -> bool:
                return report((i + share) / len(parts), f"patching {', '.join(kinds)}", _joined(done, found))

            with torch.no_grad():
                found = sweep.patch_sweep(
                    view.model, view.tokens, other.tokens, metric_of(asked), [asked.node(kind) for kind in kinds],
                    layers=layers, positions=positions, direction=asked.direction, progress=told,
                )  # fmt: skip
            done = _joined(done, found)
            if not done.complete:
                break
        return done

    return compute


def _joined(first: sweep.PatchSweep | None, second: sweep.PatchSweep) -> sweep.PatchSweep:
    """Sweeps of different nodes as one."""
    if first is None:
        return second
    values = first.values | second.values
    return sweep.PatchSweep(values, second.clean, second.corrupted, second.direction, second.complete)


def cell_words(view: View, asked: Asked, cell: Cell) -> str:
    """What is patched in a cell."""
    (target,) = targets(view.model, asked.node(cell.kind), [cell.layer])
    unit = f" {target.unit_name.replace('_', ' ')} {cell.unit}" if target.axis else ""
    return f"{target.node.name} of layer {cell.layer}{unit}"


def metric_words(view: View, asked: Asked) -> str:
    """What is measured, in words."""
    correct, wrong = (f"“{text_of(view, token)}”" for token in (asked.correct, asked.wrong))
    labels = ", ".join(f"“{text_of(view, token)}”" for token in asked.labels)
    return {
        DIFFERENCE: f"logit of {correct} less that of {wrong}",
        "KL divergence": "KL(clean ‖ patched)",
        MASS: f"probability of {labels} together",
    }.get(asked.metric, f"{asked.metric} of {correct}")


def run_names(asked: Asked) -> tuple[str, str, str]:
    """The runs before the patch, with it, and that the values are from."""
    ends = ("corrupted", "clean") if asked.direction == "denoise" else ("clean", "corrupted")
    return f"{ends[0]} (before)", "patched", ends[1]


@dataclass(frozen=True)
class Patched:
    """The next-token logits of three runs, and the metric of each."""

    base: Float[np.ndarray, " V"]
    patched: Float[np.ndarray, " V"]
    source: Float[np.ndarray, " V"]
    values: tuple[float, float, float]


@st.cache_data(max_entries=64, show_spinner=False)
def _patch(key: tuple, cell: Cell, _view: View, _other: View) -> Patched:
    asked, model = key[2], _view.model
    base, source = (_other, _view) if asked.direction == "denoise" else (_view, _other)
    (target,) = targets(model, asked.node(cell.kind), [cell.layer])
    with torch.no_grad():
        tokens = torch.cat([base.tokens, source.tokens])
        ends = run(model, tokens, capture=needed(target))
        before, values = ({name: ends.cache[name][[at]] for name in ends.cache.keys()} for at in (0, 1))
        put = interventions(model, target, [cell.position], cell.unit, values, before)
        patched = run(model, tokens, put)  # of both rows, so that a patch of nothing changes nothing, to the last bit
        logits = torch.stack([ends.logits[0, -1], patched.logits[0, -1], ends.logits[1, -1]]).float()
        clean, corrupted = (2, 0) if asked.direction == "denoise" else (0, 2)
        metric, pair = metric_of(asked), torch.zeros(3, dtype=torch.long, device=logits.device)
        given = (logits[None, [at]] for at in (clean, corrupted))
        reference = metrics.Reference(pair, *given, metrics.token_ids(model, metric, 1))
        measured = metric.function(logits[:, None], reference).tolist()
    return Patched(*logits.cpu().numpy(), tuple(measured))


def patch(view: View, other: View, asked: Asked, cell: Cell) -> Patched:
    """One cell of the sweep, run by itself."""
    return _patch(key_of(view, other, asked), cell, view, other)


def table_of(view: View, found: Patched, most: int = 5) -> list[dict]:
    """The likeliest tokens of any of three runs, those of the patched one first."""
    shares = [
        np.exp(own - own.max()) / np.exp(own - own.max()).sum() for own in (found.base, found.patched, found.source)
    ]
    best = [np.argsort(-own, kind="stable")[:most] for own in shares]
    tokens = dict.fromkeys(int(token) for own in (best[1], best[0], best[2]) for token in own)
    before, patched, source = shares
    return [
        {
            "token": text_of(view, token), "before": float(before[token]),
            "patched": float(patched[token]), "source": float(source[token]),
            "change": float(found.patched[token] - found.base[token]),
        }
        for token in sorted(tokens, key=lambda token: -patched[token])
    ]  # fmt: skip
