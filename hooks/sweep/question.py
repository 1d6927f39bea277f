"""What every sweep is told, checked: two prompts that correspond, and what is measured of them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Float, Int

from jambascope.errors import HookError, InputError
from jambascope.hook_point import listeners
from jambascope.hooks.sweep.metrics import Metric, Reference, as_metrics, token_ids

if TYPE_CHECKING:
    from jambascope.model import HookedJamba, Input

Direction = Literal["denoise", "noise"]


@dataclass(frozen=True)
class Question:
    """Two runs of prompt pairs, and the metrics."""

    model: HookedJamba
    base: Int[torch.Tensor, "pair pos"]
    """What is patched into, up to the last position that is read."""
    source: Int[torch.Tensor, "pair pos"]
    """Whose values are put in."""
    metrics: tuple[Metric, ...]
    reads: dict[str, tuple[int, ...]]
    """Metric -> its positions."""
    direction: Direction
    prompt_length: int
    """Positions after the last that is read included."""

    @classmethod
    def of(
        cls,
        model: HookedJamba,
        clean: Input,
        corrupted: Input,
        metric: Metric | Callable | Sequence[Metric | Callable],
        direction: Direction = "denoise",
    ) -> Question:
        """
        Raises:
            InputError: prompts that do not correspond, a metric that asks for what is not there, or hooks attached.
        """
        if direction not in ("denoise", "noise"):
            raise InputError(f"direction={direction!r} must be 'denoise' or 'noise'")
        with model._lock:  # another thread's hooks are gone when its run ends
            attached = any(listeners(model))
        if attached:
            raise InputError(
                "the model has hooks attached, which would act on every cell; model.reset_hooks() takes them off"
            )
        clean, corrupted = prompt_pairs(model, clean, corrupted)
        metrics, length = tuple(as_metrics(metric)), clean.shape[1]
        for m in metrics:
            if not isinstance(m.positions, Iterable) or not listed(m.positions):
                raise InputError(f"{m.name}: positions={m.positions!r} must be the positions that it reads, as (-1,)")
        reads = {m.name: tuple(position(p, length, f"{m.name}: positions") for p in m.positions) for m in metrics}
        last = max(p for of_metric in reads.values() for p in of_metric)
        base, source = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
        return cls(model, base[:, : last + 1], source[:, : last + 1], metrics, reads, direction, length)

    @property
    def all_reads(self) -> tuple[int, ...]:
        """Ascending."""
        return tuple(sorted({p for reads in self.reads.values() for p in reads}))

    @cached_property
    def token_ids(self) -> dict[str, dict[str, Int[torch.Tensor, "pair ..."]]]:
        """Of each metric.

        Raises:
            InputError: tokens that do not exist.
        """
        return {m.name: token_ids(self.model, m, self.pairs) for m in self.metrics}

    @property
    def pairs(self) -> int:
        return len(self.base)

    @property
    def length(self) -> int:
        """Positions that matter."""
        return self.base.shape[1]

    def some(self, first: int, n: int) -> Question:
        """The same of ``n`` pairs alone."""
        return replace(self, base=self.base[first : first + n], source=self.source[first : first + n])

    @property
    def same_up_to(self) -> list[int]:
        """The first position in which the prompts of each pair differ."""
        differ = self.base != self.source
        return torch.where(differ.any(1), differ.int().argmax(1), self.length).tolist()


class Measure:
    """The metrics of rows of logits."""

    def __init__(self, question: Question) -> None:
        """
        Raises:
            InputError: tokens that do not exist.
        """
        self.question, model, reads = question, question.model, list(question.all_reads)
        self.base, self.source = (
            model.embed.weight.new_full((question.pairs, len(reads), model.config.d_vocab), float("nan"))
            for _ in range(2)
        )
        """The logits of both runs at the positions that the metrics read, in order; NaN before ``add``."""
        self._ids = question.token_ids
        self._places = {m.name: [reads.index(p) for p in question.reads[m.name]] for m in question.metrics}

    def __call__(
        self, logits: Float[torch.Tensor, "row read vocab"], pairs: Int[torch.Tensor, " row"]
    ) -> Float[torch.Tensor, "metric row"]:
        """In float64, on the logits' device.

        Raises:
            InputError: a metric that fails, or does not give a number for each row.
        """
        clean, corrupted = self._ends()
        found = []
        for metric in self.question.metrics:
            at = self._places[metric.name]
            reference = Reference(pairs, clean[:, at], corrupted[:, at], self._ids[metric.name])
            try:
                value = metric.function(logits[:, at], reference)
            except Exception as problem:
                raise InputError(f"{metric.name} raised {type(problem).__name__}: {problem}") from problem
            if not isinstance(value, torch.Tensor) or value.shape != pairs.shape:
                shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
                raise InputError(f"{metric.name} gave {shape} for {len(pairs)} rows; it must give a number for each")
            found.append(value.double())
        return torch.stack(found)

    def _ends(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the clean and the corrupted run."""
        return (self.source, self.base) if self.question.direction == "denoise" else (self.base, self.source)

    def add(
        self,
        first: int,
        base: Float[torch.Tensor, "some read vocab"],
        source: Float[torch.Tensor, "some read vocab"],
    ) -> dict[str, np.ndarray]:
        """Keep the logits of pairs from ``first`` on. Run -> their metrics, [metric some].

        Raises:
            InputError: one that is not finite.
        """
        some = slice(first, first + len(base))
        self.base[some], self.source[some] = base, source
        pairs, found = torch.arange(some.start, some.stop, device=base.device), {}
        for name, logits in zip(("clean", "corrupted"), self._ends(), strict=True):
            found[name] = self(logits[some], pairs).detach().cpu().numpy()
            for metric, values in zip(self.question.metrics, found[name], strict=True):
                if not np.isfinite(values).all():
                    i = int(np.flatnonzero(~np.isfinite(values))[0])
                    raise InputError(
                        f"{metric.name} is {values[i]} in the {name} run of pair {first + i}; it must be finite"
                    )
        return found


