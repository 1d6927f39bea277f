"""What the Overview shows: the cost of the model's parts, what it expects next, after which layer, and through which
parts. T position, V vocabulary, R entry of the residual stream, W position of a window."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import streamlit as st
import torch
from torch import nn

from jambascope import HookedJamba
from jambascope.dashboards.models import Checkpoint
from jambascope.dashboards.session import View
from jambascope.errors import InputError
from jambascope.hooks import predictions
from jambascope.hooks.attribution import LogitAttribution, direct_logit_attribution, place_of
from jambascope.hooks.logit_lens import logit_lens
from jambascope.memory import kv_cache_bytes_per_token, mamba_state_bytes, model_cost
from jambascope.studies.figures.predictions import Contribution, Lens
from jambascope.studies.figures.theme import KIND_NAMES, MAX_NAMED_TOKENS

LENGTHS = (1 << 10, 1 << 12, 1 << 15, 1 << 17, 1 << 18)
"""At which memory is told: 1K to 256K tokens."""
WINDOW = MAX_NAMED_TOKENS
"""Positions that the logit lens shows at once."""
MOST_ROWS = 48
"""With more entries of the stream than this, those between mixer and feed-forward are left out."""


@dataclass(frozen=True)
class Predictions:
    surprisal: np.ndarray
    """[T-1], nats."""
    entropy: np.ndarray
    """[T], nats."""
    likeliest: int
    """The model's own next token after the prompt."""
    candidates: list[predictions.NextToken]
    """At the chosen position."""
    next_rank: int | None
    """Rank of the token that does follow; None at the last position."""


@st.cache_data(max_entries=64, show_spinner=False)
def _predict(key: tuple, position: int, k: int, _view: View) -> Predictions:
    with torch.no_grad():
        logits = _view.model(_view.tokens)[0]
    tokens = _view.tokens[0]
    last = position == len(_view.ids) - 1
    return Predictions(
        predictions.surprisal(logits, tokens).cpu().numpy(),
        predictions.entropy(logits).cpu().numpy(),
        int(logits[-1].argmax()),
        predictions.next_tokens(_view.model, logits[position], k),
        None if last else predictions.rank_of(logits[position], _view.ids[position + 1]),
    )


def predict(view: View, position: int, k: int) -> Predictions:
    """Surprisal and entropy at every position, the next-token table at one."""
    return _predict(view.key, position, k, view)


@dataclass(frozen=True)
class Parameters:
    total: int
    active: int
    """Those that one token passes through: of the experts only those it is sent to."""
    mixers: list[int]
    feed_forwards: list[int]


@st.cache_data(max_entries=8, show_spinner=False)
def _parameters(checkpoint: Checkpoint, _model: HookedJamba) -> Parameters:
    cost = model_cost(_model.config)
    mixers = [_count(block.attn if block.is_attention else block.mixer) for block in _model.blocks]
    feed_forwards = [_count(block.mlp) if block.has_feed_forward else 0 for block in _model.blocks]
    return Parameters(cost.parameters, cost.active_parameters, mixers, feed_forwards)


def parameters(view: View) -> Parameters:
    """Numbers of parameters, tied ones once."""
    return _parameters(view.checkpoint, view.model)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# -- memory ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes; those of one sequence beside those of the weights."""

    weights: int
    kv_per_token: int
    state: int
    """SSM states and last inputs of the convolutions, at any length."""
    kv_if_all_attention: int | None
    """Per token, if every layer were attention; None where no layer is, or all are."""

    def kv(self, length: int) -> int:
        return self.kv_per_token * length

    def parts(self) -> dict[str, list[int]]:
        """What ``memory_by_length`` draws, at ``LENGTHS``."""
        return {
            "weights": [self.weights] * len(LENGTHS),
            "KV cache": [self.kv(n) for n in LENGTHS],
            "SSM and convolution state": [self.state] * len(LENGTHS),
            "KV cache if all layers were attention": [(self.kv_if_all_attention or 0) * n for n in LENGTHS],
        }


def memory(view: View) -> Memory:
    """What the open model takes, and a sequence beside it."""
    config, dtype = view.model.config, view.model.dtype
    kv = kv_cache_bytes_per_token(config, dtype)
    mixed = config.attention_layers and config.ssm_layers
    return Memory(
        sum(p.numel() * p.element_size() for p in view.model.parameters()),
        kv,
        mamba_state_bytes(config, dtype) if config.ssm_layers else 0,
        kv // len(config.attention_layers) * config.n_layers if mixed else None,
    )


# -- the logit lens --------------------------------------------------------------------------------------------


@st.cache_data(max_entries=32, show_spinner=False)
def _lens(key: tuple, start: int, likeliest: int, _view: View) -> Lens:
    model, tokens = _view.model, _view.tokens
    positions = range(start, min(start + WINDOW, len(_view.ids)))
    follow = [*_view.ids[1:], likeliest]
    mid = 2 * model.config.n_layers + 1 <= MOST_ROWS
    targets = torch.tensor([[follow[p] for p in positions]])
    found = logit_lens(model, tokens, positions=positions, incl_mid=mid, targets=targets, top_k=1)
    top = found.top_tokens[:, 0, :, 0].tolist()
    names = {i: model.to_string(torch.tensor([i])) for i in {i for row in top for i in row} | {follow[-1]}}
    fields = (found.top_probabilities[..., 0], found.target_probabilities, found.target_ranks, found.entropy, found.kl)
    return Lens(
        tuple(_entry(model, label) for label in found.labels),
        start,
        tuple(_view.texts[p + 1] if p + 1 < len(_view.ids) else names[follow[-1]] for p in positions),
        tuple(tuple(names[i] for i in row) for row in top),
        *(field[:, 0].float().cpu().numpy() for field in fields),
    )


