"""What ``positional`` found, as a table of differences and in words."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch

from jambascope.studies.comparisons import by_sample, holm, interval, sign_flip_p
from jambascope.studies.head_ablation import plural
from jambascope.studies.runner.summary import number, summarize

ENDS = ["mean", "low", "high"]
LOSS, ACCURACY = "loss by position", "accuracy by position"
REPEATED, FIRST_TIME, OTHER_ORDER = "accuracy on the repetition", "accuracy before it", "accuracy, other order again"
RECALL, CHANCE = "accuracy of recall by distance", "chance of recall"
SHIFTED, OTHER_FILLER = "change of loss by a shift", "change of loss by other filler"


def windows(spec: PositionalSpec) -> list[tuple[int, int, float]]:
    """First and last position, and the length in trained ones that the last lies at: quarters of the trained length,
    then between the factors."""
    parts = [(spec.trained * i // 4, spec.trained * (i + 1) // 4, (i + 1) / 4) for i in range(4)]
    return parts + [(spec.trained * a, spec.trained * b, float(b)) for a, b in itertools.pairwise(spec.factors)]


def differences(rows: pd.DataFrame) -> pd.DataFrame:
    """Every measure and x of every further recipe less the first's, paired by prompt, trainings averaged."""
    recipes, lines_ = list(rows.recipe.unique()), []
    compared = (LOSS, ACCURACY, REPEATED, RECALL, SHIFTED)
    keys = ["measure", "x", "seed", "sample"]
    means = rows[rows.measure.isin(compared)].groupby(["recipe", *keys], sort=False)["value"].mean()
    for recipe in recipes[1:]:
        less = (means[recipe] - means[recipes[0]]).dropna()
        for (measure_, x), own in less.groupby(level=["measure", "x"], sort=False):
            values = torch.tensor(own.to_numpy())
            ends = dict(zip(ENDS, interval(values), strict=True)) | {"n": len(values)}
            lines_.append({"recipe": recipe, "measure": measure_, "x": x} | ends | {"p": sign_flip_p(values)})
    table = pd.DataFrame(lines_, columns=["recipe", "measure", "x", *ENDS, "n", "p"])
    return table.assign(p=holm(table.p.tolist()))


def reading(spec: Any, rows: pd.DataFrame) -> str:
    """What was found of every recipe, also when that is nothing, and how the others differ from the first."""
    words = [_reading_of(spec, rows[rows.recipe == recipe], recipe) for recipe in rows.recipe.unique()]
    compared = differences(rows)
    for recipe, own in compared.groupby("recipe", sort=False):
        words.append(_compared(own, recipe, rows.recipe.iloc[0]))
    if compared.empty:
        words.append(
            "One model alone cannot tell rotary positions from none: give two that differ in them, such as "
            "--model jamba-micro --model jamba-micro-rope."
        )
    return "\n\n".join(words)


def _paired(rows: pd.DataFrame, measure_: str, x: float, against: float | None = None) -> tuple[pd.Series, float]:
    """Line of the summary of a measure at x, less that at another x where given, and its p."""
    own = rows[(rows.measure == measure_) & (rows.x == x)]
    if against is not None:
        keys = ["model", "recipe", "seed", "sample"]
        other = rows[(rows.measure == measure_) & (rows.x == against)]
        own = (own.set_index(keys)["value"] - other.set_index(keys)["value"]).reset_index().assign(measure=measure_)
    own = own.dropna(subset="value")
    (line,) = [line for _, line in summarize(own, [measure_], ()).iterrows()]
    values = by_sample(own)
    return line, sign_flip_p(torch.tensor(values.to_numpy()))


