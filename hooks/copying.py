"""Whether attention heads copy: raise the logit of the token that they attend to.

Axes: B sequence, T position, D d_model, H head, P d_head, V vocabulary, L attention layer. Two forms:

*OV form* (Elhage et al., "A Mathematical Framework for Transformer Circuits", 2021): sum Re(lambda) / sum |lambda| over
the eigenvalues of the V x V circuit W_U W_O W_V W_E, from the weights alone; 1 when every token raises itself. The
matrix has rank P at most, and its eigenvalues other than 0 are those of the P x P product W_O W_U W_E W_V.

*Logit form* (after the copying score of Olsson et al., "In-context Learning and Induction Heads", 2022): the share of
the head's positive direct logit contribution that goes to the tokens attended to, as 2 share - 1, on given prompts.

The value head is the one that the query head shares (GQA). RMSNorm's weights are folded into the matrices beside them,
``ln1`` of the layer into W_V and ``ln_final`` into W_U; its divisors depend on the context and are no part of the OV
form, and stay at their values in the run in the logit form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from einops import einsum
from jaxtyping import Bool, Complex, Float, Int

from jambascope.errors import InputError
from jambascope.hooks.heads import (
    Progress,
    attention_layers,
    detection_pattern,
    head_rows,
    prepare,
    repeated_random_tokens,
    shuffled,
    top_rows,
)
from jambascope.hooks.intervals import at_least, bootstrap_interval

if TYPE_CHECKING:
    from jambascope.model import HookedJamba, Input

_VOCABULARY_PIECE = 4096


@dataclass(frozen=True, eq=False)
class OVCopying:
    """Copying scores of weights, on the CPU in float64."""

    layers: tuple[int, ...]
    eigenvalues: Complex[torch.Tensor, "layers heads d_head"]
    """Of each head's circuit; the other V - P are 0."""
    random_scores: Float[torch.Tensor, " draws"]
    """Scores of heads with normally distributed weights between the same embedding and unembedding: chance."""

    @property
    def score(self) -> Float[torch.Tensor, "layers heads"]:
        """sum Re / sum abs, in [-1, 1]; NaN for a head that writes nothing."""
        return eigenvalue_score(self.eigenvalues)

    def rows(self) -> list[dict[str, Any]]:
        """One row per head: layer, head, score; random_low and random_high, the central 95 % of random heads."""
        tails = torch.tensor([0.025, 0.975], dtype=torch.float64)
        low, high = self.random_scores.quantile(tails).tolist()
        rows = head_rows(self.layers, {"score": self.score})
        return [{**row, "random_low": low, "random_high": high} for row in rows]

    def top(self, k: int = 10) -> list[dict[str, Any]]:
        """The rows of the ``k`` heads with the highest score, highest first."""
        return top_rows(self.rows(), "score", k)


@dataclass(frozen=True, eq=False)
class LogitCopying:
    """Copying scores of a run, on the CPU in float64."""

    layers: tuple[int, ...]
    samples: Float[torch.Tensor, "sequences layers heads"]
    """2 share - 1 of each sequence; NaN for a head that raises nothing, and where there is one token to raise."""
    control_samples: Float[torch.Tensor, "sequences layers heads"]
    """The same for the tokens of other random positions of the sequence, instead of those attended to."""
    uniform_samples: Float[torch.Tensor, " sequences"]
    """Chance: of n tokens, one that is raised like any other has a share of 1 / n."""

    @property
    def mean(self) -> Float[torch.Tensor, "layers heads"]:
        return self.samples.nanmean(0)

    def rows(self) -> list[dict[str, Any]]:
        """One row per head: layer, head, score, low, high (95 % over sequences), control, uniform, n."""
        low, high = bootstrap_interval(self.samples)
        columns = {"score": self.mean, "low": low, "high": high, "control": self.control_samples.nanmean(0)}
        columns["n"] = (~self.samples.isnan()).sum(0)
        return [{**row, "uniform": float(self.uniform_samples.nanmean())} for row in head_rows(self.layers, columns)]

    def top(self, k: int = 10) -> list[dict[str, Any]]:
        """The rows of the ``k`` heads with the highest score, highest first."""
        return top_rows(self.rows(), "score", k)


def eigenvalue_score(eigenvalues: Complex[torch.Tensor, "*heads n"]) -> Float[torch.Tensor, "*heads"]:
    """sum Re(lambda) / sum |lambda| over the last axis: 1 all positive, -1 all negative, about 0 for rotations."""
    return eigenvalues.real.sum(-1) / eigenvalues.abs().sum(-1)


