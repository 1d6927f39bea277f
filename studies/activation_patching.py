"""Where along the layers is what the answer depends on, and which components carry it?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from pydantic import Field, model_validator

from jambascope import checkpoint
from jambascope.config import JambaConfig
from jambascope.errors import ConfigError, HookError
from jambascope.hook_table import HookRow, hook_rows
from jambascope.hooks import run
from jambascope.hooks.sweep import interventions, logit_difference, patch_sweep, probability, rank, targets
from jambascope.hooks.sweep.nodes import needed
from jambascope.model import HookedJamba
from jambascope.studies import patching_report as report
from jambascope.studies.prompt_pairs import (
    FILLER,
    REVIEW,
    PromptPairs,
    Swap,
    check_lengths,
    given_pairs,
    review_pairs,
)
from jambascope.studies.prompts import check_tokenizer
from jambascope.studies.runner.spec import Spec
from jambascope.studies.runner.study import Cell, Found, Study, grid

DEFAULT = ("resid_pre", "attn_out", "mixer_out", "mlp_out", "z", "ssm_state")
"""What is patched as far as a model has it; what else is named, it must have."""
Direction = Literal["denoise", "noise"]
CHECKED = 4
"""Pairs of which a patch of their own values is run."""


class PatchingSpec(Spec):
    """Settings of the study."""

    pairs: int = Field(32, ge=4, description="Prompt pairs of a seed; cells are found on one half.")
    shots: int = Field(4, ge=2, description="Labelled reviews in each prompt.")
    filler: int = Field(1, ge=0, description="Sentences of no sentiment between a review's word and its end.")
    swap: Swap = Field("word", description="What differs in a pair: the last sentiment word, or the examples' labels.")
    components: tuple[str, ...] = Field(
        DEFAULT,
        description="What is patched: of the default, what a model has; or what it must have, such as q, k, v, "
        "pattern, x, dt, B, C, y, ssm_read, router_logits, expert_weights, expert_out. Heads and experts are patched "
        "by themselves.",
    )
    positions: Literal["roles", "single"] = Field(
        "roles", description="Positions of one role together, or each by itself; of prompts of yours always each."
    )
    directions: tuple[Direction, ...] = Field(
        get_args(Direction), description="Clean values into the corrupted run (denoise), the reverse (noise)."
    )
    k: int = Field(3, ge=1, description="Cells of each component that are found; fewer where it has fewer than 2k.")
    draws: int = Field(20, ge=1, description="Random sets of as many other cells.")
    least_difference: float = Field(0.5, gt=0, description="Logits; pairs whose two runs differ by less are left out.")
    clean: str = Field("", description="Prompts of yours instead of reviews, parted by |; of equal length in tokens.")
    corrupted: str = Field("", description="As many, each like its clean one token by token.")
    answer: str = Field("", description="The token that the clean prompts ask for, or one for each, parted by |.")
    wrong: str = Field("", description="The token that the corrupted ones ask for.")
    batch_size: int = Field(16, ge=1, description="Pairs swept at a time.")

    @model_validator(mode="after")
    def _given_whole(self) -> PatchingSpec:
        given = [name for name in ("clean", "corrupted", "answer", "wrong") if getattr(self, name)]
        if len(given) not in (0, 4):
            raise ValueError(f"only {', '.join(given)} given; prompts of yours need clean, corrupted, answer and wrong")
        return self


class Place(NamedTuple):
    """What is patched together: a component of a layer at the positions of a group."""

    component: str
    layer: int
    group: str
    unit: int
    """The head; 0 where there is no such choice."""


def check(spec: PatchingSpec, config: JambaConfig, directory: Path) -> None:
    unopened = _Unopened(config, hook_rows(config))
    if not _components(spec, unopened):
        raise ConfigError(f"it has none of components={','.join(spec.components)}; add resid_pre, which all have")
    tokenizer = checkpoint.load_tokenizer(directory)
    if spec.clean:
        check_lengths(unopened._replace(tokenizer=tokenizer), spec.clean, spec.corrupted)
        return
    check_tokenizer(tokenizer)
    if (spec.shots + 1) * (REVIEW + spec.filler * FILLER) > config.n_ctx:
        raise ConfigError(f"shots={spec.shots} exceed its context of {config.n_ctx} tokens; make shots smaller")


class _Unopened(NamedTuple):
    """What tells of a model which components and tokens it has, before it is opened."""

    config: JambaConfig
    hook_rows: dict[str, HookRow]
    tokenizer: Any = None


def _components(spec: PatchingSpec, model: HookedJamba | _Unopened) -> list[str]:
    """Those that are patched.

    Raises:
        ConfigError: one that is not of the default, and that no layer has or that cannot be patched.
    """
    found = []
    for name in spec.components:
        try:
            targets(model, name)
        except HookError as e:
            if name not in DEFAULT:
                raise ConfigError(f"components={name}: {e}") from None
            continue
        found.append(name)
    return found


def cells(spec: PatchingSpec) -> list[Cell]:
    return grid(spec, direction=spec.directions)


def measure(spec: PatchingSpec, cell: Cell, model: HookedJamba) -> Found:
    pairs = _pairs(spec, cell["seed"], model)
    values, runs = _swept(spec, cell["direction"], model, pairs)
    rows = _run_rows(spec, runs, cell["direction"] == spec.directions[0])
    source, base = ("clean", "corrupted") if cell["direction"] == "denoise" else ("corrupted", "clean")
    difference = (runs[source] - runs[base])[0]
    difference = np.where(np.abs(difference) >= spec.least_difference, difference, np.nan)
    effects = {place: (of_place - runs[base])[0] / difference for place, of_place in values.items()}
    rows += _own_values_rows(spec, cell["direction"], model, pairs, difference)
    rows += _whole_stream_rows(spec, cell["direction"], model, pairs)
    half = len(difference) // 2 if len(difference) >= 4 else len(difference)
    first, second = slice(0, half), slice(half, None)
    tensors = {"clean": pairs.clean, "corrupted": pairs.corrupted}
    if not np.isfinite(difference[first]).any():  # the reading says so
        return Found(rows, tensors)
    moving = [p for p in effects if pairs.groups[p.group][-1] >= pairs.changed_from and p[:2] != ("resid_pre", 0)]
    means = {place: float(np.nanmean(effects[place][first])) for place in effects}
    ranked = sorted(moving, key=lambda place: -abs(means[place]))
    found = {c: [p for p in ranked if p.component == c] for c in _components(spec, model)}
    found = {c: own[: min(spec.k, len(own) // 2)] for c, own in found.items()}
    rows += _cell_rows(effects, found, half)
    if np.isfinite(difference[second]).sum() >= 2:
        changes = {place: of_place - runs[base] for place, of_place in values.items()}
        rows += _found_rows(effects, changes, found, half)
        rows += _set_rows(spec, cell["seed"], effects, means, found, moving, half)
    return Found(rows, tensors)


def _pairs(spec: PatchingSpec, seed: int, model: HookedJamba) -> PromptPairs:
    if spec.clean:
        return given_pairs(model, spec.clean, spec.corrupted, spec.answer, spec.wrong)
    pairs = review_pairs(model, spec.pairs, spec.shots, spec.filler, spec.swap, seed)
    return pairs.by_position() if spec.positions == "single" else pairs


def _swept(
    spec: PatchingSpec, direction: Direction, model: HookedJamba, pairs: PromptPairs
) -> tuple[dict[Place, np.ndarray], dict[str, np.ndarray]]:
    """The metrics [metric pair] of every place's patch, and of both runs."""
    found: dict[Place, list[np.ndarray]] = {}
    runs: dict[str, list[np.ndarray]] = {"clean": [], "corrupted": []}
    names = _components(spec, model)
    for start in range(0, len(pairs.clean), spec.batch_size):
        part = pairs.part(slice(start, start + spec.batch_size))
        metrics = _metrics(part)
        sweep = patch_sweep(
            model, part.clean, part.corrupted, metrics, names, positions=list(part.groups.values()),
            direction=direction, progress=False,
        )  # fmt: skip
        for name, own in runs.items():
            own.append(getattr(sweep, name).values)
        for component, array in sweep.values.items():
            values = array.values.reshape(*array.shape[:4], -1)
            for layer in np.flatnonzero(np.isfinite(values).all((0, 1, 3, 4))):
                for g, group in enumerate(part.groups):
                    for unit in range(values.shape[-1]):
                        place = Place(component, int(layer), group, unit)
                        found.setdefault(place, []).append(values[:, :, layer, g, unit])
    return {place: np.concatenate(own, 1) for place, own in found.items()}, {
        name: np.concatenate(own, 1) for name, own in runs.items()
    }


