"""What Mamba and Mamba-2 layers hold in their states, and for how long.

Axes: T position, E channel (d_inner), N state. The recurrence of Mamba-1 (Gu and Dao, arXiv 2312.00752, eq. 2 and 4) is

    h_t[e, n] = exp(dt_t[e] A[e, n]) h_{t-1}[e, n] + dt_t[e] B_t[n] x_t[e],        A < 0

and of Mamba-2 (arXiv 2405.21060) the same with one dt and A for all entries of a head, which are repeated here; so
what stands in entry (e, n) after position j has decayed at position i by exp(A[e, n] (dt_{j+1} + ... + dt_i)).
Norms are root mean squares, so that groups of channels and layers of different widths can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from jaxtyping import Float, Int

from jambascope.errors import InputError
from jambascope.hook_point import At

if TYPE_CHECKING:
    from jambascope.model import HookedJamba


@dataclass(frozen=True)
class LayerStates:
    """The memory of one Mamba layer over one prompt, on the CPU in float32."""

    states: Float[torch.Tensor, "channels kept states"]
    """h_t after each of ``positions``."""
    dt: Float[torch.Tensor, "pos channels"]
    """Step sizes, after softplus."""
    A: Float[torch.Tensor, "channels states"]
    """Decay rates, negative, per unit of dt."""
    positions: tuple[int, ...]
    """At which the states were taken; dt is of all positions."""


@torch.no_grad()
def capture_states(
    model: HookedJamba, tokens: Int[torch.Tensor, "1 pos"], layer: int, positions: Iterable[int] | None = None
) -> LayerStates:
    """One forward pass over one prompt; the states of ``layer`` after ``positions`` (None: all) and its step sizes.

    Only the states asked for are ever made: E x positions x N floats.

    Raises:
        InputError: ``layer`` has no SSM state, more than one prompt, or a position that it does not have.
    """
    check_layers(model, [layer])
    tokens = _one_prompt(tokens)
    length = tokens.shape[-1]
    positions = tuple(range(length)) if positions is None else tuple(sorted(set(positions)))
    wrong = [p for p in positions if p not in range(length)]
    if wrong or not positions:
        raise InputError(f"positions={list(wrong or positions)[:8]} must be one or more of 0..{length - 1}")
    kept: dict[str, torch.Tensor] = {}

    def keep(value: torch.Tensor, hook) -> None:
        kept[hook.name.rpartition(".")[2]] = value[0].detach().float()

    mixer = f"blocks.{layer}.mixer"
    with model.hooks([(f"{mixer}.hook_ssm_state", At(positions, keep)), (f"{mixer}.hook_dt", keep)]):
        model(tokens, return_type=None)
    states, dt = kept["hook_ssm_state"].cpu(), _per_channel(kept["hook_dt"].cpu(), model.config.d_inner)
    return LayerStates(states, dt, decay_rates(model, layer), positions)


@torch.no_grad()
def state_norms(
    model: HookedJamba, tokens: Int[torch.Tensor, "1 pos"], layers: Iterable[int] | None = None
) -> dict[int, Float[torch.Tensor, " pos"]]:
    """Root mean square of the state of each Mamba layer after each position of one prompt: layer -> [T].

    Each layer's states are reduced as they appear, so that only one layer's [E T N] exists at a time.

    Raises:
        InputError: layers without SSM state, or more than one prompt.
    """
    layers, tokens = check_layers(model, layers), _one_prompt(tokens)
    norms: dict[int, torch.Tensor] = {}

    def reduce_to(layer: int):
        def hook(states: torch.Tensor, hook) -> None:
            norms[layer] = root_mean_square(states[0], (0, 2))

        return hook

    hooks = [(f"blocks.{layer}.mixer.hook_ssm_state", reduce_to(layer)) for layer in layers]
    with model.hooks(hooks):
        model(tokens, return_type=None)
    return {layer: norm.cpu() for layer, norm in norms.items()}


@torch.no_grad()
def decay_rates(model: HookedJamba, layer: int) -> Float[torch.Tensor, "channels states"]:
    """A = -exp(A_log) of a Mamba or Mamba-2 layer, [E N], float32 on the CPU."""
    check_layers(model, [layer])
    A = -torch.exp(model.blocks[layer].mixer.A_log.float()).cpu()
    return A if A.ndim == 2 else _per_channel(A, model.config.d_inner)[:, None].repeat(1, model.config.d_state)


def _one_prompt(tokens: Int[torch.Tensor, "1 pos"]) -> Int[torch.Tensor, "1 pos"]:
    tokens = torch.as_tensor(tokens)
    if tokens.ndim > 1 and len(tokens) != 1:
        raise InputError(f"tokens have shape {tuple(tokens.shape)}; give one prompt, [1 T] or [T]")
    return tokens


def _per_channel(values: torch.Tensor, d_inner: int) -> torch.Tensor:
    """Values of channels, or of Mamba-2 heads repeated for their channels: [... E]."""
    return values.repeat_interleave(d_inner // values.shape[-1], dim=-1)


def root_mean_square(values: torch.Tensor, dim: int | tuple[int, ...]) -> torch.Tensor:
    """sqrt(mean of squares) over ``dim``: the Euclidean norm divided by the root of the number of entries."""
    return values.float().square().mean(dim).sqrt()


def half_life(
    A: Float[torch.Tensor, "channels states"], dt: Float[torch.Tensor, "*pos channels"]
) -> Float[torch.Tensor, "channels states"]:
    """Tokens until an entry of the state has decayed to half, at the prompt's mean step size: [E N].

    ln 2 / (|A[e, n]| * mean dt[e]); infinite where the mean step size is 0.
    """
    mean_dt = dt.float().flatten(0, -2).mean(0) if dt.ndim > 1 else dt.float()
    return math.log(2) / (A.abs() * mean_dt[:, None])


def channel_half_life(half_lives: Float[torch.Tensor, "channels states"]) -> Float[torch.Tensor, " channels"]:
    """One half-life per channel, in tokens: the median over its N states (the mean of the middle two when even)."""
    ordered = half_lives.sort(-1).values
    N = ordered.shape[-1]
    return (ordered[:, (N - 1) // 2] + ordered[:, N // 2]) / 2


def channel_groups(
    half_lives: Float[torch.Tensor, "channels states"], groups: int = 8
) -> list[Int[torch.Tensor, " members"]]:
    """Channels sorted by half-life and split into ``groups`` of (nearly) equal size, the shortest first.

    A model with fewer channels than groups has one group per channel.
    """
    if groups < 1:
        raise InputError(f"groups={groups!r} must be at least 1")
    order = channel_half_life(half_lives).argsort(stable=True)
    return list(order.tensor_split(min(groups, len(order))))


def group_norms(
    states: Float[torch.Tensor, "channels pos states"], groups: list[Int[torch.Tensor, " members"]]
) -> Float[torch.Tensor, "groups pos"]:
    """Root mean square of the state of each group of channels after each position: [G T]."""
    return torch.stack([root_mean_square(states[members], (0, 2)) for members in groups])


def retention(
    A: Float[torch.Tensor, "channels states"], dt: Float[torch.Tensor, "pos channels"], end: int
) -> Float[torch.Tensor, "earlier channels states"]:
    """What share of the state after each position j up to ``end`` is left after position ``end``: [end+1 E N].

    exp(A[e, n] * sum of dt over j+1..end); 1 at ``end`` itself. The exponent is a sum of terms <= 0, never a
    difference of large sums.

    Raises:
        InputError: ``end`` is not a position of the prompt.
    """
    if not 0 <= end < len(dt):
        raise InputError(f"end={end!r} must be a position in 0..{len(dt) - 1}")
    elapsed = torch.cat([dt[1 : end + 1].flip(0).cumsum(0).flip(0), torch.zeros_like(dt[:1])])
    return torch.exp(elapsed[:, :, None] * A)


def group_retention(
    A: Float[torch.Tensor, "channels states"],
    dt: Float[torch.Tensor, "pos channels"],
    end: int,
    groups: list[Int[torch.Tensor, " members"]],
) -> Float[torch.Tensor, "groups earlier"]:
    """Mean retention over the entries of each group of channels, [G end+1]; one group at a time is held."""
    return torch.stack([retention(A[members], dt[:, members], end).mean((1, 2)) for members in groups])


def survival(
    A: Float[torch.Tensor, "channels states"], dt: Float[torch.Tensor, "pos channels"], start: int
) -> Float[torch.Tensor, "later channels states"]:
    """What share of the write at ``start`` is left after each position from there on: [T-start E N].

    exp(A[e, n] * sum of dt over start+1..i): 1 at ``start`` itself, where it has been written.

    Raises:
        InputError: ``start`` is not a position of the prompt.
    """
    if not 0 <= start < len(dt):
        raise InputError(f"start={start!r} must be a position in 0..{len(dt) - 1}")
    elapsed = torch.cat([torch.zeros_like(dt[:1]), dt[start + 1 :].cumsum(0)])
    return torch.exp(elapsed[:, :, None] * A)


def group_survival(
    A: Float[torch.Tensor, "channels states"],
    dt: Float[torch.Tensor, "pos channels"],
    start: int,
    groups: list[Int[torch.Tensor, " members"]],
) -> Float[torch.Tensor, "groups later"]:
    """Mean survival over the entries of each group of channels, [G T-start]; one group at a time is held."""
    return torch.stack([survival(A[members], dt[:, members], start).mean((1, 2)) for members in groups])


def over_positions(states: Float[torch.Tensor, "channels pos states"]) -> Float[torch.Tensor, "pos entries"]:
    """A layer's states as one matrix, [T E N]: a row for each position, each entry less its mean over positions."""
    rows = rearrange(states, "e t n -> t (e n)")
    return rows - rows.mean(0)


