"""Whether the heads that attend to labels are needed: they are taken away, against as many random heads.

Axes: B prompt, H head, P d_head, V vocabulary. Taken away is what a head reads, ``attn.hook_z``, at every position: by
zero, or by its mean over all positions of many prompts, which leaves what the head says whatever the prompt.
"""

from __future__ import annotations

import math
import random as random_module
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float

from jambascope.errors import InputError
from jambascope.hooks.intervals import at_least, bootstrap_interval
from jambascope.hooks.labels import FewShotPrompt, LabelAttention, batches, check_prompts, label_attention

if TYPE_CHECKING:
    from jambascope.model import HookedJamba

Head = tuple[int, int]
"""(layer, head)"""
Metric = Callable[[Float[torch.Tensor, "batch vocab"], Sequence[FewShotPrompt]], Float[torch.Tensor, " batch"]]
"""A number for each prompt from the logits at its query position."""
Means = dict[int, Float[torch.Tensor, "heads d_head"]]


def label_mass(
    logits: Float[torch.Tensor, "batch vocab"], prompts: Sequence[FewShotPrompt]
) -> Float[torch.Tensor, " batch"]:
    """Probability of the label set: sum of p(y) over ``label_ids``."""
    p = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    return torch.stack([row[list(prompt.label_ids)].sum() for row, prompt in zip(p, prompts, strict=True)])


@dataclass(frozen=True, eq=False)
class HeadAblation:
    """A metric with and without some heads, for every prompt, on the CPU in float64."""

    heads: tuple[Head, ...]
    random_heads: tuple[tuple[Head, ...], ...]
    """The sets of as many other heads that were taken away for comparison."""
    ablation: Literal["zero", "mean"]
    clean: Float[torch.Tensor, " prompts"]
    ablated: Float[torch.Tensor, " prompts"]
    random: Float[torch.Tensor, "draws prompts"]

    @property
    def p_value(self) -> float:
        """How often random heads change the metric's mean as much as these do, or more: (1 + such draws) / (1 + draws).

        The intervals are of prompts and take the heads that were drawn as they are: with enough prompts any heads
        differ from the average of others.
        """
        effect, random = (self.ablated - self.clean).mean(), (self.random - self.clean).mean(1)
        return (1 + int((random.abs() >= effect.abs()).sum())) / (1 + len(random))

    def rows(self) -> list[dict[str, Any]]:
        """Mean and 95 % bootstrap interval over prompts of the metric (``clean``), the change that comes of taking the
        heads away (``effect``) or random ones (``random_effect``, draws averaged), and their ``difference``; the
        ``p_value`` is that of the effect."""
        random = self.random.mean(0)
        samples = {
            "clean": self.clean,
            "effect": self.ablated - self.clean,
            "random_effect": random - self.clean,
            "difference": self.ablated - random,
        }
        found = []
        for what, values in samples.items():
            low, high = bootstrap_interval(values)
            row = {"what": what, "mean": float(values.mean()), "low": float(low), "high": float(high), "n": len(values)}
            found.append({**row, "p_value": self.p_value if what == "effect" else math.nan})
        return found


@dataclass(frozen=True, eq=False)
class LabelHeadTest:
    """Heads chosen on one half of the prompts and taken away on the other."""

    selection: LabelAttention
    """Of the half on which the heads were chosen."""
    ablation: HeadAblation
    """Of the other half."""
    chosen_on: tuple[int, ...]
    """Indices of the prompts of the first half."""
    confirmed_on: tuple[int, ...]


@torch.no_grad()
def mean_head_outputs(model: HookedJamba, prompts: Sequence[FewShotPrompt], batch_size: int = 16) -> Means:
    """Mean of ``hook_z`` over all positions of all prompts, padding left out: attention layer -> [H P]."""
    check_prompts(model, prompts, batch_size)
    sums: dict[int, torch.Tensor] = {}
    dtype = torch.promote_types(model.dtype, torch.float32)
    for batch in batches(model, prompts, batch_size):
        weights = batch.mask.to(dtype)[..., None, None]

        def add(z: torch.Tensor, hook: Any, weights: torch.Tensor = weights) -> None:
            sums[hook.layer()] = sums.get(hook.layer(), 0) + (z.to(dtype) * weights).sum((0, 1))

        with model.hooks([(f"blocks.{layer}.attn.hook_z", add) for layer in model.config.attention_layers]):
            model(batch.tokens, attention_mask=batch.mask, return_type=None)
    total = sum(len(p.tokens) for p in prompts)
    return {layer: (s / total).to(model.dtype) for layer, s in sums.items()}


@torch.no_grad()
def metric_without(
    model: HookedJamba,
    prompts: Sequence[FewShotPrompt],
    heads: Sequence[Head],
    *,
    means: Means | None = None,
    metric: Metric = label_mass,
    batch_size: int = 16,
) -> Float[torch.Tensor, " prompts"]:
    """The metric of every prompt with ``heads`` taken away (none: the model as it is), float64 on the CPU.

    Args:
        heads: (layer, head) pairs.
        means: what stands in for each head, from :func:`mean_head_outputs`; None is zero.

    Raises:
        InputError: a head that the model does not have, or a metric that is not one number for each prompt.
    """
    check_prompts(model, prompts, batch_size)
    _check_heads(model, heads)
    hooks = []
    for layer in sorted({layer for layer, _ in heads}):
        own = [head for at, head in heads if at == layer]

        def replace(z: torch.Tensor, hook: Any, own: list[int] = own) -> torch.Tensor:
            z = z.clone()
            z[:, :, own] = 0 if means is None else means[hook.layer()][own]
            return z

        hooks.append((f"blocks.{layer}.attn.hook_z", replace))
    found = []
    for batch in batches(model, prompts, batch_size):
        with model.hooks(hooks):
            logits = model(batch.tokens, attention_mask=batch.mask)
        rows = torch.arange(len(logits), device=logits.device)
        values = metric(logits[rows, batch.queries], batch.prompts)
        if values.shape != (len(batch.prompts),):
            raise InputError(f"metric returned shape {tuple(values.shape)}; give a number for each prompt, [batch]")
        found.append(values.cpu().double())
    return torch.cat(found)


