"""Induction."""

from __future__ import annotations

import streamlit as st

from jambascope.dashboards.session import View


def page(view: View) -> None:
    st.title("Induction")
