"""What attention heads look at: previous tokens, duplicates, and what followed the current token before (induction).

Axes: B sequence, T query position, S key position, L attention layer (in the order of ``layers``), H head. With A the
pattern of a head and P the positions that the kind of head would look at, 0 or 1, the score of a sequence is

    sum_ij A_ij P_ij / sum_ij A_ij        over its queries i

(TransformerLens's ``head_detector`` with ``error_measure="mul"``, which takes all queries). Queries that have nothing
to look at, such as all of the first half of a repeated sequence, keep even a perfect head below 1; so by default only
those that have something count. Then a perfect head scores 1, and the score is the mean attention of Olsson et al.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int

from jambascope import tokens as tokenization
from jambascope.errors import InputError
from jambascope.hook_point import At
from jambascope.hooks.intervals import at_least, bootstrap_interval

if TYPE_CHECKING:
    from jambascope.model import HookedJamba, Input

Kind = Literal["previous_token", "duplicate_token", "induction"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Progress = Callable[[float], Any]
"""Given the share that is done; False ends a measurement early, with the sequences that are done."""


@dataclass(frozen=True, eq=False)
class HeadScores:
    """One kind of score for every attention head, on the CPU in float64."""

    kind: Kind
    layers: tuple[int, ...]
    """The model's attention layers, in the order of the axis L."""
    samples: Float[torch.Tensor, "sequences layers heads"]
    """The score of each sequence; NaN where none of its queries counts."""
    uniform_samples: Float[torch.Tensor, " sequences"]
    """The score of a head that spreads its attention evenly over all that it may see: exact, from P alone."""
    control_samples: Float[torch.Tensor, "sequences layers heads"] | None
    """The score, for the same P, on the same tokens in random order: what the position alone explains."""

    @property
    def mean(self) -> Float[torch.Tensor, "layers heads"]:
        return self.samples.nanmean(0)

    @cached_property
    def interval(self) -> tuple[Float[torch.Tensor, "layers heads"], Float[torch.Tensor, "layers heads"]]:
        """95 % bootstrap interval of the mean over sequences."""
        return bootstrap_interval(self.samples)

    @property
    def uniform(self) -> float:
        """Chance for this pattern and length: the mean score of even attention."""
        return float(self.uniform_samples.nanmean())

    def rows(self) -> list[dict[str, Any]]:
        """One row per head: kind, layer, head, score, low, high, uniform, control, control_low, control_high, n."""
        columns = {"score": self.mean, "low": self.interval[0], "high": self.interval[1]}
        if self.control_samples is not None:
            low, high = bootstrap_interval(self.control_samples)
            columns |= {"control": self.control_samples.nanmean(0), "control_low": low, "control_high": high}
        rest = {"uniform": self.uniform, "n": int((~self.uniform_samples.isnan()).sum())}
        return [{"kind": self.kind, **row, **rest} for row in head_rows(self.layers, columns)]

    def top(self, k: int = 10) -> list[dict[str, Any]]:
        """The rows of the ``k`` heads with the highest score, highest first."""
        return top_rows(self.rows(), "score", k)


def head_rows(layers: Sequence[int], columns: dict[str, Float[torch.Tensor, "layers heads"]]) -> list[dict[str, Any]]:
    """One dict per head with its layer, its number and its value in each column."""
    values = {name: column.tolist() for name, column in columns.items()}
    heads = next(iter(columns.values())).shape[1]
    return [
        {"layer": layer, "head": head, **{name: value[i][head] for name, value in values.items()}}
        for i, layer in enumerate(layers)
        for head in range(heads)
    ]


def top_rows(rows: list[dict[str, Any]], key: str, k: int) -> list[dict[str, Any]]:
    """The ``k`` rows with the highest ``key``, highest first, NaN last."""
    at_least("k", k)
    return sorted(rows, key=lambda row: (row[key] != row[key], -row[key]))[:k]


def drawable_tokens(model: HookedJamba) -> Int[torch.Tensor, " ids"]:
    """The ids that random tokens are drawn from: those that the tokenizer has, without special ones."""
    config, tokenizer = model.config, model.tokenizer
    special = {config.bos_token_id, config.pad_token_id, *config.eos_token_ids}
    special |= set() if tokenizer is None else set(tokenizer.all_special_ids)
    known = config.d_vocab if tokenizer is None else min(config.d_vocab, len(tokenizer))
    return torch.tensor([i for i in range(known) if i not in special])


