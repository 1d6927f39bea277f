"""Each notebook runs from top to bottom in a kernel of its own, without a network, and shows what it promises.

The asserts that check the meaning of its numbers stand in the notebooks themselves, where a reader sees them.
"""

from __future__ import annotations

import base64
import re
import sys
from pathlib import Path

import jupytext
import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

SCRIPTS = sorted((Path(__file__).parents[2] / "studies" / "notebooks").glob("*.py"))
PLOTLY = "application/vnd.plotly.v1+json"
OFFLINE = """
import socket
def refuse(*where, **more):
    raise OSError(f"a notebook must not need the network: {where}")
socket.create_connection = socket.getaddrinfo = refuse
"""


@pytest.fixture(scope="module", params=SCRIPTS, ids=[script.stem for script in SCRIPTS])
def executed(request, tmp_path_factory):
    """The notebook with its outputs; a cell that errs fails the test."""
    folder = tmp_path_factory.mktemp(request.param.stem)
    notebook = jupytext.read(request.param)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(OFFLINE))
    notebook.cells.append(nbformat.v4.new_code_cell("__import__('sys').executable"))
    with pytest.MonkeyPatch.context() as patch:
        # The interpreter that runs the test, whatever kernels its user has installed.
        patch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
        patch.setenv("JUPYTER_DATA_DIR", str(folder / "jupyter"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.delenv("JUPYTER_PATH", raising=False)
        patch.delenv("PLOTLY_RENDERER", raising=False)
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    assert notebook.cells[-1].outputs[0].data["text/plain"] == repr(sys.executable)
    assert not [path for path in folder.iterdir() if path.name != "jupyter"], "it leaves files behind"
    return notebook


def shown(notebook) -> list[dict]:
    """The data of every output, by its type."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return [output.data for output in outputs if "data" in output]


def values(array) -> np.ndarray:
    """An array of a figure, which Plotly may have packed."""
    if isinstance(array, dict):
        return np.frombuffer(base64.b64decode(array["bdata"]), array["dtype"])
    rows = [row if isinstance(row, list) else [row] for row in array or []]
    return np.array([np.nan if value is None else value for row in rows for value in row])


def test_it_has_figures_with_data_titles_and_axis_titles(executed):
    found = [data[PLOTLY] for data in shown(executed) if PLOTLY in data]
    assert len(found) >= 2
    for figure in found:
        layout = figure["layout"]
        title = layout["title"]["text"]
        assert title
        drawn = [values(trace["z"] if trace["type"] == "heatmap" else trace["y"]) for trace in figure["data"]]
        assert any(len(array) and np.isfinite(array.astype(float)).any() for array in drawn), title
        axes = {name: axis for name, axis in layout.items() if re.fullmatch(r"[xy]axis\d*", name)}
        assert len(axes) >= 2 and all(axis["title"]["text"] for axis in axes.values()), title


def test_its_figures_show_without_plotlys_extension_and_on_any_page(executed):
    outputs = shown(executed)
    figures = [data for data in outputs if PLOTLY in data]
    assert all("Plotly.newPlot" in data["text/html"] for data in figures)
    assert [data for data in outputs if len(data.get("text/html", "")) > 1_000_000], "plotly.js is part of the notebook"
    assert not [data for data in figures if "cdn.plot.ly" in data["text/html"]]
    for data in figures:
        layout = data[PLOTLY]["layout"]
        assert layout["template"]["layout"]["font"]["color"] == "#757575"
        assert layout["paper_bgcolor"] == "rgba(0,0,0,0)"


def test_its_numbers_are_computed_and_checked(executed):
    prose = [cell.source for cell in executed.cells if cell.cell_type == "markdown"]
    assert len(prose) >= 8 and all(len(block) < 1500 for cell in prose for block in cell.split("\n\n"))
    measured = re.compile(r"\d\.\d|\d ?%")
    assert [text for text in prose if measured.search(text.replace("95 %", ""))] == []
    said = [data["text/markdown"] for data in shown(executed) if "text/markdown" in data]
    assert len(said) >= 5 and not [text for text in said if re.search(r"\bnan\b|\binf\b", text)]
    assert sum(cell.source.count("assert ") for cell in executed.cells) >= 4