def ablate_heads(
    model: HookedJamba,
    prompts: Sequence[FewShotPrompt],
    heads: Sequence[Head],
    *,
    ablation: Literal["zero", "mean"] = "mean",
    reference: Sequence[FewShotPrompt] | None = None,
    metric: Metric = label_mass,
    draws: int = 20,
    batch_size: int = 16,
    seed: int = 0,
) -> HeadAblation:
    """Take ``heads`` away, and in turn ``draws`` random sets of as many of the other heads (fewer where fewer exist).

    Args:
        reference: the prompts whose mean stands in for a head with ``ablation="mean"``; None is ``prompts``.

    Raises:
        InputError: no heads, heads that the model does not have, or too many to leave as many others.
    """
    reference = prompts if reference is None else reference
    _check_ablation(model, prompts, reference, ablation, draws, batch_size)
    heads = tuple(heads)
    _check_heads(model, heads)
    random_heads = random_head_sets(model, heads, draws, seed)
    means = None if ablation == "zero" else mean_head_outputs(model, reference, batch_size)
    options = dict(means=means, metric=metric, batch_size=batch_size)
    return HeadAblation(
        heads,
        random_heads,
        ablation,
        metric_without(model, prompts, (), **options),
        metric_without(model, prompts, heads, **options),
        torch.stack([metric_without(model, prompts, others, **options) for others in random_heads]),
    )


def confirm_label_heads(
    model: HookedJamba,
    prompts: Sequence[FewShotPrompt],
    k: int,
    *,
    ablation: Literal["zero", "mean"] = "mean",
    reference: Sequence[FewShotPrompt] | None = None,
    metric: Metric = label_mass,
    draws: int = 20,
    batch_size: int = 16,
    seed: int = 0,
) -> LabelHeadTest:
    """Choose the ``k`` heads that attend most to labels on a random half of the prompts; take them away on the other.

    Args:
        ablation, metric, draws: as :func:`ablate_heads` takes them.
        reference: the prompts of a mean ablation; None is the first half.

    Raises:
        InputError: fewer than two prompts, and as :func:`ablate_heads`.
    """
    _check_ablation(model, prompts, prompts if reference is None else reference, ablation, draws, batch_size)
    if len(prompts) < 2:
        raise InputError("prompts has 1 prompt; give at least 2, one to choose heads on and one to confirm them on")
    total = len(model.config.attention_layers) * model.config.n_heads
    if not 1 <= k <= total // 2:
        raise InputError(
            f"k={k!r} must lie in 1..{total // 2}: as many of the {total} heads must be left to compare with"
        )
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    first, second = sorted(order[: len(prompts) // 2]), sorted(order[len(prompts) // 2 :])
    chosen, held_out = ([prompts[i] for i in half] for half in (first, second))
    selection = label_attention(model, chosen, batch_size=batch_size)
    heads = [(row["layer"], row["head"]) for row in selection.top(k)]
    without = ablate_heads(
        model,
        held_out,
        heads,
        ablation=ablation,
        reference=chosen if reference is None else reference,
        metric=metric,
        draws=draws,
        batch_size=batch_size,
        seed=seed,
    )
    return LabelHeadTest(selection, without, tuple(first), tuple(second))


def _check_ablation(
    model: HookedJamba,
    prompts: Sequence[FewShotPrompt],
    reference: Sequence[FewShotPrompt],
    ablation: str,
    draws: int,
    batch_size: int,
) -> None:
    check_prompts(model, prompts, batch_size)
    check_prompts(model, reference, batch_size)
    if ablation not in ("zero", "mean"):
        raise InputError(f"ablation={ablation!r} must be 'zero' or 'mean'")
    at_least("draws", draws)


def _check_heads(model: HookedJamba, heads: Sequence[Head]) -> None:
    layers = model.config.attention_layers
    if not all(isinstance(head, tuple) and len(head) == 2 for head in heads):
        raise InputError(f"heads={list(heads)!r} must be (layer, head) pairs")
    for layer, head in heads:
        if layer not in layers:
            raise InputError(f"layer={layer!r} has no heads; the attention layers are {', '.join(map(str, layers))}")
        if not 0 <= head < model.config.n_heads:
            raise InputError(f"head={head!r} of layer {layer} must lie in 0..{model.config.n_heads - 1}")
    if len(set(heads)) < len(heads):
        raise InputError(f"heads={list(heads)!r} names a head twice")


def random_head_sets(
    model: HookedJamba, heads: Sequence[Head], draws: int, seed: int = 0
) -> tuple[tuple[Head, ...], ...]:
    """Up to ``draws`` different sets of as many heads, none of which is in ``heads``: fewer where fewer exist.

    Raises:
        InputError: no heads, or too many to leave as many others.
    """
    others = [
        (layer, head)
        for layer in model.config.attention_layers
        for head in range(model.config.n_heads)
        if (layer, head) not in heads
    ]
    if not heads or len(heads) > len(others):
        raise InputError(
            f"heads={list(heads)!r} leaves {len(others)} others; give at least one, and at most as many as are left"
        )
    random = random_module.Random(seed)
    sets: dict[tuple[Head, ...], None] = {}
    while len(sets) < min(draws, math.comb(len(others), len(heads))):
        sets[tuple(sorted(random.sample(others, len(heads))))] = None
    return tuple(sets)
