"""The numbers that a figure shows, as one table: what is drawn can be taken away and drawn otherwise."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

MARKUP = re.compile(r"<[^>]*>")


def table_of(fig: go.Figure) -> pd.DataFrame:
    """A row for each cell, bar or point of a figure, in the order in which they are drawn.

    Columns are named by the axes they stand on (``x``, ``y`` and ``value`` where an axis has no title); ``series`` is
    the trace's name, ``panel`` the title of the panel where there are several, ``x name`` and ``y name`` what an axis
    writes at that place, and ``text`` what hovering shows besides. Cells that are left blank, helpers without data and
    invisible click targets are left out.
    """
    panels = _panels(fig)
    parts = [part for trace in fig.data if (part := _trace(fig, trace, panels)) is not None]
    if not parts:
        return pd.DataFrame()
    found = pd.concat(parts, ignore_index=True)
    return found.dropna(axis="columns", how="all")


def _trace(fig: go.Figure, trace: Any, panels: dict[str, str]) -> pd.DataFrame | None:
    if _invisible(trace):
        return None
    x_axis, y_axis = (_axis(fig, trace, letter) for letter in "xy")
    columns: dict[str, Any] = {}
    if trace.type == "heatmap":
        z = np.asarray(trace.z, dtype=float)
        rows, across = z.shape
        x = np.arange(across) if trace.x is None else np.asarray(trace.x)
        y = np.arange(rows) if trace.y is None else np.asarray(trace.y)
        columns |= {"x": np.tile(x, rows), "y": np.repeat(y, across), "value": z.ravel()}
        text, unit = _flat(trace.text, z.size), _title(trace.colorbar.title) or _shared_unit(fig, trace)
    elif trace.type in ("bar", "scatter"):
        if trace.x is None or trace.y is None:
            return None
        columns |= {"x": np.asarray(trace.x, dtype=object), "y": np.asarray(trace.y, dtype=object)}
        for letter in "xy":
            error = getattr(trace, f"error_{letter}")
            if error.array is not None:
                columns[f"{letter} above"] = np.asarray(error.array)
                below = error.array if error.arrayminus is None else error.arrayminus
                columns[f"{letter} below"] = np.asarray(below)
        text, unit = _flat(trace.text, len(columns["x"])), None
    else:
        return None
    found = pd.DataFrame(columns)
    for letter, axis in (("x", x_axis), ("y", y_axis)):
        names = _names(axis)
        if names:
            found[f"{letter} name"] = [names.get(_number(v)) for v in found[letter]]
    found["text"] = text
    found["series"] = _plain(trace.name)
    found["panel"] = panels.get(trace.xaxis or "x")
    if "value" in found:
        found = found[found["value"].notna()]
    titles = {"x": _title(x_axis.title), "y": _title(y_axis.title), "value": unit}
    return found.rename(columns={key: title for key, title in titles.items() if title and title not in found})


def _invisible(trace: Any) -> bool:
    """Click targets, and what only fills the legend or an area."""
    if trace.visible is False or trace.name == "click targets":
        return True
    return trace.type == "scatter" and trace.marker.opacity == 0 and (trace.mode or "") == "markers"


def _axis(fig: go.Figure, trace: Any, letter: str) -> Any:
    name = getattr(trace, f"{letter}axis") or letter
    return fig.layout[f"{letter}axis{name[1:]}"]


def _title(title: Any) -> str | None:
    return _plain(title.text) if title is not None and title.text else None


def _shared_unit(fig: go.Figure, trace: Any) -> str | None:
    """Of a heatmap whose colours are those of a shared axis."""
    axis = fig.layout[trace.coloraxis] if trace.coloraxis else None
    return None if axis is None else _title(axis.colorbar.title)


def _names(axis: Any) -> dict[Any, str]:
    if axis.tickvals is None or axis.ticktext is None:
        return {}
    return {_number(value): _plain(text) for value, text in zip(axis.tickvals, axis.ticktext, strict=False)}


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, (int, float, np.number)) else value


def _flat(text: Any, size: int) -> list[str | None]:
    if text is None:
        return [None] * size
    if isinstance(text, str):
        return [_plain(text)] * size
    flat = [_plain(str(cell)) for cell in np.asarray(text, dtype=object).ravel()]
    return flat if len(flat) == size else [None] * size


def _plain(text: str | None) -> str | None:
    """Figures' text without its markup."""
    if text is None:
        return None
    text = MARKUP.sub(" ", text.replace("<br>", "; "))
    text = text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    return " ".join(text.split())


def _panels(fig: go.Figure) -> dict[str, str]:
    """x axis -> the title above its panel: the annotation that stands over it."""
    found: dict[str, str] = {}
    titles = [a for a in fig.layout.annotations if a.xref == "paper" and a.yref == "paper" and a.showarrow is False]
    for key in fig.layout.to_plotly_json():
        if not key.startswith("xaxis"):
            continue
        domain = fig.layout[key].domain
        if domain is None:
            continue
        middle, y = sum(domain) / 2, fig.layout["yaxis" + key[5:]]
        top = 1.0 if y is None or y.domain is None else y.domain[1]
        for a in titles:
            if abs(a.x - middle) < 1e-6 and abs(a.y - top) < 1e-6:
                found["x" + key[5:]] = _plain(a.text)
    return found