def _metrics(pairs: PromptPairs) -> list:
    answers, wrong = list(pairs.answers), list(pairs.wrong)
    return [logit_difference(answers, wrong), probability(answers), rank(answers)]


def _run_rows(spec: PatchingSpec, runs: Mapping[str, np.ndarray], told: bool) -> list[dict]:
    """Which pairs are too alike and, where ``told``, all three metrics of the unpatched runs."""
    alike = np.abs((runs["clean"] - runs["corrupted"])[0]) < spec.least_difference
    rows = [{"measure": report.ALIKE, "sample": i, "value": float(own), "kind": "hit"} for i, own in enumerate(alike)]
    names = [f"{metric}, {name} run" for name in runs for metric in report.METRICS] if told else []
    for name, values in zip(names, np.concatenate(list(runs.values())), strict=False):
        rows += _sample_rows(name, values)
    return rows


def _own_values_rows(
    spec: PatchingSpec, direction: Direction, model: HookedJamba, pairs: PromptPairs, difference: np.ndarray
) -> list[dict]:
    """A patch of a run's own values into itself, by the loop that a sweep stands for: it must do nothing."""
    few, rows = pairs.part(slice(0, CHECKED)), []
    base = few.corrupted if direction == "denoise" else few.clean
    group = next(own for own in few.groups.values() if own[-1] >= few.changed_from)
    for component in _components(spec, model):
        of_component = targets(model, component)
        target = of_component[len(of_component) // 2]
        with torch.no_grad():
            plain = run(model, base, capture=needed(target))
            patched = run(model, base, interventions(model, target, group, 0, plain.cache, plain.cache))
        answers = torch.tensor([few.answers, few.wrong], device=model.device).T
        change = (patched.logits - plain.logits)[:, -1].gather(1, answers).cpu().double().numpy()
        effects = (change[:, 0] - change[:, 1]) / difference[:CHECKED]
        rows += _sample_rows(report.NOTHING, effects, component=component, cells="one")
    return rows


def _whole_stream_rows(spec: PatchingSpec, direction: Direction, model: HookedJamba, pairs: PromptPairs) -> list[dict]:
    """A patch of the stream at every position, halfway up: it must do everything."""
    found, layer = [], model.config.n_layers // 2
    for start in range(0, len(pairs.clean), spec.batch_size):
        part = pairs.part(slice(start, start + spec.batch_size))
        sweep = patch_sweep(
            model, part.clean, part.corrupted, _metrics(part)[0], layers=[layer], positions="all", direction=direction,
            progress=False,
        )  # fmt: skip
        found.append(sweep.effects(spec.least_difference)["resid_pre"].values[0, :, layer, 0])
    return _sample_rows(report.EVERYTHING, np.concatenate(found), component="resid_pre", cells="all")


def _cell_rows(effects: Mapping[Place, np.ndarray], found: Mapping[str, Sequence[Place]], half: int) -> list[dict]:
    """The effect of every place on every pair."""
    rows = []
    for place, values in effects.items():
        own = found.get(place.component, ())
        where = {**place._asdict(), "rank": own.index(place) + 1 if place in own else 0}
        rows += _sample_rows(report.CELL, values[:half], half="finding", **where)
        rows += _sample_rows(report.CELL, values[half:], half, half="confirming", **where)
    return rows


def _found_rows(
    effects: Mapping[Place, np.ndarray],
    changes: Mapping[Place, np.ndarray],
    found: Mapping[str, Sequence[Place]],
    half: int,
) -> list[dict]:
    """On held-out pairs, what the found cells do to probability and rank."""
    rows = []
    for own in found.values():
        for place in own:
            where = {**place._asdict(), "rank": own.index(place) + 1, "half": "confirming"}
            usable = np.where(np.isfinite(effects[place]), 1.0, np.nan)
            for name, values in zip((report.CELL_PROBABILITY, report.CELL_RANK), changes[place][1:], strict=True):
                rows += _sample_rows(name, (values * usable)[half:], half, **where)
    return rows


def _set_rows(
    spec: PatchingSpec,
    seed: int,
    effects: Mapping[Place, np.ndarray],
    means: Mapping[Place, float],
    found: Mapping[str, Sequence[Place]],
    moving: Sequence[Place],
    half: int,
) -> list[dict]:
    """On held-out pairs, the mean of each component's found cells and of random ones, every effect in the direction
    that the finding half gave its cell."""
    rng = np.random.default_rng(seed)

    def mean(places: Sequence[Place]) -> np.ndarray:
        return np.mean([np.sign(means[p]) * effects[p][half:] for p in places], axis=0)

    rows = []
    for component, own in found.items():
        others = [p for p in moving if p.component == component and p not in own]
        if not own or not others:
            continue
        sets = [[_like(rng, place, others) for place in own] for _ in range(spec.draws)]
        random = np.stack([mean(one) for one in sets])
        where = {"component": component, "k": len(own)}
        values = {"found": mean(own), "random": random.mean(0), "found less random": mean(own) - random.mean(0)}
        for cells_, of_cells in values.items():
            rows += _sample_rows(report.EFFECT, of_cells, half, cells=cells_, **where)
        for i, value in enumerate(np.nanmean(random, 1)):
            rows.append({"measure": report.SET, "cells": "random", "draw": i, "sample": 0, "value": value, **where})
    return rows


def _like(rng: np.random.Generator, place: Place, others: Sequence[Place]) -> Place:
    """A random other cell of the same layer; where it has none, of the same positions; else any."""
    near = [p for p in others if p.layer == place.layer] or [p for p in others if p.group == place.group] or others
    return near[int(rng.integers(len(near)))]


def _sample_rows(name: str, values: np.ndarray, first_sample: int = 0, **labels: object) -> list[dict]:
    """A row for every pair that has a value."""
    same = {"measure": name, **labels}
    return [
        {**same, "sample": first_sample + i, "value": float(v)} for i, v in enumerate(values) if np.isfinite(v)
    ]  # fmt: skip


study = Study(
    name="activation_patching",
    version=1,
    spec=PatchingSpec,
    question=__doc__,
    method="Pairs of few-shot reviews that agree token by token, but for the last sentiment word (or the labels of "
    "all examples), so that the answer becomes the other label. Into one run the values of the other are put: of "
    "one component of one layer, at the positions of one role together (all labels of the examples, say, or the "
    'last colon, "query"), or with positions=single at each position by itself, as all pairs are of one layout. A '
    "sentence of no sentiment after each review keeps its word out of the reach of one convolution. Denoise puts "
    "clean values into the corrupted run (is this enough?), noise corrupted ones into the clean run (is this "
    "needed?); they are not mirror images. resid_pre is the stream that enters a layer, attn_out, mixer_out and "
    "mlp_out what is added to it, z the output of single attention heads, ssm_state the state of a Mamba layer, "
    "which flows on from there.\n\n"
    "The effect is (patched - base) / (source - base) of the logit difference between the two answers: 0 nothing, 1 "
    "all of it. Pairs whose runs differ too little are left out. On one half of the pairs the cells of largest mean "
    "effect are found for each component; all numbers of found cells are from the other half, and those of sets "
    "have the sign that the finding half gave each cell.",
    controls="Random cells: as many others of the same component and layer, among positions that the difference can "
    "reach (where a layer has none, of the same positions elsewhere), drawn again and again; p is how often they do "
    "as much. Cells that cannot differ, before the first token that does, are never drawn. Single cells: random "
    "signs, with Holm's correction over all found cells of a model, direction and seed. A patch of a run's own "
    "values must do nothing (0), one of every position of the stream everything (1); the stream at layer 0 is the "
    "input itself, and is never a finding.",
    measure=measure,
    headline=report.HEADLINE,
    by=report.BY,
    figures=report.figures,
    reading=report.reading,
    tables=report.tables,
    cells=cells,
    check=check,
)
