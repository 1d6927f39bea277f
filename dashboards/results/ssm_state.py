"""What the SSM state page shows. T position, E channel, N state."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import streamlit as st
import torch

from jambascope.dashboards.results import what_if
from jambascope.dashboards.session import View
from jambascope.hooks import ssm
from jambascope.hooks.memory_edits import memory_edits

GROUPS = 8


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
    groups = ssm.channel_groups(half_lives, GROUPS)
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
    return ssm.group_retention(*_decay(memory), position, _groups(memory)).numpy()


def surviving(memory: Memory, position: int) -> np.ndarray:
    """[G T-position]: what is left, after each later position, of what is written at ``position``."""
    return ssm.group_survival(*_decay(memory), position, _groups(memory)).numpy()


def _decay(memory: Memory) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(memory.A), torch.from_numpy(memory.dt)


def _groups(memory: Memory) -> list[torch.Tensor]:
    return [torch.from_numpy(members) for members in memory.groups]


# -- what if --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Edit:
    """Arguments of :func:`jambascope.hooks.memory_edits.memory_edits`."""

    layers: tuple[int, ...]
    position: int
    source: int | None
    lasting: bool
    conv: bool
    group: int | None


@st.cache_data(max_entries=64, show_spinner=False)
def _change(key: tuple, edit: Edit, read: int, _view: View) -> what_if.Change:
    interventions = memory_edits(_view.model, _view.tokens, groups=GROUPS, **vars(edit))
    return what_if.compare(_view, interventions, read)


def change(view: View, edit: Edit, read: int) -> what_if.Change:
    """What the edit changes in the predictions, and in the next tokens after the position ``read``."""
    return _change(view.key, edit, read, view)


# -- code -----------------------------------------------------------------------------------------------------


def memory_code(layer: int, position: int) -> str:
    """Lines that compute the figures of sizes and of what is left."""
    return f"""
from jambascope.hooks import ssm

tokens = model.to_tokens(prompt)
norms = ssm.state_norms(model, tokens)  # Mamba layer -> [T]
{_captured(layer)}
group_norms = ssm.group_norms(memory.states, groups)  # [G T]
retention = ssm.group_retention(memory.A, memory.dt, {position}, groups)  # [G T], up to this position
survival = ssm.group_survival(memory.A, memory.dt, {position}, groups)  # [G T], from it on
"""


def channel_code(layer: int, position: int, channel: int) -> str:
    """Lines that compute the maps of channels and one channel's states."""
    return f"""
import torch

from jambascope.hooks import ssm

tokens = model.to_tokens(prompt)
{_captured(layer)}
order = torch.cat(groups)
after = memory.states[order, {position}]  # [E N]
channel = memory.states[{channel}]  # [T N]
steps = memory.dt[:, {channel}]  # [T]
"""


def _captured(layer: int) -> str:
    return f"""memory = ssm.capture_states(model, tokens, {layer})
half_lives = ssm.half_life(memory.A, memory.dt)  # [E N], tokens
groups = ssm.channel_groups(half_lives, {GROUPS})"""


def what_if_code(edit: Edit, read: int) -> str:
    """Lines that make the edit and compare the predictions."""
    options = {"source": None, "lasting": True, "conv": False, "group": None}
    said = "".join(f", {name}={value!r}" for name in options if (value := getattr(edit, name)) != options[name])
    return f"""
import torch

from jambascope.hooks import predictions, run
from jambascope.hooks.memory_edits import memory_edits

tokens = model.to_tokens(prompt)
edits = memory_edits(model, tokens, {list(edit.layers)}, {edit.position}{said})
{what_if.code(read).strip()}
"""
