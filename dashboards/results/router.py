"""What the Router page shows. T position, X expert."""

from __future__ import annotations

import streamlit as st

from jambascope.dashboards.session import View
from jambascope.hooks import routing


@st.cache_data(max_entries=32, show_spinner=False)
def _route(key: tuple, _view: View) -> dict[int, routing.Routing]:
    return routing.capture_routing(_view.model, _view.tokens)


def route(view: View) -> dict[int, routing.Routing]:
    """What the router of each MoE layer did with each token."""
    return _route(view.key, view)
