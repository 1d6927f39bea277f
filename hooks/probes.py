"""Linear probes: what can be read off a state, a residual stream or any other activation, and is it there to be read?

Axes: S sample, U unit (a layer, a channel: whatever is probed on its own), F feature, C class. A probe that fits may
have learned the task by itself, so every score stands beside that of a control task; the difference is the selectivity
(Hewitt and Liang, "Designing and Interpreting Probes with Control Tasks", arXiv 1909.03368). All scores are of samples
that the probe was not fitted on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Num

from jambascope.errors import InputError
from jambascope.hook_point import At
from jambascope.hook_table import resolve
from jambascope.hooks.intervals import percentiles, resampled_means

if TYPE_CHECKING:
    from jambascope.model import HookedJamba

ITERATIONS = 300
"""Most L-BFGS steps of a logistic probe; it stops before when the gradient is 1e-6 per sample."""


@dataclass(frozen=True)
class ProbeScores:
    """How well each unit's probe does on samples it has not seen; the same number for its control."""

    measure: Literal["accuracy", "R2"]
    """Share of samples right for classes; 1 - squared error / that of the fold's training mean for values."""
    score: Float[torch.Tensor, " units"]
    low: Float[torch.Tensor, " units"]
    """95 % interval, ``low`` to ``high``: percentiles of a bootstrap over groups of samples. Of what was predicted: the
    probes are not fitted again. With fewer than some ten groups it is too narrow."""
    high: Float[torch.Tensor, " units"]
    control: Float[torch.Tensor, " units"]
    """The same measure on the control task, mean over its repetitions."""
    selectivity: Float[torch.Tensor, " units"]
    """``score`` less ``control``."""
    selectivity_low: Float[torch.Tensor, " units"]
    """95 % interval of the selectivity, from the same bootstrap."""
    selectivity_high: Float[torch.Tensor, " units"]
    chance: float
    """Share of the commonest class; 0 for values (their mean)."""
    samples: int
    groups: int
    lost: Float[torch.Tensor, "samples units"]
    """Of every sample, predicted by the probe that was not fitted on it: 1 where its class was told wrong, or the
    squared error of its value."""
    control_lost: Float[torch.Tensor, "samples units"]
    """The same on the control task, mean over its repetitions."""


@torch.no_grad()
def collect(
    model: HookedJamba,
    tokens: Int[torch.Tensor, "prompts pos"],
    names: Sequence[str],
    positions: Sequence[int] | Int[torch.Tensor, "prompts kept"],
    attention_mask: Int[torch.Tensor, "prompts pos"] | None = None,
    batch: int = 16,
) -> dict[str, torch.Tensor]:
    """Activations of prompts at chosen positions, on the CPU in float32: name -> [prompts, kept, ...].

    The axes after ``kept`` are those of the hook table without B and T: [D] of ``hook_resid_post``, [E N] of
    ``mixer.hook_ssm_state``. Prompts run ``batch`` at a time and only the positions of a batch are looked at, so that
    even states cost what is kept.

    Args:
        names: hook points with a T axis, or their aliases.
        positions: the same for every prompt [kept], or each prompt's own [prompts, kept]; from 0, padding counted.
        attention_mask: [prompts, pos], 1 for tokens and 0 for padding; what is kept of padding means nothing.

    Raises:
        HookError: a name that this model does not have.
        InputError: positions or a batch that do not exist, a mask of another shape, or no names.
    """
    tokens = torch.as_tensor(tokens)
    if tokens.ndim != 2 or not tokens.numel():
        raise InputError(f"tokens have shape {tuple(tokens.shape)}; give [prompts, pos]")
    where = torch.as_tensor(positions).cpu()
    where = where.expand(len(tokens), -1) if where.ndim == 1 else where
    if where.ndim != 2 or len(where) != len(tokens) or not where.numel() or where.is_floating_point():
        raise InputError(f"positions have shape {tuple(where.shape)}; give integers, [kept] or [{len(tokens)}, kept]")
    if not 0 <= int(where.min()) <= int(where.max()) < tokens.shape[1]:
        raise InputError(f"positions {int(where.min())}..{int(where.max())} must be in 0..{tokens.shape[1] - 1}")
    if batch < 1 or not names or isinstance(names, str):
        raise InputError(f"batch={batch!r} must be at least 1, and names={names!r} a list of hook points")
    if attention_mask is not None and tuple(attention_mask.shape) != tuple(tokens.shape):
        raise InputError(f"attention_mask has shape {tuple(attention_mask.shape)}; give {tuple(tokens.shape)}")
    points = {name: resolve(name, model.hook_rows) for name in names}
    found: dict[str, list[torch.Tensor]] = {point: [] for point in points.values()}
    for start in range(0, len(tokens), batch):
        rows = slice(start, start + batch)
        looked_at = where[rows].unique()
        index = torch.searchsorted(looked_at, where[rows].contiguous())

        def keep(value: torch.Tensor, hook, index=index) -> None:
            value = value.movedim(hook.row.axes.index("T"), 1)
            index = index.to(value.device)
            found[hook.name].append(value[torch.arange(len(value), device=value.device)[:, None], index].float())

        mask = None if attention_mask is None else attention_mask[rows]
        with model.hooks([(point, At(looked_at.tolist(), keep)) for point in found]):
            model(tokens[rows], attention_mask=mask, return_type=None)
    return {name: torch.cat(found[point]).cpu() for name, point in points.items()}