@torch.no_grad()
def ov_copying(model: HookedJamba, *, fold_norms: bool = True, draws: int = 100, seed: int = 0) -> OVCopying:
    """The OV form of every head, in float64; a dense V x V circuit is never built.

    Args:
        fold_norms: multiply the weights of ``ln1`` into W_V and of ``ln_final`` into W_U.
        draws: heads with random weights, for chance.

    Raises:
        InputError: a model without attention.
    """
    layers = attention_layers(model)
    at_least("draws", draws)
    through = _through_vocabulary(model, fold_norms)
    found = []
    for layer in layers:
        attn, W_ln1 = model.blocks[layer].attn, _double(model.blocks[layer].ln1.weight)
        W_V = _double(attn.W_V) * (W_ln1[:, None] if fold_norms else 1)
        found.append(_eigenvalues(_double(attn.W_O), through, W_V))
    return OVCopying(layers, torch.stack(found), _random_scores(through, model.config.d_head, draws, seed))


def _random_scores(
    through: Float[torch.Tensor, "d_model d_model"], d_head: int, draws: int, seed: int
) -> Float[torch.Tensor, " draws"]:
    random = torch.Generator().manual_seed(seed)
    scores = []
    for _ in range(draws):
        W_O, W_V = (
            torch.randn(shape, generator=random, dtype=torch.float64).to(through.device)
            for shape in ((d_head, len(through)), (len(through), d_head))
        )
        scores.append(eigenvalue_score(_eigenvalues(W_O, through, W_V)))
    return torch.stack(scores)


def _through_vocabulary(model: HookedJamba, fold_norms: bool) -> Float[torch.Tensor, "d_model d_model"]:
    """W_U W_E: what is written to the stream is read as logits, and these select embeddings, [D D] in float64."""
    W_ln = _double(model.ln_final.weight) if fold_norms else 1
    D = model.config.d_model
    total = torch.zeros(D, D, dtype=torch.float64, device=_float64_device(model))
    for rows, columns in zip(*(m.split(_VOCABULARY_PIECE) for m in (model.W_E, model.W_U.T)), strict=True):
        total += (_double(columns) * W_ln).T @ _double(rows)
    return total


def _eigenvalues(
    W_O: Float[torch.Tensor, "*heads d_head d_model"],
    through: Float[torch.Tensor, "d_model d_model"],
    W_V: Float[torch.Tensor, "*heads d_model d_head"],
) -> Complex[torch.Tensor, "*heads d_head"]:
    return torch.linalg.eigvals((W_O @ through @ W_V).cpu())


def _float64_device(model: HookedJamba) -> torch.device:
    """Where float64 can be computed: Apple's GPUs have none."""
    return torch.device("cpu") if model.device.type == "mps" else model.device


def _double(weight: torch.Tensor) -> torch.Tensor:
    return (weight.cpu() if weight.device.type == "mps" else weight).double()


@torch.no_grad()
def logit_copying(
    model: HookedJamba,
    prompts: Input | None = None,
    *,
    among: Literal["vocabulary", "prompt"] = "vocabulary",
    attention_mask: Int[torch.Tensor, "batch pos"] | None = None,
    prepend_bos: bool | None = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: Progress | None = None,
) -> LogitCopying:
    """The logit form of every head on prompts.

    What head h adds at position i because of position j is A_ij v_j W_O; over j these sum to ``attn.hook_result``.
    Through the final norm, its divisor s_i as in the run, and the unembedding it gives logits c_ij, of which the mean
    is subtracted, since a softmax ignores it. With t_j the token at j, over all pairs i, j of a sequence,

        share = sum_ij relu(c_ij[t_j]) / sum_ij sum_v relu(c_ij[v])

    Args:
        prompts, attention_mask, prepend_bos: as :func:`jambascope.hooks.heads.score_heads` takes them.
        among: the v (also of the mean): the whole vocabulary, or the different tokens of the prompt. The latter is the
            candidates of Olsson et al., who then count the token with the most attention alone.
        batch_size: sequences run at a time; a layer's pattern [B H T S] and one head's [B T 4096] logits are held.
        seed: which other positions the control takes.
        progress: told the share that is done after each batch.

    Raises:
        InputError: a model without attention; tokens that the model cannot take.
    """
    layers = attention_layers(model)
    prompts = repeated_random_tokens(model) if prompts is None else prompts
    tokens, mask = prepare(model, prompts, attention_mask, prepend_bos)
    if among not in ("vocabulary", "prompt"):
        raise InputError(f"among={among!r} must be 'vocabulary' or 'prompt'")
    at_least("batch_size", batch_size)
    others = shuffled(tokens, mask, None, seed)
    found, candidates = [], []
    for start in range(0, len(tokens), batch_size):
        part = tokens[start : start + batch_size]
        real = torch.ones_like(part, dtype=torch.bool) if mask is None else mask[start : start + batch_size]
        first = real & ~detection_pattern("duplicate_token", part, real).any(-1)
        control = others[start : start + batch_size]
        found.append(_logit_shares(model, part, real, control, first if among == "prompt" else None))
        candidates += first.sum(1).tolist() if among == "prompt" else [model.config.d_vocab] * len(part)
        if progress is not None and progress(min(1.0, (start + batch_size) / len(tokens))) is False:
            break
    samples, control = (2 * torch.cat(share) - 1 for share in zip(*found, strict=True))
    uniform = 2 / torch.tensor(candidates, dtype=torch.float64) - 1
    alone = uniform == 1  # less its own mean a single logit is 0, give or take rounding
    samples[alone] = control[alone] = uniform[alone] = torch.nan
    return LogitCopying(layers, samples, control, uniform)


