"""Hidden attention: a Mamba or Mamba-2 layer written as the causal attention matrix that it implicitly multiplies by.

Axes: B batch, Q query, T position, E channel (d_inner), H head of Mamba-2, N state, W tap of the convolution. Unrolled,
the recurrence of a channel e multiplies by the matrix (Ali, Zimerman and Wolf, "The Hidden Attention of Mamba Models",
arXiv 2403.01590, section 3)

    alpha[e, i, j] = sum_n C_i[n] exp(A[e, n] (dt_{j+1}[e] + ... + dt_i[e])) dt_j[e] B_j[n],        j <= i

and the mixer is diag(SiLU(gate)) (alpha + D I) diag(sigmoid(u)) K, with u the output of the convolution, of which K is
the Toeplitz matrix: SiLU(u) = sigmoid(u) u. The matrices depend on the prompt. In four forms (``FORMS``) they give

    alpha      of ``hook_x``                              hook_y - D x
    alpha+D    of ``hook_x``                              hook_y
    conv       of the convolution's input                 hook_y
    gate       of the convolution's input                 hook_z, the input of ``out_proj``

each together with what does not come from the inputs of this call, kept apart: the state before the first position
(``state``), the last inputs of the convolution before it (``past``) and the convolution's bias (``bias``). Mamba-2 has
a gated norm between hook_y and hook_z: there ``gate`` holds the norm's factor at each query fixed, and gives hook_z.

A row costs O(T E N) exponentials and O(T E) memory. Exponents are differences of dt summed in float64, hence never
positive, and as exact at position 65,536 as at position 1; what has decayed below the least normal number (1e-38 in
float32) counts as about that. Hooks that edit the mixer are followed, but for those at ``hook_ssm_state``,
``hook_ssm_write`` and ``hook_ssm_read``, which are no part of the matrices, and in the forms conv and gate for those at
``hook_conv`` and ``hook_x``: these forms take the convolution and its SiLU as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Float, Int

from jambascope.errors import InputError
from jambascope.hooks.mixer_terms import MixerTerms, watch_terms

if TYPE_CHECKING:
    from jambascope.model import HookedJamba

Form = Literal["alpha", "alpha+D", "conv", "gate"]
FORMS: tuple[Form, ...] = ("alpha", "alpha+D", "conv", "gate")
CELLS = 262_144
"""Exponentials that are held at a time, so that a core's cache holds them."""


@dataclass(frozen=True)
class HiddenRows:
    """Rows of the matrices of one form, and what is added to their product with ``inputs(terms, form)``."""

    weights: Float[torch.Tensor, "batch channels queries pos"]
    """Zero after the query, and at and for padding."""
    state: Float[torch.Tensor, "batch channels queries"]
    """From the SSM state before the first position."""
    past: Float[torch.Tensor, "batch channels queries"]
    """From the convolution's inputs before the first position; 0 in the forms without convolution."""
    bias: Float[torch.Tensor, "batch channels queries"]
    """From the convolution's bias; 0 in the forms without convolution."""

    def apply(self, inputs: Float[torch.Tensor, "batch pos channels"]) -> Float[torch.Tensor, "batch queries channels"]:
        """The product with the inputs of these channels, and the added terms."""
        out = einsum(self.weights, inputs.to(self.weights), "b e q t, b t e -> b e q")
        return (out + self.state + self.past + self.bias).transpose(1, 2)


def inputs(terms: MixerTerms, form: Form) -> Float[torch.Tensor, "batch pos d_inner"]:
    """What the matrices of ``form`` are applied to: ``hook_x``, or the convolution's input."""
    return terms.x if form in ("alpha", "alpha+D") else terms.conv_input


@torch.no_grad()
def hidden_attention(
    terms: MixerTerms, queries: Iterable[int], form: Form = "alpha", channels: Sequence[int] | None = None
) -> HiddenRows:
    """Exact rows of the hidden attention for chosen queries and channels (None: all of them).

    Beyond the result, [B channels Q T], the memory of one row is needed. ``queries=range(T)`` with a few ``channels``
    gives their full matrices.

    Raises:
        InputError: an unknown form, or queries or channels that do not exist.
    """
    queries, channels = _check(terms, queries, form, channels)
    batch, length, n_channels = terms.x[..., channels].shape
    weights = terms.x.new_zeros(batch, n_channels, len(queries), length)
    added = terms.x.new_zeros(3, batch, n_channels, len(queries))
    for q, query in enumerate(queries):
        row, *parts = _row(terms, query, form, channels)
        weights[:, :, q, : query + 1] = row.transpose(1, 2)
        added[..., q] = torch.stack(parts)
    return HiddenRows(weights, *added)


