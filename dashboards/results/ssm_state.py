"""What the SSM state page shows. T position, E channel, N state."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import streamlit as st
import torch

from jambascope.dashboards.session import View
from jambascope.hooks import ssm


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
