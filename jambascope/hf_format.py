"""The published checkpoint format: config.json <-> JambaConfig, and which tensor in a file is which parameter.

Four ``model_type`` values: ``jamba``, ``mamba`` and ``mamba2`` as transformers writes them, and ``jambascope`` for
models that none of them can describe (rotary embedding, or Mamba-2 beside attention): the fields of JambaConfig, with
tensors named as in ``jamba``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from jambascope.config import JambaConfig
from jambascope.errors import CheckpointError, ConfigError

MODEL_TYPES = ("jamba", "mamba", "mamba2", "jambascope")


# -- config.json ---------------------------------------------------------------------------------------------


def config_from_hf(hf: dict[str, Any]) -> JambaConfig:
    """The JambaConfig of a parsed config.json; raises ConfigError naming the field that is missing or unusable."""
    model_type = hf.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ConfigError(
            f"model_type={model_type!r} cannot be opened here; it must be one of {', '.join(MODEL_TYPES)}"
        )
    try:
        if model_type == "jambascope":
            return JambaConfig(**hf["jamba_config"])
        return {"jamba": _from_jamba, "mamba": _from_mamba, "mamba2": _from_mamba2}[model_type](hf)
    except KeyError as e:
        raise ConfigError(f"config.json of model_type={model_type!r} has no field {e.args[0]!r}; add it") from None
    except TypeError as e:
        raise ConfigError(f"config.json of model_type={model_type!r} has a field of the wrong kind: {e}") from None


def _common(hf: dict[str, Any]) -> dict[str, Any]:
    if hf.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"hidden_act={hf['hidden_act']!r} is not supported; the family uses 'silu'")
    eos = hf.get("eos_token_id")
    return dict(
        d_vocab=hf["vocab_size"],
        bos_token_id=hf.get("bos_token_id"),
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        pad_token_id=hf.get("pad_token_id"),
    )


def _from_jamba(hf: dict[str, Any]) -> JambaConfig:
    d_model, heads = hf["hidden_size"], hf["num_attention_heads"]
    if heads < 1:
        raise ConfigError(f"num_attention_heads={heads!r} must be at least 1")
    dt_rank = hf.get("mamba_dt_rank", "auto")
    return JambaConfig.jamba(
        **_common(hf),
        d_model=d_model,
        n_layers=hf["num_hidden_layers"],
        attn_layer_period=hf.get("attn_layer_period", 8),
        attn_layer_offset=hf.get("attn_layer_offset", 4),
        expert_layer_period=hf.get("expert_layer_period", 2),
        expert_layer_offset=hf.get("expert_layer_offset", 1),
        num_experts=hf.get("num_experts", 16),
        experts_per_token=hf.get("num_experts_per_tok", 2) if hf.get("num_experts", 16) > 1 else 1,
        n_heads=heads,
        n_key_value_heads=heads if hf.get("num_key_value_heads") is None else hf["num_key_value_heads"],
        d_head=hf.get("head_dim") or d_model // heads,
        d_mlp=hf["intermediate_size"],
        expand=hf.get("mamba_expand", 2),
        d_state=hf.get("mamba_d_state", 16),
        d_conv=hf.get("mamba_d_conv", 4),
        dt_rank=math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank,
        conv_bias=hf.get("mamba_conv_bias", True),
        proj_bias=hf.get("mamba_proj_bias", False),
        inner_norms=hf.get("mamba_inner_layernorms", True),
        eps=hf.get("rms_norm_eps", 1e-6),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        n_ctx=hf.get("max_position_embeddings", 262_144),
        load_balancing_coef=hf.get("router_aux_loss_coef", 0.001),
        activation_coef=hf.get("activation_loss_coef", 0.0),
    )


def _from_mamba(hf: dict[str, Any]) -> JambaConfig:
    d_model, layers = hf["hidden_size"], hf["num_hidden_layers"]
    dt_rank = hf.get("time_step_rank", "auto")
    return JambaConfig(
        **_common(hf),
        d_model=d_model,
        mixers=("mamba",) * layers,
        feed_forwards=("none",) * layers,
        d_inner=hf.get("intermediate_size") or hf.get("expand", 2) * d_model,
        d_state=hf.get("state_size", 16),
        d_conv=hf.get("conv_kernel", 4),
        dt_rank=math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank,
        conv_bias=hf.get("use_conv_bias", True),
        proj_bias=hf.get("use_bias", False),
        inner_norms=False,
        eps=hf.get("layer_norm_epsilon", 1e-5),
        tie_embeddings=hf.get("tie_word_embeddings", True),
        n_ctx=hf.get("max_position_embeddings", 262_144),
        activation_coef=hf.get("activation_loss_coef", 0.0),
    )


def _from_mamba2(hf: dict[str, Any]) -> JambaConfig:
    d_model, layers, heads, d_head = hf["hidden_size"], hf["num_hidden_layers"], hf["num_heads"], hf["head_dim"]
    d_inner = hf.get("expand", 2) * d_model
    if d_inner != heads * d_head:
        raise ConfigError(f"num_heads={heads!r} times head_dim={d_head!r} must be expand * hidden_size = {d_inner!r}")
    limit = hf.get("time_step_limit", [0.0, math.inf])
    if not isinstance(limit, list) or len(limit) != 2:
        raise ConfigError(f"time_step_limit={limit!r} must be a list of the least and the greatest step size")
    dt_min, dt_max = map(_number, limit)
    return JambaConfig(
        **_common(hf),
        d_model=d_model,
        mixers=("mamba2",) * layers,
        feed_forwards=("none",) * layers,
        d_inner=d_inner,
        d_state=hf.get("state_size", 128),
        d_conv=hf.get("conv_kernel", 4),
        mamba_d_head=d_head,
        mamba_n_groups=hf.get("n_groups", 8),
        dt_min=dt_min,
        dt_max=None if dt_max == math.inf else dt_max,
        conv_bias=hf.get("use_conv_bias", True),
        proj_bias=hf.get("use_bias", False),
        inner_norms=False,
        eps=hf.get("layer_norm_epsilon", 1e-5),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        n_ctx=hf.get("max_position_embeddings", 262_144),
        activation_coef=hf.get("activation_loss_coef", 0.0),
        chunk_size=hf.get("ssd_chunk_size"),  # ours: the published chunk_size suits other kernels
    )


def _number(value: Any) -> Any:
    """A number of a config.json; transformers writes infinity as ``{"__float__": "Infinity"}``."""
    return float(value["__float__"]) if isinstance(value, dict) else value


def config_to_hf(config: JambaConfig, dtype: torch.dtype) -> dict[str, Any]:
    """A config.json that transformers reads where it can describe the model, else one that only we read."""
    eos = list(config.eos_token_ids)
    common = dict(
        dtype=str(dtype).removeprefix("torch."),
        vocab_size=config.d_vocab,
        hidden_size=config.d_model,
        num_hidden_layers=config.n_layers,
        hidden_act="silu",
        tie_word_embeddings=config.tie_embeddings,
        bos_token_id=config.bos_token_id,
        eos_token_id=eos[0] if len(eos) == 1 else eos or None,
        pad_token_id=config.pad_token_id,
    )
    if _is_plain(config, "mamba2"):
        return dict(
            model_type="mamba2",
            architectures=["Mamba2ForCausalLM"],
            **common,
            expand=config.d_inner // config.d_model,
            num_heads=config.mamba_n_heads,
            head_dim=config.mamba_d_head,
            n_groups=config.mamba_n_groups,
            state_size=config.d_state,
            conv_kernel=config.d_conv,
            time_step_limit=[
                config.dt_min,
                {"__float__": "Infinity"} if config.dt_max is None else config.dt_max,
            ],
            use_conv_bias=config.conv_bias,
            use_bias=config.proj_bias,
            layer_norm_epsilon=config.eps,
            residual_in_fp32=False,
            max_position_embeddings=config.n_ctx,
            chunk_size=config.chunk_size or 256,
            ssd_chunk_size=config.chunk_size,
            activation_loss_coef=config.activation_coef,
        )
    if _is_plain(config, "mamba") and not config.inner_norms:
        return dict(
            model_type="mamba",
            architectures=["MambaForCausalLM"],
            **common,
            expand=config.d_inner // config.d_model,
            intermediate_size=config.d_inner,
            state_size=config.d_state,
            conv_kernel=config.d_conv,
            time_step_rank=config.dt_rank,
            use_conv_bias=config.conv_bias,
            use_bias=config.proj_bias,
            layer_norm_epsilon=config.eps,
            residual_in_fp32=False,
            max_position_embeddings=config.n_ctx,
            activation_loss_coef=config.activation_coef,
        )
    periods = _jamba_periods(config)
    if periods is None:
        return dict(model_type="jambascope", **common, jamba_config=config.to_dict())
    has_mamba = bool(config.mamba_layers)
    return dict(
        model_type="jamba",
        architectures=["JambaForCausalLM"],
        **common,
        **periods,
        num_experts=config.num_experts if config.moe_layers else 1,
        num_experts_per_tok=config.experts_per_token,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_key_value_heads,
        head_dim=config.d_head,
        intermediate_size=config.d_mlp,
        mamba_expand=config.d_inner // config.d_model if has_mamba else 2,
        mamba_d_state=config.d_state,
        mamba_d_conv=config.d_conv,
        mamba_dt_rank=config.dt_rank,
        mamba_conv_bias=config.conv_bias,
        mamba_proj_bias=config.proj_bias,
        rms_norm_eps=config.eps,
        max_position_embeddings=config.n_ctx,
        router_aux_loss_coef=config.load_balancing_coef,
        activation_loss_coef=config.activation_coef,  # ours; transformers keeps fields that it does not know
    )


def _is_plain(c: JambaConfig, mixer: str) -> bool:
    """Whether every layer is this mixer and nothing else, of a width that transformers can state."""
    return set(c.mixers) == {mixer} and set(c.feed_forwards) == {"none"} and c.d_inner % c.d_model == 0


def _jamba_periods(c: JambaConfig) -> dict[str, int] | None:
    """Periods and offsets that lay out the model's layers as transformers would, or None when it cannot."""
    whole_expand = not c.mamba_layers or (c.inner_norms and c.d_inner % c.d_model == 0)
    if (
        c.mamba2_layers
        or c.rotary
        or not whole_expand
        or "none" in c.feed_forwards
        or (c.moe_layers and c.num_experts == 1)
    ):
        return None
    attention = _period_of([m == "attention" for m in c.mixers], published=(8, 4))
    expert = _period_of([f == "moe" for f in c.feed_forwards], published=(2, 1))
    if attention is None or expert is None:
        return None
    return dict(
        attn_layer_period=attention[0],
        attn_layer_offset=attention[1],
        expert_layer_period=expert[0],
        expert_layer_offset=expert[1],
    )


