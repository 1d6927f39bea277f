"""What a model and a context cost, before it is paid: counted from the configuration alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from jambascope.config import JambaConfig


@dataclass(frozen=True)
class LayerCost:
    """One layer's parameters; counts, not bytes."""

    mixer: str
    feed_forward: str
    parameters: int
    active_parameters: int
    """Those that one token's forward pass uses: of the experts, only the chosen ones."""


@dataclass(frozen=True)
class ModelCost:
    """A whole model's parameters; counts, not bytes."""

    layers: tuple[LayerCost, ...]
    embedding_parameters: int
    """Embedding, final norm and unembedding (a tied one counted once)."""

    @property
    def parameters(self) -> int:
        return self.embedding_parameters + sum(layer.parameters for layer in self.layers)

    @property
    def active_parameters(self) -> int:
        return self.embedding_parameters + sum(layer.active_parameters for layer in self.layers)


def model_cost(config: JambaConfig) -> ModelCost:
    """Parameters of every layer, total and active, by building the model without memory."""
    from jambascope.model import HookedJamba

    model = HookedJamba(config, device="meta")
    per_layer = [0] * config.n_layers
    expert_parameters = [0] * config.n_layers
    rest = 0
    for name, p in model.named_parameters():
        if not name.startswith("blocks."):
            rest += p.numel()
            continue
        layer = int(name.split(".")[1])
        per_layer[layer] += p.numel()
        if name.endswith(("mlp.gate_up_proj", "mlp.down_proj")):
            expert_parameters[layer] += p.numel()
    idle = 1 - config.experts_per_token / config.num_experts
    return ModelCost(
        tuple(
            LayerCost(mixer, feed_forward, n, n - round(experts * idle))
            for mixer, feed_forward, n, experts in zip(
                config.mixers, config.feed_forwards, per_layer, expert_parameters, strict=True
            )
        ),
        rest,
    )


def weight_bytes(config: JambaConfig, dtype: torch.dtype, quantize: str | None = None) -> int:
    """Bytes of all weights; with ``quantize="experts_int8"``, experts in int8 with a float32 scale per output row."""
    parameters = model_cost(config).parameters
    if quantize is None:
        return parameters * dtype.itemsize
    rows = len(config.moe_layers) * config.num_experts * (2 * config.d_mlp + config.d_model)
    experts = 3 * len(config.moe_layers) * config.num_experts * config.d_mlp * config.d_model
    return (parameters - experts) * dtype.itemsize + experts + 4 * rows


def kv_cache_bytes_per_token(config: JambaConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one more token of one sequence adds, over all attention layers."""
    return len(config.attention_layers) * 2 * config.n_key_value_heads * config.d_head * dtype.itemsize


def mamba_state_bytes(config: JambaConfig, dtype: torch.dtype) -> int:
    """Bytes of SSM states (float32) and last convolution inputs of one sequence, at any length."""
    ssm = config.d_inner * config.d_state * torch.promote_types(dtype, torch.float32).itemsize
    conv = sum(config.conv_width(config.mixers[i]) for i in config.ssm_layers) * (config.d_conv - 1) * dtype.itemsize
    return len(config.ssm_layers) * ssm + conv


def readable_bytes(n: float) -> str:
    """Binary units with at most one decimal: ``4 GiB``, ``16 KiB``, ``1.5 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if n < 1024 or unit == "TiB":
            return f"{n:.1f}".removesuffix(".0") + f" {unit}"
        n /= 1024
    raise AssertionError


def readable_count(n: int) -> str:
    """``51.6B``, ``3.4M``, ``12.3K`` or the number itself below a thousand."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if n >= size:
            return f"{n / size:.1f}{unit}"
    return str(n)
