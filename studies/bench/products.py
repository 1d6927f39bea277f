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
from jambascope.block import Block
from jambascope.model import HookedJamba
from jambascope.moe import MoE

PRODUCTS = "matrix products alone"
QUERY_BLOCK = 256

Product = tuple[int, torch.Tensor]
"""Rows that are multiplied, and the weight [out in]."""


@torch.no_grad()
def forward_products(model: HookedJamba, tokens: torch.Tensor) -> tuple[list[Product], list[torch.Tensor]]:
    """The products with weights of a pass over ``tokens`` [B T], and per attention layer queries to meet themselves."""
    rows, chosen = tokens.numel(), routes(model, tokens)
    products, queries = [], []
    for i, block in enumerate(model.blocks):
        products += mixer_products(block, rows, rows)
        if block.is_attention:
            queries.append(_queries(block.attn, tokens))
        if block.has_feed_forward:
            products += feed_forward_products(block, rows, chosen.get(i))
    return [*products, (rows, model.unembed.weight)], queries


@torch.no_grad()
def routes(model: HookedJamba, tokens: torch.Tensor) -> dict[int, list[int]]:
    """MoE layer -> how many rows of a pass over ``tokens`` [B T] each expert gets."""
    found: dict[int, list[int]] = {}

    def note(indices: torch.Tensor, hook) -> None:
        found[int(hook.name.split(".")[1])] = indices.flatten().bincount(minlength=model.config.num_experts).tolist()

    listens = [(lambda name: name.endswith("router.hook_expert_indices"), note)]
    model.run_with_hooks(tokens, return_type=None, fwd_hooks=listens)
    return found


def mixer_products(block: Block, rows: int, out_rows: int) -> list[Product]:
    """Those of an attention or Mamba-1 layer; ``out_rows`` leave it."""
    if block.is_attention:
        parts, out = _linear(block.attn, "q_proj", "k_proj", "v_proj"), block.attn.o_proj
    else:
        parts, out = _linear(block.mixer, "in_proj", "x_proj", "dt_proj"), block.mixer.out_proj
    return [*((rows, part.weight) for part in parts), (out_rows, out.weight)]


def feed_forward_products(block: Block, rows: int, counts: list[int] | None) -> list[Product]:
    """``counts``: rows of each expert, of a layer that has experts."""
    if isinstance(block.mlp, MoE):
        return moe_products(block.mlp, counts)
    return [(rows, part.weight) for part in _linear(block.mlp, "gate_proj", "up_proj", "down_proj")]


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
