"""What the Overview shows: the cost of the model's parts, and what it expects next. T position, V vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import streamlit as st
import torch
from torch import nn

from jambascope import HookedJamba
from jambascope.dashboards.models import Checkpoint
from jambascope.dashboards.session import View
from jambascope.hooks import predictions
from jambascope.memory import model_cost


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
