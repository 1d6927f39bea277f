"""What ``functional_segregation`` asks: documents of the packaged models' language, or what any model can be asked."""

from __future__ import annotations

import dataclasses
from collections import Counter
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


def chances(asked: Documents) -> Float[np.ndarray, " prompts"]:
    """Of each document the accuracy that is expected of answers drawn evenly from what stands in it.

    Recall: the value of one of the table's entries, more often right than one in so many where entries share a value.
    Phones: the whole number of one of the book's entries. Repeat and copy: one of the words that are to be said again.
    Nothing can be looked up for the words of stories: there it is the accuracy of always saying the commonest of them.
    """
    domain, size = asked.task.domain, 3 if asked.task.domain == "phones" else 1
    answers = [_in_groups([doc.words[i] for i in doc.answers], size) for doc in asked.drawn]
    if domain == "story":
        commonest, _ = Counter(word for own in answers for word in own).most_common(1)[0]
        choices = [[commonest]] * len(answers)
    else:
        choices = [_choices(domain, doc.words, len(own)) for doc, own in zip(asked.drawn, answers, strict=True)]
    shares = [[from_.count(a) / len(from_) for a in own] for own, from_ in zip(answers, choices, strict=True)]
    return np.array([np.mean(own) for own in shares])


def _choices(domain: str | None, words: Sequence[str], answers: int) -> list[tuple[str, ...]]:
    """What the right answer of a document is one of."""
    if domain == "repeat":  # said twice; where the words begin anew is no answer
        return _in_groups(words[: answers + 1], 1)
    if domain == "copy":
        return _in_groups([word for word in words[2 : words.index("->")] if word != "."], 1)
    size = 3 if domain == "phones" else 1
    table = words[2 : words.index(";")]  # "map : key value , key value ; ..."
    return [tuple(table[i + 1 : i + 1 + size]) for i in range(0, len(table), size + 2)]


def _in_groups(words: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + size]) for i in range(0, len(words), size)]


def chance_of_repeat(tasks: Sequence[TaskName], length: int, accuracies: Float[np.ndarray, " prompts"]) -> float:
    """One of the words or tokens that are said twice, which all differ.

    How many there are depends on whether a model speaks the packaged models' language. Its accuracies tell, which are
    multiples of one in the number of answers. Where they fit both, as 0 and 1 do, the higher chance is given.
    """
    sizes = [DOMAINS["repeat"][1]["length"]]
    if not set(tasks) & set(IN_LANGUAGE):  # else all models speak it
        sizes.append(length // 2)
    hits = [accuracies * (said - 1) for said in sizes]
    fitting = [said for said, own in zip(sizes, hits, strict=True) if np.allclose(own, own.round(), rtol=0, atol=1e-4)]
    return 1 / min(fitting or sizes)


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
