"""What the Attention page shows, reduced while the forward pass runs. T position, H head."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import streamlit as st
import torch

from jambascope.dashboards.session import View
from jambascope.studies.figures.attention import GRID_CELLS, pool


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