def _check(terms: MixerTerms, queries, form, channels) -> tuple[list[int], torch.Tensor | slice]:
    if form not in FORMS:
        raise InputError(f"form={form!r} is not one of {', '.join(FORMS)}")
    queries, (_, length, d_inner) = [int(q) for q in queries], terms.x.shape
    wrong = [q for q in queries if not 0 <= q < length]
    if wrong or not queries:
        raise InputError(f"queries={queries[:8]} must be one or more positions in 0..{length - 1}")
    if channels is None:
        return queries, slice(None)
    channels = torch.as_tensor(channels, dtype=torch.long, device=terms.x.device)
    if channels.ndim != 1 or not len(channels) or not 0 <= int(channels.min()) <= int(channels.max()) < d_inner:
        raise InputError(f"channels={channels.tolist()} must be one or more of 0..{d_inner - 1}")
    return queries, channels


def _row(terms: MixerTerms, query: int, form: Form, channels: torch.Tensor | slice) -> tuple[torch.Tensor, ...]:
    """One row up to its query, [B query+1 E], and what is added to it: from state, past and bias, each [B E]."""
    row = _alpha(terms, query, channels)
    state = past = bias = torch.zeros_like(row[:, 0])
    if terms.initial_state is not None:
        state = _from_state(terms, query, channels)
    if form != "alpha":
        row[:, query] += terms.D[channels] * (1 if terms.mask is None else terms.mask[:, query, None])
    if form in ("conv", "gate"):
        row *= terms.slope[:, : query + 1, channels]
        bias = row.sum(1) * terms.conv_bias[channels]  # at padding the row is 0
        row = _through_conv(terms, row, channels)
        taken, row = row.tensor_split([terms.conv_weight.shape[1] - 1], dim=1)
        if terms.past is not None:
            past = (taken * terms.past[..., channels]).sum(1)
    if form == "gate":
        scale = terms.scale[:, query, channels]
        row *= scale[:, None]
        state, past, bias = state * scale, past * scale, bias * scale
    return row, state, past, bias