def prompt_pairs(
    model: HookedJamba, clean: Input, corrupted: Input
) -> tuple[Int[torch.Tensor, "pair pos"], Int[torch.Tensor, "pair pos"]]:
    """Checked ids of prompts that correspond token by token.

    Raises:
        InputError: prompts of different lengths or numbers, or padding.
    """
    found = []
    for name, given in (("clean", clean), ("corrupted", corrupted)):
        tokens, mask = model._prepare(given, None, None, None)
        if mask is not None and not bool(mask.all()):
            lengths = ", ".join(map(str, sorted(set(mask.sum(1).tolist()))))
            raise InputError(f"{name} has prompts of {lengths} tokens; sweep each length on its own")
        found.append(tokens)
    if found[0].shape != found[1].shape:
        sizes = [f"{n} x {t} tokens" for n, t in (tokens.shape for tokens in found)]
        raise InputError(
            f"clean has {sizes[0]} and corrupted {sizes[1]}; a patch needs prompts that correspond token by token"
        )
    return found[0], found[1]


def position(value: int, length: int, field: str) -> int:
    """A position counted from the beginning.

    Raises:
        InputError: one that the prompt does not have.
    """
    p = whole(value)
    if p is None or not -length <= p < length:
        raise InputError(f"{field}: {value!r} is not in a prompt of {length} tokens (0..{length - 1}, or from the end)")
    return p % length


def layers_of(model: HookedJamba, layers: Iterable[int] | None) -> tuple[int, ...] | None:
    """Distinct layers, ascending; None stays None.

    Raises:
        HookError: one that the model does not have.
        InputError: none, or no list.
    """
    if layers is None:
        return None
    if not isinstance(layers, Iterable):
        raise InputError(f"layers={layers!r} must be a list of layers, or None for all")
    found, n = {value: whole(value) for value in listed(layers)}, model.config.n_layers
    for value, layer in found.items():
        if layer is None or not 0 <= layer < n:
            raise HookError(f"layers: this model has layers 0..{n - 1}, not {value!r}")
    if not found:
        raise InputError("layers=[] holds nothing; leave it out for all that have what is asked for")
    return tuple(sorted(set(found.values())))


def listed(values: Iterable) -> list:
    """Of an array or a tensor its plain numbers."""
    return values.tolist() if isinstance(values, (np.ndarray, torch.Tensor)) else list(values)


def whole(value: object) -> int | None:
    """A whole number of any kind as int; None where it is none."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None