def _entry(model: HookedJamba, label: str) -> str:
    """The part after which the stream is read, as in ``Mamba 3`` or ``MoE 3``."""
    where, entry = label.split("_")
    layer = model.config.n_layers if where == "final" else int(where)
    if entry == "mid":
        return f"{KIND_NAMES[model.config.mixers[layer]]} {layer}"
    if layer == 0:
        return "embedding"
    kind = model.config.feed_forwards[layer - 1]
    kind = {"none": KIND_NAMES[model.config.mixers[layer - 1]], "moe": "MoE"}.get(kind, kind)
    return f"{kind} {layer - 1}"


def lens(view: View, start: int, likeliest: int) -> Lens:
    """At most ``WINDOW`` positions from ``start`` on.

    Args:
        likeliest: the model's own next token, which is followed at the last position.
    """
    return _lens(view.key, start, likeliest, view)


# -- direct logit attribution ----------------------------------------------------------------------------------


def token_id(view: View, text: str, field: str) -> int:
    """The id of one token, written as text, or as its id where there is no tokenizer.

    Raises:
        InputError: anything else.
    """
    try:
        found = view.model.to_single_token(text)
    except InputError as problem:
        raise InputError(f"{field}={text!r}: {problem}") from None
    if not 0 <= found < view.model.config.d_vocab:
        raise InputError(f"{field}={text!r} is outside the vocabulary; ids run to {view.model.config.d_vocab - 1}")
    return found


@st.cache_data(max_entries=64, show_spinner=False)
def _attribute(key: tuple, position: int, target: int, other: int, _view: View) -> LogitAttribution:
    found = direct_logit_attribution(_view.model, _view.tokens[:, : position + 1], target, other)
    return LogitAttribution(found.labels, found.values.float().cpu(), found.positions, found.logits.float().cpu())


def attribute(view: View, position: int, target: int, other: int) -> LogitAttribution:
    """What every component adds to the logit of ``target`` less that of ``other``, after ``position``."""
    return _attribute(view.key, position, target, other, view)


def contributions(view: View, found: LogitAttribution) -> list[Contribution]:
    """The components with their kinds."""
    config, listed = view.model.config, []
    for label, value in zip(found.labels, found.values[:, 0, 0].tolist(), strict=True):
        place = place_of(label)
        kind = "embed" if place is None else (config.mixers, config.feed_forwards)[place[1]][place[0]]
        listed.append(Contribution(_named(label, kind), kind, value))
    return listed


def _named(label: str, kind: str) -> str:
    """As in ``Mamba 3``, ``dense 0``, ``embedding``; heads and slots of experts keep theirs, as in ``L4H3``."""
    if kind == "embed":
        return "embedding"
    if "_" not in label:
        return label
    short = "dense" if kind == "dense" else "MoE" if kind == "moe" else KIND_NAMES[kind]
    return f"{short} {label.split('_')[0]}"


# -- code ------------------------------------------------------------------------------------------------------


def code(position: int, k: int, part: str, start: int, tokens: tuple[int, int] | None) -> str:
    """The lines that compute what is shown.

    Args:
        part: of the page that is looked at.
        start: the lens's first position.
        tokens: ids of the two tokens that are compared.
    """
    lines = [
        "import torch",
        "",
        "from jambascope.hooks import predictions",
        "",
        "tokens = model.to_tokens(prompt)",
        "with torch.no_grad():",
        "    logits = model(tokens)[0]",
        f"candidates = predictions.next_tokens(model, logits[{position}], {k})",
        "surprisal, entropy = predictions.surprisal(logits, tokens[0]), predictions.entropy(logits)",
        "",
    ]
    return "\n".join([*lines, *_code_of(part, position, start, tokens)])


def _code_of(part: str, position: int, start: int, tokens: tuple[int, int] | None) -> list[str]:
    if part == "logit lens":
        return [
            "from jambascope.hooks.logit_lens import logit_lens",
            "",
            "follows = torch.cat([tokens[:, 1:], logits[None, -1:].argmax(-1)], 1)",
            f"positions = range({start}, min({start + WINDOW}, tokens.shape[1]))",
            f"mid = 2 * model.config.n_layers + 1 <= {MOST_ROWS}",
            "targets = follows[:, positions.start : positions.stop]",
            "lens = logit_lens(model, tokens, positions=positions, incl_mid=mid, targets=targets, top_k=1)",
        ]
    if part == "logit attribution" and tokens is not None:
        return [
            "from jambascope.hooks.attribution import direct_logit_attribution",
            "",
            f"found = direct_logit_attribution(model, tokens[:, : {position + 1}], {tokens[0]}, {tokens[1]})",
            "by_layer = found.by_layer(model.config.n_layers)",
        ]
    return [
        "from jambascope.memory import kv_cache_bytes_per_token, mamba_state_bytes, weight_bytes",
        "",
        "config, dtype = model.config, model.dtype",
        "weights, state = weight_bytes(config, dtype), mamba_state_bytes(config, dtype)",
        f"kv_cache = {{length: kv_cache_bytes_per_token(config, dtype) * length for length in {LENGTHS}}}",
    ]
