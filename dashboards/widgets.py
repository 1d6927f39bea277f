"""Widgets that several pages show: choosers that live in the URL, figures and tables with their data, code, errors."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
import streamlit as st

from jambascope.errors import JambascopeError
from jambascope.studies import page as report
from jambascope.studies.figures.data import table_of

if TYPE_CHECKING:
    from jambascope.dashboards.session import View

FULL, STRETCHED = "0 to 1", "stretched"
IMAGES = ("svg", "png")


# -- what is chosen --------------------------------------------------------------------------------------------


def choose(label: str, options: Sequence[str], key: str, help: str | None = None) -> str:
    """One of a few words, side by side; the first to begin with, kept in the URL under ``key``."""
    if st.session_state.get(key) not in (None, *options):
        st.session_state[key] = options[0]
    return st.segmented_control(
        label, options, default=options[0], required=True, key=key, bind="query-params", help=help
    )


def choose_scale(help: str) -> bool:
    """Whether colours of weights are stretched over those shown instead of running from 0 to 1."""
    return choose("Colour scale", (FULL, STRETCHED), "scale", help) == STRETCHED


def choose_image() -> None:
    """The format of the pictures that the camera button of a figure saves."""
    choose("Pictures are saved as", IMAGES, "image", "By the camera button that appears over a figure.")


def choose_position(view: View, help: str) -> int:
    """A slider over the prompt's positions, shared by all pages through the URL; the last position to begin with."""
    last = len(view.ids) - 1
    if last == 0:
        st.caption(f"Position 0, {plain(view.texts[0])}: the prompt's only token.")
        return 0
    keep_within("position", 0, last)
    at = st.session_state.get("position", number_of_link("position", last, last))
    label = f"Position {at}, token “{plain(view.texts[at])}”"
    return st.slider(label, 0, last, last, key="position", bind="query-params", help=help)


def number_of_link(key: str, last: int, default: int) -> int:
    """The number that a widget will take from the URL when it is made for the first time."""
    asked = st.query_params.get(key, "")
    return int(asked) if asked.isdecimal() and int(asked) <= last else default


def keep_within(key: str, low: int, high: int) -> None:
    """Move a number left over from another prompt or model into the range that its widget now has."""
    if key in st.session_state:
        st.session_state[key] = min(max(st.session_state[key], low), high)


def choose_layer(layers: Sequence[int], key: str, label: str, help: str | None = None) -> int:
    """A layer, head, expert or channel among those there are, kept in the URL under ``key``."""
    if st.session_state.get(key) not in (None, *layers):
        st.session_state[key] = layers[0]  # left over from another model
    return st.selectbox(label, layers, key=key, bind="query-params", format_func=str, help=help)


# -- what is shown ---------------------------------------------------------------------------------------------


def show(fig: go.Figure, key: str, **options: Any) -> Any:
    """A figure over the full width; its picture by its camera button, its numbers below it.

    ``options`` are those of ``st.plotly_chart``, whose result this returns.
    """
    image = st.session_state.get("image") or IMAGES[0]
    config = {"displaylogo": False, "toImageButtonOptions": {"format": image, "filename": key}}
    found = st.plotly_chart(fig, key=key, width="stretch", theme="streamlit", config=config, **options)
    with st.popover("Save", type="tertiary", icon=":material/download:", key=f"save_{key}"):
        st.caption("The numbers of this figure, or the figure as a page of its own that opens without a network.")
        with st.container(horizontal=True):
            _download("CSV", partial(_csv, fig), f"{key}.csv", "text/csv")
            _download("Parquet", partial(_parquet, fig), f"{key}.parquet", "application/vnd.apache.parquet")
            _download("HTML", partial(_html, fig, key), f"{key}.html", "text/html")
    return found


def _download(label: str, content: Callable[[], bytes], name: str, mime: str) -> None:
    """A button whose file is made when it is pressed."""
    st.download_button(label, content, name, mime, key=f"{name}_{label}", on_click="ignore")


def _csv(fig: go.Figure) -> bytes:
    return table_of(fig).to_csv(index=False).encode()


def _parquet(fig: go.Figure) -> bytes:
    table, out = table_of(fig), io.BytesIO()
    mixed = [column for column in table if table[column].dtype == object]
    table.astype(dict.fromkeys(mixed, "string")).to_parquet(out, index=False)
    return out.getvalue()


def _html(fig: go.Figure, key: str) -> bytes:
    return report.render(key.replace("_", " "), [report.plot(fig)]).encode()


def table(rows: list[dict[str, Any]], key: str, columns: dict[str, Any], **options: Any) -> Any:
    """A table without row numbers, under its own key; its own tool bar saves it as CSV."""
    with st.container(key=key):
        return st.dataframe(rows, hide_index=True, column_config=columns, **options)


def code(view: View, lines: str, prompt: bool = True) -> None:
    """The Python that computes what a page shows, through the library; it follows on the model and the prompt.

    Args:
        lines: what comes after ``model`` and, unless ``prompt`` is False, ``prompt``.
    """
    program(source(view, lines, prompt))


def program(text: str) -> None:
    """The same on a page that has no view: a whole program."""
    with st.expander("Show code", icon=":material/code:"):
        st.caption("These lines compute what this page shows, in Python.")
        st.code(text, language="python")


def source(view: View, lines: str, prompt: bool = True) -> str:
    """Of :func:`code`: a program that runs as it stands."""
    options = [repr(view.address)]
    options += [f"{name}={value!r}" for name in ("device", "dtype") if (value := getattr(view.checkpoint, name))]
    head = ["from jambascope import HookedJamba", "", f"model = HookedJamba.from_pretrained({', '.join(options)})"]
    if prompt:
        head.append(f"prompt = {view.prompt!r}")
    return "\n".join([*head, "", lines.strip(), ""])


def plain(text: str) -> str:
    """Text that Streamlit's Markdown shows as it is."""
    for sign in "\\`*_{}[]()#+-!$~|" + ":" * (text.count(":") > 1):
        text = text.replace(sign, "\\" + sign)
    return text.replace("<", "&lt;").replace(">", "&gt;")


def error(problem: JambascopeError) -> None:
    """The project's errors are one readable line; no traceback."""
    st.error(plain(str(problem)), icon=":material/error:")