@torch.no_grad()
def probe(
    features: Float[torch.Tensor, "samples *units features"],
    labels: Num[torch.Tensor, " samples"],
    *,
    method: Literal["logistic", "ridge"] | None = None,
    l2: float = 1.0,
    folds: int = 5,
    groups: Int[torch.Tensor, " samples"] | None = None,
    types: Int[torch.Tensor, " samples"] | None = None,
    controls: int = 1,
    bootstrap: int = 1000,
    seed: int = 0,
) -> ProbeScores:
    """Cross-validated linear probes of many units at once, with their control.

    Features are standardised by each training part; the penalty is that of scikit-learn: sum of losses + l2 / 2 |w|^2
    of a logistic probe (L-BFGS), squared error + l2 |w|^2 of a ridge (closed form), the intercept free. Arithmetic in
    float64.

    Args:
        features: [S U F], one probe for each unit, or [S F].
        labels: integers (or bool) are classes, floats values to regress.
        method: None is ``logistic`` for classes and ``ridge`` for values. A ``ridge`` on classes fits one-hot targets
            and takes the largest: far faster for many units.
        folds: parts of the samples of which each is predicted by a probe fitted on the others.
        groups: samples of one group (a prompt, a document) are never on both sides of a fold, and are resampled
            together; None takes every sample for itself, which is wrong for several positions of one prompt.
        types: a type (say the token) of each sample. Then the control is Hewitt and Liang's: every type gets one label
            drawn from those of the samples, which a probe with enough capacity memorises. None shuffles the labels.
        controls: repetitions of the control task.

    Raises:
        InputError: shapes that do not fit, fewer groups than folds, labels that do not differ, or options out of range.
    """
    features, labels, groups = _checked(features, labels, method, groups, types, l2, folds, controls, bootstrap)
    classes = not labels.is_floating_point()
    method = method or ("logistic" if classes else "ridge")
    n_classes = 0
    if classes:
        found, labels = labels.unique(return_inverse=True)
        n_classes = len(found)
    generator = torch.Generator().manual_seed(seed)
    n_groups = int(groups.max()) + 1
    fold = (torch.randperm(n_groups, generator=generator) % folds)[groups]
    tasks = [labels] + [_control(labels, types, generator) for _ in range(controls)]
    # Of every sample and unit what was lost, and what a constant would have lost: [tasks U S].
    losses = torch.stack([_losses(f, tasks, fold, folds, n_classes, method, l2) for f in features.unbind(1)], dim=2)
    per_group = losses.new_zeros(n_groups, *losses.shape[:3]).index_add_(0, groups, losses.movedim(-1, 0))
    scores = _score(per_group.mean(0))  # [tasks U]
    resampled = None
    if bootstrap:
        resampled = _score(resampled_means(per_group, seed, bootstrap).movedim(1, 0))  # [bootstrap tasks U]
    return _summary(scores, resampled, losses[0], classes, labels, n_groups)


def _summary(scores, resampled, lost, classes, labels, n_groups) -> ProbeScores:
    control = scores[1:].mean(0)
    low = high = selectivity_low = selectivity_high = torch.full_like(control, torch.nan)
    if resampled is not None:
        low, high = percentiles(resampled[:, 0])
        selectivity_low, selectivity_high = percentiles(resampled[:, 0] - resampled[:, 1:].mean(1))
    return ProbeScores(
        measure="accuracy" if classes else "R2",
        score=scores[0],
        low=low,
        high=high,
        control=control,
        selectivity=scores[0] - control,
        selectivity_low=selectivity_low,
        selectivity_high=selectivity_high,
        chance=float(torch.bincount(labels).max() / len(labels)) if classes else 0.0,
        samples=len(labels),
        groups=n_groups,
        lost=lost[0].T,
        control_lost=lost[1:].mean(0).T,
    )


