"""What a patch does, in one number for each row of logits; computed on the logits' device.

    metrics = [logit_difference("Positive", "Negative"), kl_divergence(), label_mass(["Positive", "Negative"])]

Tokens are ids or text; where prompt pairs have answers of their own, a list with one for each pair.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int

from jambascope.errors import InputError

if TYPE_CHECKING:
    from jambascope.model import HookedJamba

Token = str | int
Logits = Float[torch.Tensor, "row read vocab"]


@dataclass(frozen=True)
class Reference:
    """What rows of logits belong to."""

    pair: Int[torch.Tensor, " row"]
    """The prompt pair of each row."""
    clean: Float[torch.Tensor, "pair read vocab"]
    """The logits of the clean prompts, at the positions that the metric reads."""
    corrupted: Float[torch.Tensor, "pair read vocab"]
    tokens: Mapping[str, Int[torch.Tensor, "pair ..."]] = field(default_factory=dict)
    """The ids of the metric's own tokens."""

    def rows(self, of_pairs: torch.Tensor) -> torch.Tensor:
        """[pair ...] -> [row ...]"""
        return of_pairs.index_select(0, self.pair)


@dataclass(frozen=True)
class Metric:
    """A number for each row of logits.

    A function of one argument, of the logits alone, may stand for a metric that reads the last position.
    """

    name: str
    function: Callable[[Logits, Reference], Float[torch.Tensor, " row"]]
    positions: tuple[int, ...] = (-1,)
    """The positions whose logits it gets, ascending; negative ones count from the end of the prompt."""
    tokens: Mapping[str, Any] = field(default_factory=dict)
    """Tokens that it asks about, by name: looked up and checked before anything runs."""


def logit_difference(correct: Token | Sequence[Token], wrong: Token | Sequence[Token], position: int = -1) -> Metric:
    """Logit of ``correct`` minus that of ``wrong`` (Wang et al., arXiv 2211.00593, 2.3)."""

    def difference(logits: Logits, at: Reference) -> Float[torch.Tensor, " row"]:
        return _picked(_wide(logits), at, "correct") - _picked(_wide(logits), at, "wrong")

    return Metric("logit_difference", difference, (position,), {"correct": correct, "wrong": wrong})


def probability(token: Token | Sequence[Token], position: int = -1) -> Metric:
    """Probability of a token."""

    def p(logits: Logits, at: Reference) -> Float[torch.Tensor, " row"]:
        return _picked(_wide(logits).softmax(-1), at, "token")

    return Metric("probability", p, (position,), {"token": token})


def log_probability(token: Token | Sequence[Token], position: int = -1) -> Metric:
    """Log probability of a token, nats."""

    def log_p(logits: Logits, at: Reference) -> Float[torch.Tensor, " row"]:
        return _picked(_wide(logits).log_softmax(-1), at, "token")

    return Metric("log_probability", log_p, (position,), {"token": token})


def rank(token: Token | Sequence[Token], position: int = -1) -> Metric:
    """How many tokens are likelier: 0 when it is the likeliest."""

    def likelier(logits: Logits, at: Reference) -> Float[torch.Tensor, " row"]:
        own = _picked(logits, at, "token")
        return _wide((logits[:, 0] > own[:, None]).sum(-1))

    return Metric("rank", likelier, (position,), {"token": token})


def kl_divergence(position: int = -1) -> Metric:
    """KL(clean || patched), nats: what is lost by predicting with the patched run where the clean one is right."""

    def kl(logits: Logits, at: Reference) -> Float[torch.Tensor, " row"]:
        clean = at.rows(_wide(at.clean)[:, 0].log_softmax(-1))
        return (clean.exp() * (clean - _wide(logits)[:, 0].log_softmax(-1))).sum(-1)

    return Metric("kl_divergence", kl, (position,))


def label_mass(labels: Sequence[Token] | Sequence[Sequence[Token]], position: int = -1) -> Metric:
    """Probability of a label set: sum of p(y) over its labels, which may be a list of them for each pair."""

    def mass(logits: Logits, at: Reference) -> Float[torch.Tensor, " row"]:
        return _wide(logits)[:, 0].softmax(-1).gather(1, at.rows(at.tokens["labels"])).sum(-1)

    return Metric("label_mass", mass, (position,), {"labels": labels})


def as_metrics(metric: Metric | Callable | Sequence[Metric | Callable]) -> list[Metric]:
    """Metrics one by one, with names of their own; anything else raises InputError."""
    given = list(metric) if isinstance(metric, (list, tuple)) else [metric]
    found = []
    for one in given:
        if callable(one) and not isinstance(one, Metric):
            function = one
            _check_takes_logits(function)
            one = Metric(getattr(function, "__name__", "metric"), lambda logits, at, f=function: f(logits))
        if not isinstance(one, Metric):
            raise InputError(
                f"metric={one!r} must be a Metric, a function of logits [row read vocab], or a list of them"
            )
        found.append(one)
    if not found:
        raise InputError("metric=[] measures nothing; give at least one")
    names = [one.name for one in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"metric: two are called {twice!r}; give each a name of its own, with dataclasses.replace")
    return found


def _check_takes_logits(function: Callable) -> None:
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        raise InputError(
            f"metric={function!r} must take the logits alone; one of (logits, reference) is Metric(name, function)"
        ) from None
    except ValueError:
        return  # a built-in one does not say what it takes


def token_ids(model: HookedJamba, metric: Metric, pairs: int) -> dict[str, Int[torch.Tensor, "pair ..."]]:
    """The ids of a metric's tokens for each pair.

    Raises:
        InputError: text that is not one token, an id outside the vocabulary, or a list that is not one for each pair.
    """
    found = {}
    for name, value in metric.tokens.items():
        where = f"{metric.name}: {name}={value!r}"
        given = _plain(value)
        nested = isinstance(given, list) and any(isinstance(v, (list, tuple)) for v in given)
        if name == "labels":
            sets = given if nested else [given]
            if not all(isinstance(v, (list, tuple)) and v and len(set(v)) == len(v) for v in sets):
                raise InputError(f"{where}: give a list of different labels, or such a list for each prompt pair")
        if isinstance(given, list) and (nested or name != "labels") and len(given) != pairs:
            raise InputError(f"{where}: give one for all, or one for each of the {pairs} prompt pairs")
        if nested and len({len(v) for v in given}) > 1:
            raise InputError(f"{where}: give every pair as many")
        ids = torch.as_tensor(_ids(model, given, where), device=model.device)
        of_all = ids.ndim == 0 or (name == "labels" and ids.ndim == 1)
        found[name] = ids.expand(pairs, *ids.shape) if of_all else ids
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic, torch.Tensor)):
        return value.tolist()
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _ids(model: HookedJamba, value: Any, where: str) -> Any:
    if isinstance(value, (list, tuple)):
        return [_ids(model, v, where) for v in value]
    token = model.to_single_token(value) if isinstance(value, str) else value
    if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < model.config.d_vocab:
        raise InputError(f"{where}: {value!r} is no token; ids run from 0 to {model.config.d_vocab - 1}")
    return token


def _wide(values: torch.Tensor) -> torch.Tensor:
    """At least float32."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _picked(values: Logits, at: Reference, name: str) -> Float[torch.Tensor, " row"]:
    return values[:, 0].gather(1, at.rows(at.tokens[name])[:, None])[:, 0]