def _reading_of(spec: Any, rows: pd.DataFrame, recipe: str) -> str:
    beyond = [end for _, end, at in windows(spec) if at > 1]
    found = [(end, *_paired(rows, LOSS, end, spec.trained)) for end in beyond]
    adjusted = holm([p for *_, p in found])
    worse = [end for (end, line, _), p in zip(found, adjusted, strict=True) if p < 0.05 and line["mean"] > 0]
    verdict = (
        f"reads worse from position {_before(spec, worse[0])} on"
        if worse
        else "does not read clearly worse beyond the trained length"
    )
    said = ", ".join(f"{number(*line[ENDS], 3)} at {_before(spec, end)}-{end}" for end, line, _ in found)
    last, n = spec.trained, int(found[0][1].n) if found else 0
    words = (
        f"{recipe}: it {verdict}: loss less that at positions {_before(spec, last)}-{last}, {plural(n, 'prompt')}: "
        f"{said} nats (p < 0.05 after Holm where it is called worse)."
    )
    words += " " + _falls(rows, REPEATED, spec.repeats, "repeating random tokens", "tokens", FIRST_TIME)
    if (rows.measure == RECALL).any():
        words += " " + _falls(rows, RECALL, spec.distances, "recalling one word", "words between")
        words += _from_chance(rows, spec.distances)
    return f"{words}\n\n{_shift(spec, rows)}"


def _before(spec: Any, end: int) -> int:
    return next(start for start, stop, _ in windows(spec) if stop == end)


def _falls(
    rows: pd.DataFrame, measure_: str, sizes: Sequence[int], what: str, unit: str, control: str | None = None
) -> str:
    lines_ = {x: _paired(rows, measure_, x)[0] for x in sizes}
    most = max(line["mean"] for line in lines_.values())
    low = [x for x in sizes if lines_[x]["mean"] < most / 2]
    fall = f"below half of the best at {', '.join(map(str, low))}" if low else "nowhere below half of the best"
    ends = " and ".join(f"{number(*lines_[x][ENDS])} at {x}" for x in (sizes[0], sizes[-1]))
    words = f"Accuracy of {what} is {ends} {unit}"
    if control is None:
        return f"{words}, {fall}."
    chance = rows[rows.measure == control]["value"].mean()
    learned = any(lines_[x].low > max(2 * chance, 0.01) for x in sizes)
    return (
        f"{words}, {fall if learned else 'nowhere clearly better than the first time'} ({chance:.3f} the first time)."
    )


def chance_of_recall(rows: pd.DataFrame) -> float:
    return float(rows[rows.measure == CHANCE]["value"].iloc[0])


def _from_chance(rows: pd.DataFrame, distances: Sequence[int]) -> str:
    """From which distance on recall is no longer clearly better than chance."""
    chance = chance_of_recall(rows)
    low = [x for x in distances if _paired(rows, RECALL, x)[0].low <= chance]
    where = f"not clearly above it at {', '.join(map(str, low))}" if low else "and everywhere above it"
    return f" Chance is {chance:.3f}, {where}."


def _shift(spec: Any, rows: pd.DataFrame) -> str:
    found = [(x, *_paired(rows, SHIFTED, x)) for x in spec.shifts]
    control = [_paired(rows, OTHER_FILLER, x)[0] for x in spec.shifts]
    clear = [x for (x, line, _), p in zip(found, holm([p for *_, p in found]), strict=True) if p < 0.05]
    verdict = (
        f"changes the loss on their repetition at {', '.join(map(str, clear))}" if clear else "changes nothing clearly"
    )
    said = ", ".join(f"{number(*line[ENDS], 3)} at {x}" for x, line, _ in found)
    other = max(abs(line["mean"]) for line in control)
    return (
        f"Filler before {plural(spec.shifted_length, 'random token')} said twice {verdict} (p < 0.05 after Holm): "
        f"{said} nats. Other filler of the same length moves it by at most {other:.3f} on average: what a shift "
        "changes beyond that is of position, length and memory, not of the words."
    )


def _compared(own: pd.DataFrame, recipe: str, first: str) -> str:
    clear = own[own.p < 0.05]
    if clear.empty:
        return f"{recipe} differs from {first} in none of {len(own)} comparisons (p < 0.05 after Holm)."
    said = []
    for name, part in clear.groupby("measure", sort=False):
        at = (f"{x:g} ({mean:+.2f})" for x, mean in zip(part.x, part["mean"], strict=True))
        said.append(f"{name} at {', '.join(at)}")
    return f"{recipe} less {first}, where p < 0.05 after Holm ({len(clear)} of {len(own)}): {'; '.join(said)}."