def _period_of(flags: list[bool], published: tuple[int, int]) -> tuple[int, int] | None:
    """A period and offset that give these flags: the published ones if they do, else the shortest."""
    shorter = [(period, offset) for period in range(1, len(flags) + 2) for offset in range(period)]
    for period, offset in [published, *shorter]:
        if all((i % period == offset) == flag for i, flag in enumerate(flags)):
            return period, offset
    return None


# -- tensors -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """One tensor of a checkpoint file and the part of one parameter that it is."""

    file_name: str
    parameter: str
    part: Callable[[torch.Tensor], torch.Tensor]
    """The part of the parameter, as a view."""


_TOP = {
    "jamba": {"embed": "model.embed_tokens", "ln_final": "model.final_layernorm", "unembed": "lm_head"},
    "mamba": {"embed": "backbone.embeddings", "ln_final": "backbone.norm_f", "unembed": "lm_head"},
}
_IN_LAYER = {
    "jamba": {
        "ln1": "input_layernorm",
        "ln2": "pre_ff_layernorm",
        "attn": "self_attn",
        "mixer": "mamba",
        "mlp": "feed_forward",
    },
    "mamba": {"ln1": "norm", "mixer": "mixer"},
}
_LAYERS = {"jamba": "model.layers", "mamba": "backbone.layers"}


