"""Which rows of results stand in which figure of the report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import plotly.graph_objects as go

from jambascope.studies.figures.zoo import Panel, Point, bars, lines
from jambascope.studies.zoo.measures import CALIBRATION, EARLY, LATE
from jambascope.studies.zoo.summary import Row
from jambascope.studies.zoo.tasks import TRAINED_LENGTH, Task, grid
from jambascope.zoo.language import DOMAINS

FORMAT = ("label mass", "valid rate", "accuracy free", "accuracy restricted", "format gap")
GUIDED = ("accuracy free", "accuracy restricted", "accuracy", "class known")
"""Measures beside which chance is drawn."""
SHADED = "shaded: as in training"


class Plots:
    """Figures of one evaluation."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows: dict[tuple[str, str, str], list[Row]] = {}
        for row in rows:
            self._rows.setdefault((row.task, row.condition, row.measure), []).append(row)
        self._tasks = {(task.task, task.condition): task for task in grid()}
        self._first = rows[0].model if rows else ""

    def sections(self) -> Iterator[tuple[str, str, list[go.Figure]]]:
        """Title, what to know when reading, and figures."""
        yield (
            "Following the format",
            "Episodes of reviews, labelled by words that only the reviews before explain. After s shots a model can "
            "know the class and still answer outside the episode's labels: the format gap is the accuracy among the "
            "labels less that among all words. Accuracy is taken where a shot has shown the right label; "
            "after one shot that is the only label so far, so compare with the commonest label so far. Unseen labels "
            "are other kinds of words (places and colours) than the familiar arbitrary ones (things and animals), so "
            "not their novelty alone differs; natural pairs are few (3 unseen, 8 familiar), and intervals over "
            "episodes do not say what other pairs would show.",
            [
                *self._few_shot(),
                self._competitors(),
                self._shuffled(),
                self._meaning(),
                self._calibration(),
                self._verdicts(),
            ],
        )
        yield (
            "Reading the context",
            "What the context determines, against the size of what is to be remembered or bridged.",
            [self._lookups(), self._stories()],
        )
        yield (
            "Loss",
            "Packed held-out rows. The ICL score is the loss at positions "
            f"{LATE[0]} to {LATE[1] - 1} less that at {EARLY[0]} to {EARLY[1] - 1}: below zero where context helps.",
            [self._losses(), self._domains(), self._positions()],
        )

    def _panel(self, title: str, task: str, condition: str, measure: str) -> Panel:
        rows = self._rows.get((task, condition, measure), [])
        of: Task | None = self._tasks.get((task, condition))
        guides = {}
        if measure in GUIDED:
            for name, text in (("chance", "chance"), ("accuracy of the commonest label", "commonest label so far")):
                own = self._rows.get((task, condition, name), [])
                line = {row.x: row.mean for row in own if row.model == self._first and row.mean == row.mean}
                if line:
                    guides[text] = sorted(line.items(), key=lambda point: point[0] or 0)
        points = [Point(row.model, row.seed, row.x, row.mean, row.low, row.high) for row in rows]
        return Panel(title, points, of.trained if of else None, guides)

    def _grid(self, measures: Sequence[str], conditions: dict[str, str]) -> list[tuple[str, list[Panel]]]:
        """Rows of panels: measure by few-shot condition (condition -> title of its column)."""
        return [(m, [self._panel(text, "few-shot", c, m) for c, text in conditions.items()]) for m in measures]

    def _few_shot(self) -> Iterator[go.Figure]:
        trained = f"held-out reviews, two classes unless said; bands: 95 % intervals; {SHADED}"
        kinds = ("familiar natural", "familiar flipped", "familiar arbitrary", "unseen natural", "unseen arbitrary")
        conditions = {f"{kind} labels": kind for kind in kinds}
        yield lines("Labels against shots, by kind of label words", trained, self._grid(FORMAT, conditions), "shots")
        both = [(kind, text) for kind in ("familiar", "unseen") for text in ("{}", "{}, 4", "{}, 8")]
        conditions = {
            f"{kind} arbitrary labels" + text[2:] + (" classes" if text[2:] else ""): f"{kind}, {text[4:] or 2} classes"
            for kind, text in both
        }
        yield lines(
            "Labels against shots, by number of classes",
            f"training has up to 4 classes; {SHADED}",
            self._grid(("label mass", "accuracy free", "accuracy restricted", "format gap"), conditions),
            "shots",
        )
        conditions = {
            f"{kind} arbitrary labels" + (f", {filler} filler sentences" if filler else ""): f"{kind}, {filler} filler"
            for kind in ("familiar", "unseen")
            for filler in (0, 4, 16)
        }
        yield lines(
            "Labels against shots, by sentences without sentiment in each review",
            f"training has up to 2 of them (about 10 words each); {SHADED} as to shots",
            self._grid(("label mass", "accuracy free", "accuracy restricted", "format gap"), conditions),
            "shots",
        )

    def _competitors(self) -> go.Figure:
        conditions = {f"{kind} labels": kind for kind in ("familiar natural", "familiar arbitrary", "unseen arbitrary")}
        rows = self._grid(("label mass", "verdict mass", "mass of other labels"), conditions)
        about = "probability, where a label is due, of the episode's labels, of free verdicts and of other label words"
        return lines("Where the probability goes", about, rows, "shots")

    def _shuffled(self) -> go.Figure:
        names = ("label mass", "valid rate", "accuracy free", "accuracy restricted")
        panels = [self._panel(name, "few-shot", "shuffled labels", name) for name in names]
        about = f"labels drawn anew for every review, so that accuracy must be chance; {SHADED}"
        return lines("Control: shuffled labels", about, [("rate", panels)], "shots")

    def _meaning(self) -> go.Figure:
        conditions = {
            "familiar natural labels by meaning": "familiar, no shots",
            "unseen natural labels by meaning": "never labels in training, no shots",
            "shuffled natural labels by meaning": "familiar, 8 shuffled shots",
        }
        panels = [self._panel(text, "few-shot", c, "accuracy restricted") for c, text in conditions.items()]
        panels = [replace(p, guides={k: v for k, v in p.guides.items() if k == "chance"}) for p in panels]
        about = "accuracy among the two labels, Positive for praise and so on, where no shot says so; dotted: chance"
        return bars("Natural labels by their meaning alone", about, panels, "accuracy", 3)

    def _calibration(self) -> go.Figure:
        kinds = ("familiar natural", "familiar arbitrary", "unseen natural", "unseen arbitrary")
        panels = [self._panel(f"{kind} labels", "few-shot", f"{kind} labels", CALIBRATION) for kind in kinds]
        about = "expected calibration error of p / M over all shots, ten bins; 0 is calibrated"
        return bars("Calibration of the choice among the labels", about, panels, "error")

    def _verdicts(self) -> go.Figure:
        panels = [
            self._panel(text, "verdicts", "free verdicts", name)
            for name, text in (("verdict mass", "probability of verdicts"), ("class known", "right class likelier"))
        ]
        about = f"no labels: any of many verdicts of the class would do; {SHADED}"
        return lines("Free verdicts", about, [("rate", panels)], "verdicts before")

    def _lookups(self) -> go.Figure:
        names = ("repeat", "recall", "phones", "copy", "secret")
        tasks = [next(task for task in grid() if task.task == name) for name in names]
        panels = [self._panel(f"{t.task}: {t.x_name}", t.task, t.condition, "accuracy") for t in tasks]
        about = f"accuracy over the whole vocabulary, of phone numbers in all digits, against the size; {SHADED}"
        return lines("Looking up", about, [("accuracy", panels)], "size")

    def _stories(self) -> go.Figure:
        conditions = [condition for task, condition in self._tasks if task == "story"]
        panels = [self._panel(c, "story", c, "accuracy") for c in conditions]
        about = "accuracy on names, things and verbs that the text determines; dotted: chance of two words that fit"
        return bars("Stories", about, panels, "accuracy", 3)

    def _losses(self) -> go.Figure:
        panels = [
            self._panel(name, "held-out rows", "mixture", measure)
            for name, measure in (
                ("ICL score", "ICL score"),
                ("loss on all words", "loss"),
                ("loss on answers", "loss on answers"),
            )
        ]
        return bars("Held-out mixture", f"rows of {TRAINED_LENGTH} tokens", panels, "nats", 3)

    def _domains(self) -> go.Figure:
        panels = [self._panel(domain, "held-out rows", domain, "loss on answers") for domain in DOMAINS]
        return bars(
            "Held-out loss on answers, by domain", f"rows of {TRAINED_LENGTH} tokens of one domain", panels, "nats"
        )

    def _positions(self) -> go.Figure:
        panel = self._panel("", "loss by position", "mixture", "loss")
        about = f"means over windows of positions of the mixture; training ends at {TRAINED_LENGTH}; {SHADED}"
        return lines("Loss by position", about, [("loss (nats)", [panel])], "position (tokens)", unit_range=False)