def _alpha(terms: MixerTerms, query: int, channels: torch.Tensor | slice) -> torch.Tensor:
    """alpha[:, query, 0..query] of each channel, [B query+1 E]; what a Mamba-2 head's channels share is made once."""
    n_heads = terms.dt.shape[-1]
    width = terms.x.shape[-1] // n_heads
    heads = channels
    if width > 1 and not isinstance(channels, slice):
        heads, of_head = (channels // width).unique(return_inverse=True)
    A, past = terms.A[:, heads], slice(0, query + 1)
    products = terms.C[:, query, None] * terms.B[:, past]  # [B T G N]
    per_head = len(A) == 1
    if per_head:
        products = products.sum(-1).repeat_interleave(n_heads // products.shape[2], dim=-1)[:, :, None, heads]
    dt, elapsed = terms.dt[:, past, heads], terms.elapsed[:, past, heads]
    row = torch.empty_like(dt)
    least = math.log(torch.finfo(row.dtype).tiny) + 1  # below it torch's exp is 10 to 40 times slower on a CPU
    step = max(1, CELLS // (row[:, 0].numel() * len(A)))
    for start in range(0, query + 1, step):
        part = slice(start, start + step)
        since = (elapsed[:, -1:] - elapsed[:, part]).to(row.dtype)
        decay = (since[:, :, None] * A).clamp_(min=least).exp_()  # [B T N H]
        mixed = decay * products[:, part] if per_head else products[:, part] @ decay
        torch.mul(mixed[:, :, 0], dt[:, part], out=row[:, part])
    if width == 1:
        return row
    return row.repeat_interleave(width, dim=-1) if isinstance(channels, slice) else row[..., of_head]


def _from_state(terms: MixerTerms, query: int, channels: torch.Tensor | slice) -> torch.Tensor:
    """What is read at ``query`` of the state before the first position, [B E]."""
    E = terms.x.shape[-1]
    elapsed, A, C = terms.elapsed[:, query], terms.A, terms.C[:, query]
    elapsed, A = elapsed.repeat_interleave(E // elapsed.shape[1], 1), A.T.repeat_interleave(E // A.shape[1], 0)
    C = C.repeat_interleave(E // C.shape[1], 1)[:, channels]  # [B E N]
    left = torch.exp(elapsed.to(A.dtype)[:, channels, None] * A[channels])
    return (C * left * terms.initial_state[:, channels]).sum(-1)


def _through_conv(terms: MixerTerms, row: torch.Tensor, channels: torch.Tensor | slice) -> torch.Tensor:
    """Weights on the convolution's outputs [B J E] -> on its inputs, past ones first, [B W-1+J E]."""
    weight = terms.conv_weight[channels]
    taps = weight.shape[1]
    inputs = row.shape[1] + taps - 1
    if terms.mask is None:
        padded = F.pad(row, (0, 0, taps - 1, taps - 1))
        met = (padded[:, taps - 1 - k : taps - 1 - k + inputs] for k in range(taps))
    else:
        outside = row.shape[1]  # outputs that are not in the row weigh nothing
        padded, targets = F.pad(row, (0, 0, 0, 1)), terms.targets[:, :inputs]
        targets = torch.where((targets < 0) | (targets > outside), outside, targets)
        batch = torch.arange(len(row), device=row.device)[:, None]
        met = (padded[batch, targets[..., k]] for k in range(taps))
    out = next(met) * weight[:, 0]
    for k, outputs in enumerate(met, 1):
        out.addcmul_(outputs, weight[:, k])
    return out


def normalize_rows(weights: Float[torch.Tensor, "*rows pos"]) -> Float[torch.Tensor, "*rows pos"]:
    """|weights| / their sum over the last axis: an attention-like picture; rows of zeros (padding) stay zero."""
    weights = weights.abs()
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total > 0, total, 1)


@torch.no_grad()
def attention_map(
    terms: MixerTerms,
    queries: Iterable[int],
    form: Form = "alpha",
    aggregate: Literal["absolute", "signed"] = "absolute",
    groups: Sequence[Int[torch.Tensor, " members"]] | None = None,
    normalize: bool = True,
) -> Float[torch.Tensor, "batch *groups queries pos"]:
    """Hidden attention averaged over channels, [B Q T], or over each group of channels, [B G Q T].

    One row [B T E] exists at a time, whatever the number of queries. For single channels use :func:`hidden_attention`.

    Args:
        aggregate: ``"absolute"`` is the mean of |weight| over channels, ``"signed"`` the mean of weights, in which
            channels of opposite sign cancel.
        groups: indices of the channels of each group, as :func:`jambascope.hooks.ssm.channel_groups` gives them.
        normalize: as :func:`normalize_rows`, after averaging.

    Raises:
        InputError: an unknown form or aggregate, queries that do not exist, or groups without or with wrong channels.
    """
    if aggregate not in ("absolute", "signed"):
        raise InputError(f"aggregate={aggregate!r} must be 'absolute' or 'signed'")
    queries, _ = _check(terms, queries, form, None)
    members = [slice(None)] if groups is None else [_check(terms, queries, form, group)[1] for group in groups]
    if not members:
        raise InputError("groups is empty; give the channels of one group or more, or None")
    batch, length, _ = terms.x.shape
    averaged = terms.x.new_zeros(batch, len(members), len(queries), length)
    for q, query in enumerate(queries):
        row = _row(terms, query, form, slice(None))[0]
        row = row.abs() if aggregate == "absolute" else row
        averaged[:, :, q, : query + 1] = torch.stack([row[..., m].mean(-1) for m in members], dim=1)
    averaged = normalize_rows(averaged) if normalize else averaged
    return averaged[:, 0] if groups is None else averaged


@torch.no_grad()
def rollout(
    model: HookedJamba,
    tokens: Int[torch.Tensor, "batch pos"],
    layers: Iterable[int] | None = None,
    attention_mask: Int[torch.Tensor, "batch pos"] | None = None,
    form: Form = "alpha",
    aggregate: Literal["absolute", "signed"] = "absolute",
    residual: float = 0.5,
) -> Float[torch.Tensor, "batch pos pos"]:
    """Attention rollout through a hybrid: how much of each position's stream comes from each input position, [B T T].

    The product over ``layers`` (later ones on the left) of ``residual I + (1 - residual) M`` (Abnar and Zuidema, arXiv
    2005.00928, section 3.1, with residual 0.5; for Mamba Ali et al., arXiv 2403.01590). M is the pattern averaged over
    heads of an attention layer and the normalised :func:`attention_map` of a Mamba layer: its rows sum to 1, so that
    those of the result do. The residual stream enters as ``residual``, feed-forwards as the identity; rows of padding
    mean nothing, and its columns are 0. Each layer's [T T] is made and multiplied in while the forward pass runs, with
    O(T^2 E N) exponentials.

    Raises:
        InputError: layers that do not exist, a residual outside 0..1, or an unknown form or aggregate.
    """
    config = model.config
    layers = tuple(range(config.n_layers)) if layers is None else tuple(sorted(set(layers)))
    wrong = [layer for layer in layers if layer not in range(config.n_layers)]
    if wrong or not layers:
        raise InputError(f"layers={layers} must be one or more of 0..{config.n_layers - 1}")
    if not 0 <= residual <= 1:
        raise InputError(f"residual={residual!r} must be in 0..1: the share that passes by a layer")
    if form not in FORMS or aggregate not in ("absolute", "signed"):
        raise InputError(f"form={form!r} must be one of {', '.join(FORMS)}, aggregate={aggregate!r} absolute or signed")
    total: torch.Tensor | None = None

    def multiply(M: torch.Tensor) -> None:
        nonlocal total
        eye = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
        M = torch.where(M.sum(-1, keepdim=True) > 0, M, eye)
        M = residual * eye + (1 - residual) * M
        total = M if total is None else M @ total.to(M.dtype)

    def mixed(layer: int, terms: MixerTerms) -> None:
        multiply(attention_map(terms, range(terms.x.shape[1]), form, aggregate))

    def attended(pattern: torch.Tensor, hook) -> None:
        multiply(normalize_rows(pattern.to(torch.promote_types(pattern.dtype, torch.float32)).mean(1)))

    patterns = [(f"blocks.{i}.attn.hook_pattern", attended) for i in layers if i in config.attention_layers]
    mixers = [layer for layer in layers if layer in config.ssm_layers]
    with watch_terms(model, mixers, attention_mask, None, mixed, patterns):
        model(tokens, attention_mask=attention_mask, return_type=None)
    return total