def _checked(features, labels, method, groups, types, l2, folds, controls, bootstrap) -> tuple[torch.Tensor, ...]:
    features, labels = torch.as_tensor(features).detach().cpu(), torch.as_tensor(labels).cpu()
    features = features[:, None] if features.ndim == 2 else features
    if features.ndim != 3 or 0 in features.shape or labels.shape != features.shape[:1]:
        raise InputError(
            f"features and labels have shapes {tuple(features.shape)} and {tuple(labels.shape)}; give [samples, "
            "units, features] or [samples, features], and [samples]"
        )
    if not features.isfinite().all() or (labels.is_floating_point() and not labels.isfinite().all()):
        raise InputError("features and labels must be finite; some are inf or nan")
    classes = not labels.is_floating_point()
    if method not in (None, "ridge", "logistic") or (method == "logistic" and not classes):
        raise InputError(f"method={method!r} must be 'ridge', or 'logistic' with integer labels")
    if labels.min() == labels.max():
        raise InputError(f"labels are all {labels[0].item()}; a probe needs two classes or values at least")
    for name, value in (("groups", groups), ("types", types)):
        if value is not None and torch.as_tensor(value).shape != labels.shape:
            raise InputError(f"{name} has shape {tuple(torch.as_tensor(value).shape)}; give {tuple(labels.shape)}")
    groups = (
        torch.arange(len(labels)) if groups is None else torch.as_tensor(groups).cpu().unique(return_inverse=True)[1]
    )
    if not 2 <= folds <= int(groups.max()) + 1:
        raise InputError(f"folds={folds!r} must be between 2 and the number of groups, {int(groups.max()) + 1}")
    if not l2 > 0 or controls < 1 or bootstrap < 0:
        raise InputError(
            f"l2={l2!r} must be above 0, controls={controls!r} at least 1, bootstrap={bootstrap!r} not < 0"
        )
    return features.double(), labels.double() if not classes else labels.long(), groups


def _control(labels: torch.Tensor, types: torch.Tensor | None, generator: torch.Generator) -> torch.Tensor:
    """Labels of the control task: shuffled, or one for each type drawn from the labels' own distribution."""
    if types is None:
        return labels[torch.randperm(len(labels), generator=generator)]
    of_type, inverse = torch.as_tensor(types).cpu().unique(return_inverse=True)
    return labels[torch.randint(len(labels), (len(of_type),), generator=generator)][inverse]


def _score(lost: torch.Tensor) -> torch.Tensor:
    """Accuracy or R2 from sums or means of (lost, lost by a constant or 1 for each sample) along the first axis."""
    return 1 - lost[0] / lost[1].clamp_min(torch.finfo(lost.dtype).tiny)


def _losses(
    features: torch.Tensor,
    tasks: Sequence[torch.Tensor],
    fold: torch.Tensor,
    folds: int,
    n_classes: int,
    method: str,
    l2: float,
) -> torch.Tensor:
    """One unit's losses on samples left out, and those they are measured against: [2, tasks, S]."""
    out = features.new_zeros(2, len(tasks), len(features))
    for k in range(folds):
        train, test = fold != k, fold == k
        x, held_out = _standardised(features[train], features[test])
        for t, labels in enumerate(tasks):
            y = labels[train]
            if not n_classes:
                predicted = _ridge(x, y[:, None], held_out, l2)[:, 0]
                out[0, t, test] = (labels[test] - predicted).square()
                out[1, t, test] = (labels[test] - y.mean()).square()
                continue
            fit = _logistic if method == "logistic" else _ridge
            targets = F.one_hot(y, n_classes).double()
            out[0, t, test] = (fit(x, targets, held_out, l2).argmax(-1) != labels[test]).double()
            out[1, t, test] = 1
    return out


def _standardised(train: torch.Tensor, test: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean 0 and standard deviation 1 of each feature over ``train``; constant features become 0. In the coordinates of
    ``train``'s span, in which penalised probes are the same: at most as many features as samples."""
    mean, deviation = train.mean(0), train.std(0, correction=0)
    varies = deviation > 1e-12 * train.abs().amax(0).clamp_min(torch.finfo(train.dtype).tiny)
    scale = torch.where(varies, 1 / torch.where(varies, deviation, 1), 0)
    train, test = (train - mean) * scale, (test - mean) * scale
    if train.shape[1] <= len(train):
        return train, test
    basis = torch.linalg.qr(train.T).Q  # [F S]
    return train @ basis, test @ basis


def _ridge(x: torch.Tensor, targets: torch.Tensor, held_out: torch.Tensor, l2: float) -> torch.Tensor:
    """Predictions [test C] of the ridge fitted to ``targets`` [train C]; x has mean 0, so the intercept is theirs."""
    mean = targets.mean(0)
    gram = x.T @ x + l2 * torch.eye(x.shape[1], dtype=x.dtype)
    return held_out @ torch.cholesky_solve(x.T @ (targets - mean), torch.linalg.cholesky(gram)) + mean


def _logistic(x: torch.Tensor, targets: torch.Tensor, held_out: torch.Tensor, l2: float) -> torch.Tensor:
    """Logits [test C] of the multinomial logistic regression fitted to one-hot ``targets`` [train C]."""
    weight = x.new_zeros(x.shape[1], targets.shape[1])
    intercept = targets.mean(0).clamp_min(1e-6).log()
    minimiser = torch.optim.LBFGS(
        [weight, intercept],
        max_iter=ITERATIONS,
        tolerance_grad=1e-6,
        tolerance_change=0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def loss() -> torch.Tensor:
        """Mean loss; its gradient written out, which is faster than autograd."""
        log_p = (x @ weight + intercept).log_softmax(-1)
        error = (log_p.exp() - targets) / len(x)
        weight.grad, intercept.grad = x.T @ error + l2 / len(x) * weight, error.sum(0)
        return -(log_p * targets).sum() / len(x) + l2 / (2 * len(x)) * weight.square().sum()

    minimiser.step(loss)
    return held_out @ weight + intercept