def repeated_random_tokens(
    model: HookedJamba, sequences: int = 32, length: int = 50, times: int = 2, seed: int = 0
) -> Int[torch.Tensor, "sequences pos"]:
    """<bos> and ``length`` different random tokens, said ``times`` times (Olsson et al. 2022): [B 1+length*times].

    Special tokens are not drawn, nor ids that the tokenizer does not have; a model without <bos> gets none. No token
    comes twice in one repetition, so that what a head should look at is never in doubt.

    Raises:
        InputError: fewer than one sequence, two tokens or two repetitions; more tokens than the vocabulary has, or
            than the model's context holds.
    """
    for name, value, least in (("sequences", sequences, 1), ("length", length, 2), ("times", times, 2)):
        at_least(name, value, least)
    config, usable = model.config, drawable_tokens(model)
    if length > len(usable):
        raise InputError(f"length={length} different tokens cannot be drawn from {len(usable)}; make length smaller")
    bos = [] if config.bos_token_id is None else [config.bos_token_id]
    if len(bos) + length * times > config.n_ctx:
        raise InputError(
            f"length={length} said times={times} exceeds the model's context of {config.n_ctx}; make either smaller"
        )
    random = torch.Generator().manual_seed(seed)
    once = torch.stack([usable[torch.randperm(len(usable), generator=random)[:length]] for _ in range(sequences)])
    return torch.cat((torch.tensor(bos, dtype=torch.long).expand(sequences, -1), once.repeat(1, times)), 1)


def detection_pattern(
    kind: Kind, tokens: Int[torch.Tensor, "batch pos"], mask: Bool[torch.Tensor, "batch pos"] | None = None
) -> Bool[torch.Tensor, "batch query key"]:
    """Where a perfect head of this kind may look: P [B T S], false for padding.

    ``previous_token``: j = i - 1. ``duplicate_token``: j < i with the same token. ``induction``: the position after an
    earlier one with the same token, j - 1 < i and token j - 1 = token i. On sequences without padding these are the
    patterns of TransformerLens's ``head_detector``.
    """
    if kind not in KINDS:
        raise InputError(f"kind={kind!r} must be one of {', '.join(KINDS)}")
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    pairs = real[:, :, None] & real[:, None, :]
    query, key = (torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(d) for d in (1, 0))
    if kind == "previous_token":
        return pairs & (key == query - 1)
    earlier = pairs & (tokens[:, :, None] == tokens[:, None, :]) & (key < query)
    if kind == "duplicate_token":
        return earlier
    return earlier.roll(1, dims=2) & pairs & (key > 0) & (key <= query)


def shuffled(
    tokens: Int[torch.Tensor, "batch pos"],
    mask: Bool[torch.Tensor, "batch pos"] | None = None,
    bos_token_id: int | None = None,
    seed: int = 0,
) -> Int[torch.Tensor, "batch pos"]:
    """Every sequence's tokens in random order; padding, and <bos> where a sequence begins with it, stay in place."""
    random = torch.Generator().manual_seed(seed)
    out = tokens.cpu().clone()
    for row, real in zip(out, torch.ones_like(out).bool() if mask is None else mask.cpu(), strict=True):
        places = real.nonzero()[:, 0]
        places = places[1:] if row[places[0]] == bos_token_id else places
        row[places] = row[places[torch.randperm(len(places), generator=random)]]
    return out.to(tokens.device)


