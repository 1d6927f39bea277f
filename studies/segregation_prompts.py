"""What ``functional_segregation`` asks: documents of the packaged models' language, or what any model can be asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int

from jambascope import checkpoint
from jambascope.config import JambaConfig
from jambascope.errors import ConfigError
from jambascope.hooks.heads import repeated_random_tokens
from jambascope.model import HookedJamba
from jambascope.studies.corpus import check_corpus, losses_and_hits, mixed, speaks_zoo
from jambascope.studies.episodes import Batch, batches
from jambascope.studies.zoo.measures import measure as measure_task
from jambascope.studies.zoo.tasks import Task, draw
from jambascope.zoo import scoring
from jambascope.zoo.documents import Document

TaskName = Literal["recall", "phones", "repeat", "copy", "text"]
DOMAINS = {
    "recall": ("recall", {"entries": 12}),
    "phones": ("phones", {"entries": 8}),
    "repeat": ("repeat", {"length": 32, "times": 2}),
    "copy": ("copy", {"count": 6, "noise": 24}),
    "text": ("story", {}),
}
"""Documents of each task, of sizes in training."""
IN_LANGUAGE = ("recall", "phones", "copy")
"""What needs the packaged models' language."""
LOSS, HITS = "loss", "accuracy"
KINDS = {LOSS: None, HITS: "change of hits"}

Values = dict[str, Float[np.ndarray, " prompts"]]
"""Loss and accuracy of each prompt."""


class Prompts(Protocol):
    """Of one task, in order."""

    def __len__(self) -> int: ...

    def part(self, rows: slice) -> Prompts: ...

    def batches(self) -> list[Batch]:
        """What a model reads of them."""

    def measured(self, model: HookedJamba) -> Values:
        """How well it does."""


@dataclasses.dataclass(frozen=True)
class Documents:
    """Of the packaged models' language: their answers count."""

    task: Task
    drawn: Sequence[Document]

    def __len__(self) -> int:
        return len(self.drawn)

    def part(self, rows: slice) -> Documents:
        return Documents(self.task, self.drawn[rows])

    def batches(self) -> list[Batch]:
        return batches(self.drawn)

    def measured(self, model: HookedJamba) -> Values:
        found = measure_task(model, self.task, self.drawn)
        return {cell.measure: array[:, 0] for cell, array in found.items() if cell.measure in KINDS}


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """Of any model, all of one length: the last so many count."""

    ids: Int[torch.Tensor, "prompts pos"]
    counted: int

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, rows: slice) -> Tokens:
        return Tokens(self.ids[rows], self.counted)

    def batches(self) -> list[Batch]:
        return [(part, torch.ones_like(part, dtype=torch.bool)) for part in self.ids.split(self._batch)]

    def measured(self, model: HookedJamba) -> Values:
        found = losses_and_hits(model, self.ids, self._batch)
        return {name: of[:, -self.counted :].mean(1).numpy() for name, of in zip((LOSS, HITS), found, strict=True)}

    @property
    def _batch(self) -> int:
        return max(1, scoring.TOKENS // self.ids.shape[1])


def documents_of(name: TaskName, count: int, seed: int) -> Documents:
    """Held-out documents of a task. Of text the words count that nothing before them determines."""
    domain, options = DOMAINS[name]
    task = Task(
        task=name, condition=name, measured="answers", domain=domain, options=tuple(options.items()), x_name=None
    )
    drawn = draw(task, count, seed)
    if name == "text":
        drawn = [
            dataclasses.replace(doc, answers=tuple(i for i in range(len(doc.words)) if i not in doc.answers))
            for doc in drawn
        ]
    return Documents(task, drawn)


def prompts_of(
    model: HookedJamba, name: TaskName, count: int, text: tuple[str, ...], length: int, seed: int
) -> Prompts:
    """What a model is asked: documents where it speaks their language; else random tokens said twice, of which all but
    the first count the second time, and windows of ``length`` tokens of text files, of which all count."""
    if name == "text" and text:
        return Tokens(mixed(model, text, count, length, seed), length - 1)
    if speaks_zoo(model.tokenizer):
        return documents_of(name, count, seed)
    said = length // 2
    return Tokens(repeated_random_tokens(model, count, said, seed=seed), said - 1)


def check_tasks(
    tasks: Sequence[TaskName], text: tuple[str, ...], length: int, config: JambaConfig, directory: Path
) -> None:
    """
    Raises:
        ConfigError: tasks that a model of another language cannot be asked, or that exceed its context or vocabulary.
        InputError: text, and no tokenizer.
    """
    if not tasks or len(set(tasks)) < len(tasks):
        raise ConfigError(f"tasks={tasks}: give at least one, each once")
    packaged = speaks_zoo(checkpoint.load_tokenizer(directory))
    if not packaged and (needing := [name for name in tasks if name in IN_LANGUAGE]):
        raise ConfigError(
            f"tasks={','.join(needing)}: these are documents of the packaged models' language, and it has other words; "
            "set tasks=repeat, or tasks=repeat,text with --set text=FILE"
        )
    if "text" in tasks and (text or not packaged):
        check_corpus(directory, config, text, length)
    if "repeat" in tasks and not packaged:
        if 2 * (length // 2) + 1 > config.n_ctx:
            raise ConfigError(f"length={length} and <bos> exceed its context of {config.n_ctx}; make length smaller")
        if length // 2 > (usable := config.d_vocab - 4):
            raise ConfigError(f"length={length}: half as many different tokens cannot be drawn from its {usable}")