def effective_rank(matrix: Float[torch.Tensor, "*more rows columns"]) -> Float[torch.Tensor, "*more"]:
    """exp(entropy of the singular values over their sum) (Roy and Vetterli 2007, "The effective rank"); 0 of zeros.

    Between 1 and the rank. For states [E T N]: ``effective_rank(over_positions(states))`` is that of the layer over
    the prompt, ``effective_rank(states.transpose(0, 1))`` [T] that of each single state [E N] (N at most), and
    ``effective_rank(states - states.mean(1, keepdim=True))`` [E] that of each channel over positions.
    """
    values = torch.linalg.svdvals(matrix)
    total = values.sum(-1, keepdim=True)
    share = values / torch.where(total > 0, total, 1)
    return torch.where(total[..., 0] > 0, torch.exp(-torch.special.xlogy(share, share).sum(-1)), 0)


def participation_ratio(matrix: Float[torch.Tensor, "*more rows columns"]) -> Float[torch.Tensor, "*more"]:
    """(sum of v)^2 / sum of v^2 over the squared singular values v; 0 of zeros. Matrices as of :func:`effective_rank`.

    Of a matrix less its mean over rows these are the eigenvalues of the covariance (Gao et al. 2017, "A theory of
    multineuronal dimensionality, dynamics and measurement"): how many directions share the variance.
    """
    values = torch.linalg.svdvals(matrix)
    top = values.amax(-1, keepdim=True)
    squares = (values / torch.where(top > 0, top, 1)).square()  # relative to the largest: fourth powers underflow
    return torch.where(top[..., 0] > 0, squares.sum(-1).square() / squares.square().sum(-1).clamp_min(1), 0)


def check_layers(model: HookedJamba, layers: Iterable[int] | None) -> tuple[int, ...]:
    """The Mamba and Mamba-2 layers among which to look, all of them for None; another layer raises InputError."""
    layers = model.config.ssm_layers if layers is None else tuple(layers)
    for layer in layers:
        if layer not in model.config.ssm_layers:
            listed = ", ".join(map(str, model.config.ssm_layers)) or "none"
            raise InputError(f"layer={layer!r} is not a Mamba layer of this model; its Mamba layers are {listed}")
    return layers