@torch.no_grad()
def score_heads(
    model: HookedJamba,
    prompts: Input | None = None,
    kinds: Kind | Iterable[Kind] = KINDS,
    *,
    attention_mask: Int[torch.Tensor, "batch pos"] | None = None,
    prepend_bos: bool | None = None,
    queries: Literal["with_target", "all"] = "with_target",
    control: bool = True,
    batch_size: int = 16,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[Kind, HeadScores]:
    """Score every head of every attention layer; patterns are reduced as they appear, none is kept.

    Induction is the prefix-matching score of Olsson et al. ("In-context Learning and Induction Heads", 2022); the
    formula stands at the top of this module. A positional head (previous token, or a fixed distance) keeps its score in
    the control; one that matches tokens falls to chance. Score ``HookedJamba(model.config)`` for an untrained one.

    Args:
        prompts: token ids [B T] or [T], a prompt or a list of prompts; None is ``repeated_random_tokens(model)``.
        kinds: which scores.
        attention_mask: [B T], 1 for tokens and 0 for padding, on either side.
        queries: ``"with_target"`` counts the queries for which P is not empty, ``"all"`` every token, as
            TransformerLens's ``detect_head`` does.
        control: also run the same tokens in random order (``seed``).
        batch_size: sequences run at a time; the largest thing held is one layer's [B H T S].
        progress: told the share that is done after each batch.

    Returns:
        Scores by kind.

    Raises:
        InputError: a model without attention; prompts in which no query has anything to look at.
    """
    layers = attention_layers(model)
    prompts = repeated_random_tokens(model) if prompts is None else prompts
    tokens, mask = prepare(model, prompts, attention_mask, prepend_bos)
    if queries not in ("with_target", "all"):
        raise InputError(f"queries={queries!r} must be 'with_target' or 'all'")
    at_least("batch_size", batch_size)
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    check_targets(kinds, tokens, mask)
    permuted = shuffled(tokens, mask, model.config.bos_token_id, seed) if control else None
    found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []
    for start in range(0, len(tokens), batch_size):
        part = tokens[start : start + batch_size]
        real = torch.ones_like(part, dtype=torch.bool) if mask is None else mask[start : start + batch_size]
        P = torch.stack([detection_pattern(kind, part, real) for kind in kinds])
        counted = P.any(-1) if queries == "with_target" else real.expand(len(kinds), -1, -1)
        scores = pattern_scores(model, part, real, P, counted, layers)
        rows = None if permuted is None else permuted[start : start + batch_size]
        other = None if rows is None else pattern_scores(model, rows, real, P, counted, layers)
        found.append((scores, _uniform(P, counted, real), other))
        if progress is not None and progress(min(1.0, (start + batch_size) / len(tokens))) is False:
            break
    scores, uniform = (torch.cat([f[i] for f in found], 1) for i in (0, 1))
    others = torch.cat([f[2] for f in found], 1) if control else None
    return {
        kind: HeadScores(kind, layers, scores[i], uniform[i], None if others is None else others[i])
        for i, kind in enumerate(kinds)
    }


def attention_layers(model: HookedJamba) -> tuple[int, ...]:
    """The model's attention layers; InputError when there are none."""
    if not model.config.attention_layers:
        raise InputError("this model has no attention layers, so it has no heads; give one that has attention")
    return model.config.attention_layers


def prepare(
    model: HookedJamba, prompts: Input, attention_mask: torch.Tensor | None, prepend_bos: bool | None = None
) -> tuple[Int[torch.Tensor, "batch pos"], Bool[torch.Tensor, "batch pos"] | None]:
    """Checked tokens [B T] on the model's device and their mask, None when nothing is padded."""
    if isinstance(prompts, (str, list)):
        prompts, mask = tokenization.encode(model, prompts, prepend_bos)
        attention_mask = mask if attention_mask is None else attention_mask
    tokens, mask = tokenization.check(prompts, attention_mask, model.config.d_vocab, model.device)
    return tokens, mask


def check_targets(kinds: Sequence[Kind], tokens: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Raise InputError when no prompt has anything for one of the kinds of head to look at."""
    if not kinds:
        raise InputError(f"kinds is empty; name at least one of {', '.join(KINDS)}")
    for kind in kinds:
        if not has_targets(kind, tokens, mask):
            need = "two tokens" if kind == "previous_token" else "a token that comes twice"
            raise InputError(f"no prompt has {need}, which kind={kind!r} needs; give longer prompts or leave it out")


def has_targets(kind: Kind, tokens: Int[torch.Tensor, "batch pos"], mask: torch.Tensor | None = None) -> bool:
    """Whether any prompt has anything for a kind of head to look at."""
    return any(
        bool(detection_pattern(kind, tokens[i : i + 1], None if mask is None else mask[i : i + 1]).any())
        for i in range(len(tokens))
    )


def pattern_scores(
    model: HookedJamba,
    tokens: Int[torch.Tensor, "batch pos"],
    mask: Bool[torch.Tensor, "batch pos"],
    P: Bool[torch.Tensor, "kinds batch query key"],
    counted: Bool[torch.Tensor, "kinds batch query"],
    layers: Sequence[int],
) -> Float[torch.Tensor, "kinds batch layers heads"]:
    """sum A P / sum A over the ``counted`` queries from one forward pass, in which only the rows of queries that count
    for some sequence and kind are laid open."""
    looked_at = counted.any((0, 1))
    looked_at[0] |= ~looked_at.any()  # a batch in which nothing counts gives NaN like a sequence in which nothing does
    positions = looked_at.nonzero()[:, 0]
    dtype = torch.promote_types(model.dtype, torch.float32)
    P, counted = (P & counted[..., None])[:, :, positions].to(dtype), counted[:, :, positions].to(dtype)
    sums: list[tuple[torch.Tensor, torch.Tensor]] = []

    def reduce(pattern: torch.Tensor, hook: Any) -> None:
        A = pattern.to(dtype)
        sums.append((einsum(A, P, "b h t s, k b t s -> k b h"), einsum(A.sum(-1), counted, "b h t, k b t -> k b h")))

    look = At(positions.tolist(), reduce)
    with model.hooks([(f"blocks.{layer}.attn.hook_pattern", look) for layer in layers]):
        model(tokens, attention_mask=mask, return_type=None)
    hit, total = (torch.stack(part, 2).cpu().double() for part in zip(*sums, strict=True))
    return hit / total


def _uniform(
    P: Bool[torch.Tensor, "kinds batch query key"],
    counted: Bool[torch.Tensor, "kinds batch query"],
    mask: Bool[torch.Tensor, "batch pos"],
) -> Float[torch.Tensor, "kinds batch"]:
    """The score of a head that gives every visible key the same weight; NaN without a query that counts."""
    visible = mask.cumsum(-1).clamp_min(1).cpu().double()
    share = P.sum(-1).cpu().double() / visible
    counted = counted.cpu().double()
    return (share * counted).sum(-1) / counted.sum(-1)
