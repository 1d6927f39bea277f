"""The page's question as a run of the study ``activation_patching``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from jambascope.checkpoint import find_directory, read_config
from jambascope.dashboards import models, session
from jambascope.dashboards.results.patching import WINDOWED, WITH_CONV, Asked, text_of
from jambascope.dashboards.session import View
from jambascope.dashboards.work import Report
from jambascope.errors import ConfigError, InputError
from jambascope.memory import readable_bytes, weight_bytes
from jambascope.studies.activation_patching import study
from jambascope.studies.prompt_pairs import BETWEEN
from jambascope.studies.runner import run as running
from jambascope.studies.runner.spec import Spec, make_spec


class _Stopped(Exception):
    """Its reader wants no more."""


def taken(kinds: Sequence[str]) -> list[str]:
    """The node kinds that the study patches, too: all that a component's name says."""
    return [kind for kind in kinds if kind not in (WINDOWED, WITH_CONV)]


def spec_of(view: View, other: View, asked: Asked) -> Spec:
    """
    Raises:
        InputError: no node that the study patches, or a prompt that holds the sign that parts prompts.
        ConfigError: as the study's.
    """
    if not taken(asked.kinds):
        raise InputError(
            f"the study activation_patching does not patch {', '.join(asked.kinds)}; add ssm_state or another node to "
            "save a run"
        )
    if any(BETWEEN in prompt for prompt in (view.prompt, other.prompt)):
        raise InputError(f"the study parts prompts by {BETWEEN}, which one of these holds; take it out to save a run")
    values = {
        "models": (view.address,),
        "components": tuple(taken(asked.kinds)),
        "directions": (asked.direction,),
        "clean": view.prompt,
        "corrupted": other.prompt,
        "answer": text_of(view, asked.correct),
        "wrong": text_of(view, asked.wrong),
    }
    return make_spec(study.name, study.spec, values)


def command_of(spec: Spec) -> str:
    return running.command(study.name, spec)


def key_of(view: View, spec: Spec) -> tuple:
    return view.checkpoint, spec.model_dump_json()


def computing(spec: Spec) -> Callable[[Report], Path | None]:
    """What :func:`jambascope.dashboards.work.result` is to run; gives a directory, or None where stopped."""
    start = session.start()

    def compute(report: Report) -> Path | None:
        _check_room(spec.models[0], start.device)

        def tell(cells: int) -> running.Told:
            def told(done: int, doing: str) -> None:
                if not report(done / cells, doing):
                    raise _Stopped

            return told

        try:
            return running.run(study.name, spec, start.runs, running.Workers(start.device), tell).path
        except _Stopped:
            return None

    return compute


def _check_room(model: str, device: str | None) -> None:
    """The study opens the weights once more, as float32.

    Raises:
        ConfigError: they do not fit.
    """
    size = weight_bytes(read_config(find_directory(model))[0], torch.float32)
    room = int(models.free_bytes(device) * (1 - models.REST))
    if size > room:
        raise ConfigError(
            f"a study opens {model} once more, {readable_bytes(size)} in float32, and {readable_bytes(room)} are free; "
            "close other programs, or end the dashboard and run the command"
        )
