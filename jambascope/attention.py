"""Grouped-query attention with or without rotary embedding.

Axes: B batch, T query position, S key position (past and present), H head, K key/value head, P d_head, D d_model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from torch import nn

from jambascope.config import JambaConfig
from jambascope.devices import index_tensor
from jambascope.hook_point import HookPoint
from jambascope.kernels.packed import by_length, tokens_of
from jambascope.packing import Packing
from jambascope.state import PickedKeyValueState, Run


class Attention(nn.Module):
    """``hook_pattern`` and ``hook_attn_scores`` unheard means torch's fused attention: no [T S] matrix exists."""

    def __init__(self, config: JambaConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_heads, self.n_key_value_heads, self.d_head = config.n_heads, config.n_key_value_heads, config.d_head
        self.rotary_base = config.rotary_base if config.rotary else None
        self.q_proj = nn.Linear(config.d_model, config.n_heads * config.d_head, bias=False)
        self.k_proj = nn.Linear(config.d_model, config.n_key_value_heads * config.d_head, bias=False)
        self.v_proj = nn.Linear(config.d_model, config.n_key_value_heads * config.d_head, bias=False)
        self.o_proj = nn.Linear(config.n_heads * config.d_head, config.d_model, bias=False)
        self.hook_q = HookPoint()  # [B T H P]
        self.hook_k = HookPoint()  # [B T K P]
        self.hook_v = HookPoint()  # [B T K P]
        self.hook_attn_scores = HookPoint()  # [B H T S], masked entries -inf
        self.hook_pattern = HookPoint()  # [B H T S]
        self.hook_z = HookPoint()  # [B T H P]
        self.hook_result = HookPoint()  # [B T H D]

    @property
    def W_Q(self) -> torch.Tensor:
        """[H D P]"""
        return rearrange(self.q_proj.weight, "(h p) d -> h d p", h=self.n_heads)

    @property
    def W_K(self) -> torch.Tensor:
        """[H D P]: each key head repeated for the query heads that share it."""
        return self._per_query_head(self.k_proj.weight)

    @property
    def W_V(self) -> torch.Tensor:
        """[H D P]: each value head repeated for the query heads that share it."""
        return self._per_query_head(self.v_proj.weight)

    @property
    def W_O(self) -> torch.Tensor:
        """[H P D]"""
        return rearrange(self.o_proj.weight, "d (h p) -> h p d", h=self.n_heads)

    def _per_query_head(self, weight: torch.Tensor) -> torch.Tensor:
        groups = self.n_heads // self.n_key_value_heads
        return repeat(weight, "(k p) d -> (k g) d p", k=self.n_key_value_heads, g=groups)

    def forward(self, x: torch.Tensor, run: Run, reads: torch.Tensor | None = None) -> torch.Tensor:
        """[B T D] -> [B T D], or [B read D]; keys and values of the past come from ``run.state``."""
        q = self.hook_q(rearrange(self.q_proj(x), "b t (h p) -> b t h p", h=self.n_heads))
        k = self.hook_k(rearrange(self.k_proj(x), "b t (k p) -> b t k p", k=self.n_key_value_heads))
        v = self.hook_v(rearrange(self.v_proj(x), "b t (k p) -> b t k p", k=self.n_key_value_heads))
        if self.rotary_base is not None:
            cos, sin = run.rotary(self.d_head, self.rotary_base, q.dtype)
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        if run.packing is None:
            z = self._attend(q, *run.extend_keys(self.layer, k, v), run)
        else:
            z = self._attend_packed(q, k, v, run.state.layers[self.layer], run.packing)
        z = self.hook_z(z)
        if self.hook_result.heard:
            return self.hook_result(einsum(z, self.W_O, "b t h p, h p d -> b t h d")).sum(2)
        return self.o_proj(rearrange(z if reads is None else z.index_select(1, reads), "b t h p -> b t (h p)"))

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, run: Run) -> torch.Tensor:
        """q [B T H P]; k, v [B S K P] -> [B T H P]."""
        shown = self._queries_shown(run.length)
        if len(shown) == run.length:
            return self._attend_openly(q, k, v, run, shown)
        z = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=run.attention_mask,
            is_causal=run.attention_is_causal,
            enable_gqa=self.n_heads != self.n_key_value_heads,
        ).transpose(1, 2)
        if not shown:
            return z
        rows = index_tensor(shown, q.device)
        return z.index_copy(1, rows, self._attend_openly(q.index_select(1, rows), k, v, run, shown))

    def _attend_packed(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, held: PickedKeyValueState, packing: Packing
    ) -> torch.Tensor:
        """q [1 token H P]; k, v [1 token K P] -> [1 token H P]: rows of about one length side by side."""
        length, z = packing.length, torch.empty_like(q)
        position = torch.arange(length, device=q.device)
        for rows in by_length(packing.bounds):
            first = int(packing.starts[rows].min())
            tokens, _ = tokens_of(packing.bounds, rows)
            row, where = np.repeat(np.arange(len(rows)), length - packing.starts[rows]), packing.position_of[tokens]
            queried = index_tensor(row * (length - first) + where - first, q.device)
            written, tokens = index_tensor(row * length + where, q.device), index_tensor(tokens, q.device)
            queries = q.new_zeros(len(rows), length - first, *q.shape[2:])
            queries.flatten(0, 1).index_copy_(0, queried, q[0].index_select(0, tokens))
            past = held.gathered(rows)
            for every, new in ((past.keys, k), (past.values, v)):
                every.flatten(0, 1).index_copy_(0, written, new[0].index_select(0, tokens).to(every.dtype))
            mixed = F.scaled_dot_product_attention(
                queries.transpose(1, 2),
                past.keys.transpose(1, 2),
                past.values.transpose(1, 2),
                attn_mask=position <= position[first:, None],
                enable_gqa=self.n_heads != self.n_key_value_heads,
            )
            z[0].index_copy_(0, tokens, mixed.transpose(1, 2).flatten(0, 1).index_select(0, queried).to(z.dtype))
        return z

    def _queries_shown(self, length: int) -> Sequence[int]:
        """Queries of this call whose scores or pattern somebody looks at."""
        points = [p for p in (self.hook_attn_scores, self.hook_pattern) if p.heard]
        wanted = {q for point in points for q in point.wanted(length)}
        return range(length) if len(wanted) == length else sorted(wanted)

    def _attend_openly(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, run: Run, queries: Sequence[int]
    ) -> torch.Tensor:
        """The same attention with its scores and pattern laid open; q at ``queries`` of this call."""
        groups = self.n_heads // self.n_key_value_heads
        k, v = (repeat(m, "b s k p -> b s (k g) p", g=groups) for m in (k, v))
        scores = einsum(q * self.d_head**-0.5, k, "b t h p, b s h p -> b h t s")
        scores = self.hook_attn_scores(scores.masked_fill_(~run.visible_from(queries), float("-inf")), queries)
        pattern = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
        return einsum(self.hook_pattern(pattern, queries), v, "b h t s, b s h p -> b t h p")


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (RoFormer, arXiv 2104.09864) in the half-split layout; x [B T H P], cos and sin [B T 1 P]."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin
