"""How large is the residual stream of random tokens? A study for the tests of the runner, with faults on demand."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path

import plotly.graph_objects as go
import torch
from pydantic import Field

from jambascope.errors import ConfigError
from jambascope.studies.runner.spec import Files, Spec
from jambascope.studies.runner.study import Found, Study
from jambascope.studies.runner.summary import number, one, summarize


class NormSpec(Spec):
    """What is asked, and what goes wrong."""

    sequences: int = Field(3, ge=2, description="Of a seed.")
    layer: int = Field(0, ge=0, description="After which to look.")
    scale: float = Field(1.0, description="Of all values.")
    text: Files = Field((), description="Files that are not read.")
    log: str = Field("", description="A file that gets a line for every cell that is measured.")
    fault: str = Field("", description="kill, interrupt, raise or nan: in the cell of seed 1, once.")


def measure(spec: NormSpec, cell: dict, model) -> Found:
    generator = torch.Generator().manual_seed(cell["seed"])
    tokens = torch.randint(3, model.config.d_vocab, (spec.sequences, 8), generator=generator)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter="blocks.0.hook_resid_post")
    norms = cache["resid_post", 0].norm(dim=-1) * spec.scale
    if cell["seed"] == 1 and spec.fault:
        _fail(spec)
    if spec.log:
        with open(spec.log, "a") as file:
            file.write(f"{cell['model']} {cell['seed']}\n")
    rows = [
        {"measure": "norm", "place": place, "sample": i, "value": value.item()}
        for place, column in (("first", 0), ("last", -1))
        for i, value in enumerate(norms[:, column])
    ]
    if cell["seed"] == 1 and spec.fault == "nan":
        rows[1]["value"] = math.nan
    return Found(rows, {"norms": norms})


def _fail(spec: NormSpec) -> None:
    happened = Path(spec.log + ".fault")
    if happened.exists() or spec.fault == "nan":
        return
    happened.touch()
    if spec.fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise {"interrupt": KeyboardInterrupt, "raise": ZeroDivisionError}[spec.fault]("on demand")


def check(spec: NormSpec, config, directory) -> None:
    if spec.layer >= config.n_layers:
        raise ConfigError(f"layer={spec.layer} must be below {config.n_layers}")


def reading(spec: NormSpec, rows) -> str:
    first = one(summarize(rows[rows.recipe == rows.recipe.iloc[0]], ["norm"], ("place",)), place="first")
    return f"Norm {number(first['mean'], first.low, first.high)}, n = {first.n}. <b>not markup</b>"


study = Study(
    name="norms",
    version=1,
    spec=NormSpec,
    question=__doc__,
    method="The norm of the residual stream.",
    controls="None: a study for tests.",
    measure=measure,
    headline=("norm",),
    by=("place",),
    figures=lambda spec, rows: [go.Figure(go.Box(y=rows["value"]))],
    reading=reading,
    check=check,
)
