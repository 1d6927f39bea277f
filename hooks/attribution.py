"""Which parts of a model speak for a token: direct logit attribution, exact on hybrids.

The logits are linear in the last residual stream once the scale of the final norm is taken as it was in the run, and
that stream is a sum: logit_v = sum over components c of <c, w * W_U[:, v]> / s, with w the norm's weight and s its
scale (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; Wang et al., arXiv 2211.00593, 3).
Components: the embedding, every attention head, Mamba mixer, dense feed-forward and expert. They sum to the logits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, Int

from jambascope.activation_cache import ActivationCache
from jambascope.errors import InputError
from jambascope.hooks.logit_lens import chosen_positions, target_ids
from jambascope.residual import parts

if TYPE_CHECKING:
    from jambascope.model import HookedJamba

Target = str | int | torch.Tensor


@dataclass(frozen=True)
class LogitAttribution:
    """What each component adds to a logit, or to a difference of two."""

    labels: tuple[str, ...]
    """``embed``, ``L4H3`` (head), ``0_mixer_out``, ``0_mlp_out``, ``L1S0`` (slot) or ``L1E3`` (expert)."""
    values: Float[torch.Tensor, "component batch pos"]
    """float32 (float64 of a float64 model)."""
    positions: tuple[int, ...]
    logits: Float[torch.Tensor, "batch pos"]
    """What the model said: the components sum to it."""

    @property
    def remainder(self) -> Float[torch.Tensor, "batch pos"]:
        """The logit minus the sum of the components: rounding, unless hooks replaced the stream or the logits."""
        return self.logits - self.values.sum(0)

    def top(self, k: int = 10) -> list[tuple[str, float]]:
        """The ``k`` components that matter most, by the size of their mean over rows and positions."""
        mean = self.values.mean((1, 2))
        order = mean.abs().topk(min(k, len(mean))).indices.tolist()
        return [(self.labels[i], float(mean[i])) for i in order]

    def by_layer(self, n_layers: int) -> Float[torch.Tensor, "layer 2 batch pos"]:
        """What the mixer and the feed-forward of each layer add together; the embedding is in neither."""
        sums = self.values.new_zeros(n_layers, 2, *self.values.shape[1:])
        for label, values in zip(self.labels, self.values, strict=True):
            place = place_of(label)
            if place is not None:
                sums[place] += values
        return sums

    def __getitem__(self, label: str) -> Float[torch.Tensor, "batch pos"]:
        """One component's values."""
        if label not in self.labels:
            raise InputError(f"no component {label!r}; they are {', '.join(self.labels[:6])}, ...")
        return self.values[self.labels.index(label)]


def place_of(label: str) -> tuple[int, int] | None:
    """The layer of a component, and 0 for its mixer or 1 for its feed-forward; None of the embedding."""
    found = re.fullmatch(r"L(\d+)([HSE])\d+|(\d+)_(mixer|mlp)_out", label)
    if found is None:
        return None
    return int(found[1] or found[3]), int((found[2] or found[4]) in ("S", "E", "mlp"))


@torch.no_grad()
def direct_logit_attribution(
    model: HookedJamba,
    tokens: str | list[str] | Int[torch.Tensor, "batch pos"],
    target: Target,
    other: Target | None = None,
    *,
    positions: int | Iterable[int] | None = -1,
    experts: Literal["slots", "experts"] = "slots",
    attention_mask: Int[torch.Tensor, "batch pos"] | None = None,
) -> LogitAttribution:
    """One forward pass; what every component adds to the logit of ``target``, or to that minus the logit of ``other``.

    Args:
        target, other: a token, or one for each row and chosen position (whatever broadcasts to [B, P]).
        positions: where the logits are read; negative ones count from the end, and must not be padding; all when None.
        experts: MoE layers by slot (0 is the likeliest expert of a token) or by expert.

    Raises:
        InputError: tokens, positions or ``experts`` that do not fit.
    """
    if experts not in ("slots", "experts"):
        raise InputError(f"experts={experts!r} must be 'slots' or 'experts'")
    ids, mask = model._prepare(tokens, attention_mask, None, None)
    positions = chosen_positions(positions, ids.shape[1], mask)
    shape = (len(ids), len(positions))
    wanted, against = target_ids(model, target, shape), target_ids(model, other, shape)
    names = _names(model)
    logits, cache = model.run_with_cache(ids, attention_mask=mask, names_filter=names, pos_slice=list(positions))
    dtype = torch.promote_types(model.dtype, torch.float32)
    direction = model.W_U.T[wanted].to(dtype)
    logits = logits[:, list(positions)].to(dtype)
    said = logits.gather(-1, wanted[..., None])[..., 0]
    if against is not None:
        direction = direction - model.W_U.T[against]
        said = said - logits.gather(-1, against[..., None])[..., 0]
    direction = direction * model.ln_final.weight / cache["ln_final.hook_scale"]
    labels, values = _attribute(cache, direction, experts)
    return LogitAttribution(tuple(labels), values, positions, said)


def _attribute(
    cache: ActivationCache, direction: Float[torch.Tensor, "*batch_and_pos d_model"], experts: str
) -> tuple[list[str], torch.Tensor]:
    """Labels, and the product of every addend of the last stream with a direction, [component *batch_and_pos]."""
    labels, values = [], []
    for part in parts(cache, heads=True, experts=experts):
        labels += part.labels
        values.append((part.values.to(direction.dtype) * direction).sum(-1))
    return labels, torch.cat(values)


def _names(model: HookedJamba) -> list[str]:
    """What the decomposition of the last stream reads."""
    names = ["hook_embed", "ln_final.hook_scale"]
    for i, (mixer, feed_forward) in enumerate(zip(model.config.mixers, model.config.feed_forwards, strict=True)):
        names.append(f"blocks.{i}.attn.hook_z" if mixer == "attention" else f"blocks.{i}.hook_mixer_out")
        if feed_forward == "dense":
            names.append(f"blocks.{i}.hook_mlp_out")
        elif feed_forward == "moe":
            names += [f"blocks.{i}.mlp.hook_expert_out", f"blocks.{i}.mlp.router.hook_expert_indices"]
    return names