def pieces(
    parameters: dict[str, torch.Tensor], config: JambaConfig, model_type: str, available: Container[str] = ()
) -> Iterator[Piece]:
    """Every tensor a checkpoint must hold for these parameters (name -> tensor, meta tensors are fine).

    Experts are one tensor each, as published, unless ``available`` holds the fused ones.
    """
    family = "mamba" if model_type in ("mamba", "mamba2") else "jamba"
    for name in parameters:
        if name == "unembed.weight" and config.tie_embeddings:
            continue
        file_name = _file_name(name, family)
        prefix, _, last = file_name.rpartition(".")
        if last not in ("gate_up_proj", "down_proj"):
            yield Piece(file_name, name, lambda p: p)
        elif f"{prefix}.experts.{last}" in available:
            yield Piece(f"{prefix}.experts.{last}", name, lambda p: p)
        else:
            for e in range(config.num_experts):
                if last == "down_proj":
                    yield Piece(f"{prefix}.experts.{e}.down_proj.weight", name, lambda p, e=e: p[e])
                else:
                    F = config.d_mlp
                    yield Piece(f"{prefix}.experts.{e}.gate_proj.weight", name, lambda p, e=e, F=F: p[e, :F])
                    yield Piece(f"{prefix}.experts.{e}.up_proj.weight", name, lambda p, e=e, F=F: p[e, F:])


def _file_name(name: str, family: str) -> str:
    first, rest = name.split(".", 1)
    if first != "blocks":
        return f"{_TOP[family][first]}.{rest}"
    layer, module, rest = rest.split(".", 2)
    if module not in _IN_LAYER[family]:
        raise CheckpointError(f"a checkpoint of model_type={family!r} has no place for the parameter {name!r}")
    return f"{_LAYERS[family]}.{layer}.{_IN_LAYER[family][module]}.{rest}"
