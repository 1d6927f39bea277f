"""The matrix products of a forward pass and nothing else: the bound for the forward.

Every product at its exact shape with the model's own weights, the experts' with the rows that are routed to them, as
torch computes them; what they multiply is random. Attention's two products are cut into blocks of queries that meet
the keys up to the block's end, as a causal kernel does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from jambascope.attention import Attention
from jambascope.model import HookedJamba
from jambascope.moe import MoE

PRODUCTS = "matrix products alone"
QUERY_BLOCK = 256

Product = tuple[int, torch.Tensor]
"""Rows that are multiplied, and the weight [out in]."""


@torch.no_grad()
def forward_products(model: HookedJamba, tokens: torch.Tensor) -> tuple[list[Product], list[torch.Tensor]]:
    """The products with weights of a pass over ``tokens`` [B T], and per attention layer queries to meet themselves."""
    rows, experts = tokens.numel(), {}

    def note(indices: torch.Tensor, hook) -> None:
        experts[hook.name] = indices.flatten().bincount(minlength=model.config.num_experts).tolist()

    listens = [(lambda name: name.endswith("router.hook_expert_indices"), note)]
    model.run_with_hooks(tokens, return_type=None, fwd_hooks=listens)
    products, queries = [], []
    for i, block in enumerate(model.blocks):
        if block.is_attention:
            products += [(rows, w.weight) for w in _linear(block.attn, "q_proj", "k_proj", "v_proj", "o_proj")]
            queries.append(_queries(block.attn, tokens))
        else:
            products += [(rows, w.weight) for w in _linear(block.mixer, "in_proj", "x_proj", "dt_proj", "out_proj")]
        if not block.has_feed_forward:
            continue
        if isinstance(block.mlp, MoE):
            products += moe_products(block.mlp, experts[f"blocks.{i}.mlp.router.hook_expert_indices"])
        else:
            products += [(rows, w.weight) for w in _linear(block.mlp, "gate_proj", "up_proj", "down_proj")]
    return [*products, (rows, model.unembed.weight)], queries


def moe_products(moe: MoE, counts: list[int]) -> list[Product]:
    """The router's product and two for each expert that was chosen, with as many rows as were sent to it."""
    pairs = zip(counts, moe.gate_up_proj, moe.down_proj, strict=True)
    chosen = [(n, weight) for n, gate_up, down in pairs if n for weight in (gate_up, down)]
    return [(sum(counts) // moe.router.experts_per_token, moe.router.weight), *chosen]


def call_products(products: list[Product], queries: list[torch.Tensor] | None = None) -> Callable[[], None]:
    """One call that computes them all and drops the results. Inputs of one shape are shared."""
    weights = [(n, weight.detach()) for n, weight in products]
    inputs: dict[tuple[int, int], torch.Tensor] = {}

    @torch.no_grad()
    def call() -> None:
        for n, weight in weights:
            shape = n, weight.shape[1]
            if shape not in inputs:  # in the warm-up
                inputs[shape] = torch.randn(shape, dtype=weight.dtype, device=weight.device)
            F.linear(inputs[shape], weight)
        for q in queries or []:
            for start in range(0, q.shape[-2], QUERY_BLOCK):
                keys = q[..., : start + QUERY_BLOCK, :]
                (q[..., start : start + QUERY_BLOCK, :] @ keys.transpose(-2, -1)) @ keys

    return call


def _linear(layer: torch.nn.Module, *names: str) -> list[torch.nn.Linear]:
    return [getattr(layer, name) for name in names]


def _queries(attention: Attention, tokens: torch.Tensor) -> torch.Tensor:
    """[B H T P], for queries, keys and values alike."""
    shape = tokens.shape[0], attention.n_heads, tokens.shape[1], attention.d_head
    return torch.randn(shape, dtype=attention.q_proj.weight.dtype, device=tokens.device)
