"""JambaConfig: one frozen dataclass describes every model here, hybrids and their pure ablations alike."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from jambascope.errors import ConfigError

Mixer = Literal["attention", "mamba", "mamba2"]
FeedForward = Literal["none", "dense", "moe"]


@dataclass(frozen=True, kw_only=True)
class JambaConfig:
    """The shape of a model. Field names are TransformerLens's where it has one."""

    d_model: int
    """Width of the residual stream (D)."""
    d_vocab: int
    """Number of token ids (V)."""
    mixers: tuple[Mixer, ...]
    """The sequence mixer of each layer; its length is the number of layers."""
    feed_forwards: tuple[FeedForward, ...]
    """The feed-forward of each layer; ``none`` in pure Mamba."""

    n_heads: int = 1
    """Query heads of an attention layer (H)."""
    n_key_value_heads: int = 1
    """Key and value heads (K); query head h reads key head h // (H / K)."""
    d_head: int = 1
    """Width of a head (P); attention scores are scaled by d_head ** -0.5."""
    rotary: bool = False
    """Rotary position embedding in attention layers. Jamba has no positions of any kind."""
    rotary_base: float = 10_000.0
    """Base of the rotary frequencies, used when ``rotary``."""

    d_mlp: int = 0
    """Hidden width of a dense SwiGLU and of each expert (F)."""
    num_experts: int = 1
    """Experts of an MoE layer (X)."""
    experts_per_token: int = 1
    """Experts that each token is sent to (S); their softmax weights are not renormalised."""

    d_inner: int = 0
    """Channels of a Mamba or Mamba-2 mixer (E), ``expand * d_model`` in all releases."""
    d_state: int = 16
    """State size per channel (N)."""
    d_conv: int = 4
    """Width of the causal depthwise convolution."""
    dt_rank: int = 1
    """Rank of the step-size projection (R)."""
    conv_bias: bool = True
    """Bias of the convolution."""
    proj_bias: bool = False
    """Bias of the mixer's input and output projections."""
    inner_norms: bool = True
    """RMSNorm on dt, B and C inside the Mamba mixer (Jamba; plain Mamba has none). Mamba-2 mixers have their own gated
    RMSNorm instead, whatever this says."""

    mamba_d_head: int = 64
    """Channels of a head of a Mamba-2 mixer (P); they share one decay. It has ``d_inner / mamba_d_head`` heads."""
    mamba_n_groups: int = 1
    """Groups of Mamba-2 heads (G) that share B and C, and whose channels are normalised together."""
    dt_min: float = 0.0
    """Mamba-2 step sizes below this are raised to it (after softplus)."""
    dt_max: float | None = None
    """Mamba-2 step sizes above this are lowered to it; None is no limit."""
    chunk_size: int | None = None
    """Positions per chunk of a Mamba-2 scan: speed and memory, not results. None takes the kernel's measured choice."""

    eps: float = 1e-6
    """Epsilon of every RMSNorm."""
    tie_embeddings: bool = False
    """The unembedding shares the embedding's weight."""
    n_ctx: int = 262_144
    """Longest context the checkpoint states; nothing in the model depends on it."""
    bos_token_id: int | None = None
    """Beginning-of-sequence token."""
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end generation."""
    pad_token_id: int | None = None
    """Padding token."""
    load_balancing_coef: float = 0.001
    """Weight of the load-balancing loss in ``HookedJamba.loss_terms(...).total``."""
    activation_coef: float = 0.0
    """Weight of the activation loss (Jamba-1.5: 1e-5) in ``HookedJamba.loss_terms(...).total``."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "mixers", tuple(self.mixers))
        object.__setattr__(self, "feed_forwards", tuple(self.feed_forwards))
        eos = self.eos_token_ids
        object.__setattr__(self, "eos_token_ids", (eos,) if isinstance(eos, int) else tuple(eos))
        _check(self)

    @property
    def n_layers(self) -> int:
        return len(self.mixers)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        return tuple(i for i, m in enumerate(self.mixers) if m == "attention")

    @property
    def mamba_layers(self) -> tuple[int, ...]:
        return tuple(i for i, m in enumerate(self.mixers) if m == "mamba")

    @property
    def mamba2_layers(self) -> tuple[int, ...]:
        return tuple(i for i, m in enumerate(self.mixers) if m == "mamba2")

    @property
    def ssm_layers(self) -> tuple[int, ...]:
        """Layers with a state-space mixer, Mamba or Mamba-2."""
        return tuple(i for i, m in enumerate(self.mixers) if m in ("mamba", "mamba2"))

    @property
    def mamba_n_heads(self) -> int:
        """Heads of a Mamba-2 mixer."""
        return self.d_inner // self.mamba_d_head

    def conv_width(self, mixer: Mixer) -> int:
        """Channels that a mixer's convolution runs over: x in Mamba; x, B and C in Mamba-2."""
        return self.d_inner + (2 * self.mamba_n_groups * self.d_state if mixer == "mamba2" else 0)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(i for i, f in enumerate(self.feed_forwards) if f == "moe")

    @classmethod
    def jamba(
        cls,
        *,
        n_layers: int,
        d_model: int,
        attn_layer_period: int = 8,
        attn_layer_offset: int = 4,
        expert_layer_period: int = 2,
        expert_layer_offset: int = 1,
        num_experts: int = 16,
        expand: int = 2,
        mixer: Literal["mamba", "mamba2"] = "mamba",
        **fields: Any,
    ) -> JambaConfig:
        """A hybrid laid out by periods and offsets (arXiv 2403.19887, section 3.1), other fields as given.

        ``mixer`` stands in the layers without attention: ``"mamba2"`` is the ablation of Jamba-1.5 (arXiv 2408.12570).

        Layer i is attention when ``i % attn_layer_period == attn_layer_offset`` and its feed-forward is MoE when
        ``i % expert_layer_period == expert_layer_offset`` and there is more than one expert.
        """
        for field, value, least in (
            ("n_layers", n_layers, 1),
            ("d_model", d_model, 1),
            ("attn_layer_period", attn_layer_period, 1),
            ("attn_layer_offset", attn_layer_offset, 0),
            ("expert_layer_period", expert_layer_period, 1),
            ("expert_layer_offset", expert_layer_offset, 0),
            ("num_experts", num_experts, 1),
            ("expand", expand, 1),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{field}={value!r}: must be a whole number of at least {least}")
        if mixer not in ("mamba", "mamba2"):
            raise ConfigError(f"mixer={mixer!r}: must be 'mamba' or 'mamba2'")
        fields.setdefault("dt_rank", math.ceil(d_model / 16))
        fields.setdefault("experts_per_token", min(2, num_experts))
        layers = range(n_layers)
        return cls(
            d_model=d_model,
            d_inner=expand * d_model,
            num_experts=num_experts,
            mixers=tuple("attention" if i % attn_layer_period == attn_layer_offset else mixer for i in layers),
            feed_forwards=tuple(
                "moe" if num_experts > 1 and i % expert_layer_period == expert_layer_offset else "dense" for i in layers
            ),
            **fields,
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values; ``JambaConfig(**d)`` reads them back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


def _check(c: JambaConfig) -> None:
    def need(ok: bool, field: str, remedy: str) -> None:
        if not ok:
            raise ConfigError(f"{field}={getattr(c, field)!r}: {remedy}")

    def positive(*fields: str) -> None:
        for field in fields:
            value = getattr(c, field)
            need(
                isinstance(value, int) and not isinstance(value, bool) and value >= 1,
                field,
                "must be a whole number of at least 1",
            )

    positive("d_model", "d_vocab", "mamba_d_head", "mamba_n_groups")
    need(len(c.mixers) >= 1, "mixers", "name at least one layer")
    need(set(c.mixers) <= set(get_args(Mixer)), "mixers", "each layer must be 'attention', 'mamba' or 'mamba2'")
    need(set(c.feed_forwards) <= {"none", "dense", "moe"}, "feed_forwards", "each must be 'none', 'dense' or 'moe'")
    need(
        len(c.feed_forwards) == len(c.mixers),
        "feed_forwards",
        f"give one per layer ({len(c.mixers)} as in mixers), not {len(c.feed_forwards)}",
    )
    for field in ("eps", "rotary_base"):
        value = getattr(c, field)
        need(_is_number(value) and value > 0, field, "must be a positive number")
    for field in ("bos_token_id", "pad_token_id"):
        need(getattr(c, field) is None or _is_token(getattr(c, field), c), field, f"must lie in 0..{c.d_vocab - 1}")
    need(all(_is_token(t, c) for t in c.eos_token_ids), "eos_token_ids", f"must lie in 0..{c.d_vocab - 1}")
    if c.attention_layers:
        positive("n_heads", "n_key_value_heads", "d_head")
        need(
            c.n_heads % c.n_key_value_heads == 0,
            "n_key_value_heads",
            f"must divide n_heads={c.n_heads}, so that query heads share key heads evenly",
        )
        need(not c.rotary or c.d_head % 2 == 0, "d_head", "must be even for rotary embedding")
    if c.mamba_layers:
        positive("d_inner", "d_state", "d_conv", "dt_rank")
    if c.mamba2_layers:
        positive("d_inner", "d_state", "d_conv")
        need(c.d_inner % c.mamba_d_head == 0, "mamba_d_head", f"must divide d_inner={c.d_inner} into whole heads")
        need(
            c.mamba_n_heads % c.mamba_n_groups == 0,
            "mamba_n_groups",
            f"must divide the {c.mamba_n_heads} heads (d_inner / mamba_d_head)",
        )
        need(_is_number(c.dt_min) and c.dt_min >= 0, "dt_min", "must be a number of at least 0")
        need(
            c.dt_max is None or (_is_number(c.dt_max) and c.dt_max > c.dt_min),
            "dt_max",
            f"must be a number above dt_min={c.dt_min}, or None for no limit",
        )
        if c.chunk_size is not None:
            positive("chunk_size")
    if set(c.feed_forwards) - {"none"}:
        positive("d_mlp")
    if c.moe_layers:
        positive("num_experts", "experts_per_token")
        need(
            c.experts_per_token <= c.num_experts,
            "experts_per_token",
            f"cannot exceed num_experts={c.num_experts}",
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_token(value: Any, c: JambaConfig) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < c.d_vocab
