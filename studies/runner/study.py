"""What a study is, and where studies are found.

A study is one module ``studies/NAME.py`` that ends in ``study = Study(...)``: a typed spec, functions from spec and
model to rows and from rows to figures and words. It is cut into cells, units of work of which each is measured for
itself, kept for itself, and measured once.

A row is one measurement, in long form:

    measure   what was measured, with its unit where it has one
    value     a finite number; what has no value is no row
    sample    number of the prompt (or sequence, ...) within the cell's seed: the same number, seed and spec are the
              same prompt whatever the model, so that models can be compared on it; 0 where there is one value
    kind      "hit" where values are 1 or 0, hits and misses, "change of hits" for differences of such: so that nothing
              looks certain because all samples agree; may be left out
    ...       labels of the study's own, such as layer and head

to which the runner adds what its cell says (``model``, ``seed`` and more) and ``recipe``, the name under which
trainings of several seeds are pooled.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jambascope.errors import ConfigError
from jambascope.studies.runner.spec import Spec

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    import torch

    from jambascope.config import JambaConfig
    from jambascope.model import HookedJamba

NAMES = (
    "induction_heads",
    "label_heads",
    "activation_patching",
    "previous_token",
    "hidden_attention",
    "icl_format",
    "functional_segregation",
    "state_memory",
    "router_load",
    "stability",
    "positional",
    "emergence",
)
"""The studies that ship, modules of ``jambascope.studies``."""

Cell = dict[str, Any]
"""A unit of work, JSON-able; always with ``model`` (as the spec names it) and ``seed``."""


@dataclass(frozen=True)
class Found:
    """What one cell gave."""

    rows: Sequence[dict[str, Any]]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    """Kept beside the rows, under the number of the cell and these names."""


def grid(spec: Spec, **axes: Sequence[Any]) -> list[Cell]:
    """A cell for every model, seed and combination of further axes, models changing last."""
    axes = {"model": spec.models, "seed": spec.seeds} | axes
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def grid_and_once(spec: Spec, part: str, once: str, wanted: bool) -> list[Cell]:
    """A cell ``part`` for every model and seed; and, where wanted, one ``once``, which says nothing of any model."""
    found = [cell | {"part": part} for cell in grid(spec)]
    extra = {"model": spec.models[0], "seed": spec.seeds[0], "part": once}
    return [*found, extra] if wanted else found


@dataclass(frozen=True, kw_only=True)
class Study:
    """Functions are pure: the same arguments give the same, whichever process asks."""

    name: str
    version: int
    """Raised when the same spec would give other rows; runs of another version are not gone on with."""
    spec: type[Spec]
    question: str
    method: str
    controls: str
    measure: Callable[[Any, Cell, HookedJamba], Found]
    """(spec, cell, the cell's model in float32) -> rows and tensors."""
    headline: tuple[str, ...]
    """Measures of the table of results, in its order, and of what ``study compare`` compares."""
    by: tuple[str, ...]
    """The labels that their rows have, besides ``measure``: rows that agree in all of them are averaged."""
    figures: Callable[[Any, pd.DataFrame], Sequence[go.Figure]]
    reading: Callable[[Any, pd.DataFrame], str]
    """(spec, rows) -> what was found, in words and computed from the numbers; paragraphs by blank lines."""
    tables: Callable[[Any, pd.DataFrame], Sequence[tuple[str, pd.DataFrame]]] = lambda spec, rows: ()
    """Further tables of the report, with their titles."""
    cells: Callable[[Any], list[Cell]] = grid
    check: Callable[[Any, JambaConfig, Path], None] = lambda spec, config, directory: None
    """(spec, configuration, checkpoint directory): raises for a model that the study cannot be asked of; called for
    every model before any is opened."""


def load(source: str) -> Study:
    """A study by its name, or by the path of a ``.py`` file of yours that defines ``study``.

    Raises:
        ConfigError: no such study, or a file without one.
    """
    if source.endswith(".py"):
        return _study_of(_module_of(Path(source).expanduser()), source)
    name = source.replace("-", "_")
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"{source!r} is no study; {hint}there are {', '.join(NAMES)}, or give a .py file of yours")
    return _study_of(importlib.import_module(f"jambascope.studies.{name}"), source)


def _study_of(module: Any, source: str) -> Study:
    study = getattr(module, "study", None)
    if not isinstance(study, Study):
        raise ConfigError(f"{source!r} defines no `study = Study(...)`; see jambascope/studies/runner/study.py")
    return study


def _module_of(path: Path) -> Any:
    if not path.is_file():
        raise ConfigError(f"{str(path)!r} is no file; give the .py file of a study, or a name of: {', '.join(NAMES)}")
    # Registered, as dataclasses and pydantic look their module up; under a name that no package has.
    name = f"jambascope_study_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def questions() -> list[tuple[str, str]]:
    """Name of every study that ships and the first line of its module, which is its question. Imports none of them."""
    folder = Path(__file__).parents[1]
    return [(name, ast.get_docstring(ast.parse((folder / f"{name}.py").read_text())).splitlines()[0]) for name in NAMES]