def _logit_shares(
    model: HookedJamba,
    tokens: Int[torch.Tensor, "batch pos"],
    mask: Bool[torch.Tensor, "batch pos"],
    others: Int[torch.Tensor, "batch pos"],
    candidates: Bool[torch.Tensor, "batch pos"] | None,
) -> tuple[Float[torch.Tensor, "batch layers heads"], Float[torch.Tensor, "batch layers heads"]]:
    """Shares of the tokens attended to, and of ``others``, among the tokens at ``candidates`` (None: all).

    c_ij is A_ij / s_i times a vector of j alone, so that a head is summed up by the attention that each position
    receives: sum_i A_ij / s_i. The divisors come from a first pass, so that no pattern outlives its layer.
    """
    scales: list[torch.Tensor] = []
    with model.hooks([("ln_final.hook_scale", lambda scale, hook: scales.append(scale[..., 0]))]):
        model(tokens, attention_mask=mask, return_type=None)
    per_scale = mask / scales[0]
    values: list[torch.Tensor] = []
    shares: list[tuple[torch.Tensor, torch.Tensor]] = []

    def reduce(pattern: torch.Tensor, hook: Any) -> None:
        received = einsum(pattern.to(per_scale.dtype), per_scale, "b h t s, b t -> b h s")
        v = values.pop().to(received.dtype)
        by_head = [
            _head_shares(model, _written(model, v, hook.layer(), head), received[:, head], tokens, others, candidates)
            for head in range(model.config.n_heads)
        ]
        shares.append(tuple(torch.stack(share, 1) for share in zip(*by_head, strict=True)))

    attn = [f"blocks.{layer}.attn" for layer in model.config.attention_layers]
    hooks = [(f"{name}.hook_v", lambda v, hook: values.append(v)) for name in attn]
    with model.hooks(hooks + [(f"{name}.hook_pattern", reduce) for name in attn]):
        model(tokens, attention_mask=mask, return_type=None)
    attended, other = (torch.stack(share, 1).cpu().double() for share in zip(*shares, strict=True))
    return attended, other


def _written(
    model: HookedJamba, v: Float[torch.Tensor, "batch pos kv_heads d_head"], layer: int, head: int
) -> Float[torch.Tensor, "batch pos d_model"]:
    """What a head writes for each position that it would attend to, times the weight of the final norm."""
    W_O = model.blocks[layer].attn.W_O
    shared_by = len(W_O) // v.shape[2]
    return v[:, :, head // shared_by] @ W_O[head].to(v.dtype) * model.ln_final.weight.to(v.dtype)


def _head_shares(
    model: HookedJamba,
    written: Float[torch.Tensor, "batch pos d_model"],
    received: Float[torch.Tensor, "batch pos"],
    tokens: Int[torch.Tensor, "batch pos"],
    others: Int[torch.Tensor, "batch pos"],
    candidates: Bool[torch.Tensor, "batch pos"] | None,
) -> tuple[Float[torch.Tensor, " batch"], Float[torch.Tensor, " batch"]]:
    """The share of positive logits that goes to each position's own token, and to that of another position."""
    W_U, dtype = model.W_U.T, written.dtype
    if candidates is None:
        mean = (written @ W_U.mean(0, dtype=dtype))[..., None]
        raised = sum((written @ piece.to(dtype).T - mean).relu().sum(-1) for piece in W_U.split(_VOCABULARY_PIECE))
    else:
        logits, counted = written @ W_U[tokens].to(dtype).mT, candidates[:, None].to(dtype)
        mean = (logits * counted).sum(-1, keepdim=True) / counted.sum(-1, keepdim=True)
        raised = ((logits - mean).relu() * counted).sum(-1)
    total = (received * raised).sum(-1)
    own, other = (((written * W_U[t].to(dtype)).sum(-1) - mean[..., 0]).relu() for t in (tokens, others))
    return (received * own).sum(-1) / total, (received * other).sum(-1) / total
