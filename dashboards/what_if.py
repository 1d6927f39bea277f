"""What pages on which something is changed show of it: the next tokens, and how the prompt is read."""

from __future__ import annotations

import numpy as np
import streamlit as st

from jambascope.dashboards import widgets
from jambascope.dashboards.results.what_if import Change
from jambascope.dashboards.session import View
from jambascope.studies.figures import predictions as figures


def choose_read(view: View) -> int:
    """The position whose prediction is compared; the last to begin with."""
    return choose_token(view, "read", "Prediction after", "The next tokens after this one are compared.")


def choose_token(view: View, key: str, what: str, help: str) -> int:
    """A slider over the prompt's positions under a key of its own; the last position to begin with."""
    last = len(view.ids) - 1
    if last == 0:
        return 0
    widgets.keep_within(key, 0, last)
    at = st.session_state.get(key, widgets.number_of_link(key, last, last))
    label = f"{what} position {at}, “{widgets.plain(view.texts[at])}”"
    return st.slider(label, 0, last, last, key=key, bind="query-params", help=help)


def show(view: View, change: Change, read: int, edited: int | None) -> None:
    """The change of predictions.

    Args:
        edited: the position at which something was changed; None for all.
    """
    first = 0 if edited is None else edited
    _facts(change, read, first)
    if edited is not None and read < edited:
        st.caption(f"Position {read} lies before the edit at {edited}, and nothing there can change.")
    left, right = st.columns([5, 7], gap="medium")
    with left:
        names = [c.text for c in change.candidates]
        sides = (np.array([getattr(c, side) for c in change.candidates]) for side in ("before", "after"))
        token, divergence = view.texts[read], float(change.divergence[read])
        widgets.show(figures.compared(names, *sides, token, read, divergence), "next_tokens_compared")
    with right:
        fig = figures.change_over_prompt(view.texts, change.before, change.after, change.divergence, edited)
        widgets.show(fig, "change_over_prompt")


def _facts(change: Change, read: int, first: int) -> None:
    likeliest = change.candidates[0]
    now = max(change.candidates, key=lambda c: c.after)
    kl, token, rest = st.columns([3, 4, 5])
    kl.metric("KL at the prediction", f"{change.divergence[read]:.3g} nats", help="KL(before || after)")
    token.metric(
        "Likeliest next token",
        f"{widgets.plain(likeliest.text)} → {widgets.plain(now.text)}",
        help=f"probability {likeliest.before:.3f} before, {now.after:.3f} after",
    )
    before, after = change.before[first:], change.after[first:]
    if len(before) == 0:
        rest.metric("Surprisal of the rest", "nothing follows", help="The edit is at the prompt's last position.")
        return
    rest.metric(
        f"Mean surprisal of the {len(before)} tokens after it" if first else "Mean surprisal of the prompt",
        f"{before.mean():.3f} → {after.mean():.3f} nats",
        delta=f"{after.mean() - before.mean():+.3f}",
        delta_color="inverse",
    )
