"""What a forward pass of the prompt gave, reduced while it runs to what the pages show, and cached.

Axes: T position, H head, E channel, N state, X expert, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import streamlit as st
import torch
from torch import nn

from jambascope import HookedJamba
from jambascope.dashboards.session import Checkpoint, View
from jambascope.hooks import predictions, routing, ssm
from jambascope.memory import model_cost
from jambascope.studies.figures.attention import GRID_CELLS, pool


@dataclass(frozen=True)
class Predictions:
    surprisal: np.ndarray
    """[T-1], nats."""
    entropy: np.ndarray
    """[T], nats."""
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
        predictions.next_tokens(_view.model, logits[position], k),
        None if last else predictions.rank_of(logits[position], _view.ids[position + 1]),
    )


def predict(view: View, position: int, k: int) -> Predictions:
    """Surprisal and entropy at every position, the next-token table at one."""
    return _predict(view.key, position, k, view)


@dataclass(frozen=True)
class Attention:
    grid: dict[int, np.ndarray]
    """Attention layer -> [H cells cells], the maximum over blocks."""
    pattern: np.ndarray
    """[T T] of the chosen head."""


@st.cache_data(max_entries=16, show_spinner=False)
def _attend(key: tuple, layer: int, head: int, _view: View) -> Attention:
    grid: dict[int, np.ndarray] = {}
    kept: dict[int, np.ndarray] = {}

    def reduce_to(at: int):
        def hook(pattern: torch.Tensor, hook) -> None:
            grid[at] = np.stack([pool(one.float().cpu().numpy(), GRID_CELLS) for one in pattern[0]])
            if at == layer:
                kept[at] = pattern[0, head].float().cpu().numpy().copy()

        return hook

    names = [(f"blocks.{at}.attn.hook_pattern", reduce_to(at)) for at in _view.model.config.attention_layers]
    with torch.no_grad(), _view.model.hooks(names):
        _view.model(_view.tokens, return_type=None)
    return Attention(grid, kept[layer])


def attend(view: View, layer: int, head: int) -> Attention:
    """Every head's pattern pooled as it appears, and one head's whole."""
    return _attend(view.key, layer, head, view)


@st.cache_data(max_entries=16, show_spinner=False)
def _norms(key: tuple, _view: View) -> dict[int, np.ndarray]:
    return {layer: norm.numpy() for layer, norm in ssm.state_norms(_view.model, _view.tokens).items()}


def norms(view: View) -> dict[int, np.ndarray]:
    """Mamba layer -> size of its state after each position, [T]."""
    return _norms(view.key, view)


@dataclass(frozen=True)
class Memory:
    states: np.ndarray
    """[E T N]"""
    dt: np.ndarray
    """[T E]"""
    A: np.ndarray
    """[E N]"""
    half_lives: np.ndarray
    """[E N], tokens."""
    groups: list[np.ndarray]
    """Channels of each octile, short half-lives first."""
    bounds: list[tuple[float, float]]
    """Shortest and longest channel half-life of each group, tokens."""
    norms: np.ndarray
    """[G T]"""


@st.cache_resource(max_entries=2, show_spinner=False)
def _remember(key: tuple, layer: int, _view: View) -> Memory:
    captured = ssm.capture_states(_view.model, _view.tokens, layer)
    half_lives = ssm.half_life(captured.A, captured.dt)
    groups = ssm.channel_groups(half_lives)
    per_channel = ssm.channel_half_life(half_lives)
    return Memory(
        captured.states.numpy(),
        captured.dt.numpy(),
        captured.A.numpy(),
        half_lives.numpy(),
        [members.numpy() for members in groups],
        [(float(per_channel[g].min()), float(per_channel[g].max())) for g in groups],
        ssm.group_norms(captured.states, groups).numpy(),
    )


def remember(view: View, layer: int) -> Memory:
    """The states of one Mamba layer. Shared, not copied, between reruns: read only."""
    return _remember(view.key, layer, view)


def retained(memory: Memory, position: int) -> np.ndarray:
    """[G position+1]: what is left, after ``position``, of the state after each position before it."""
    groups = [torch.from_numpy(members) for members in memory.groups]
    A, dt = torch.from_numpy(memory.A), torch.from_numpy(memory.dt)
    return ssm.group_retention(A, dt, position, groups).numpy()


@st.cache_data(max_entries=32, show_spinner=False)
def _route(key: tuple, _view: View) -> dict[int, routing.Routing]:
    return routing.capture_routing(_view.model, _view.tokens)


def route(view: View) -> dict[int, routing.Routing]:
    """What the router of each MoE layer did with each token."""
    return _route(view.key, view)


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
