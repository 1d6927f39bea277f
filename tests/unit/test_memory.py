"""Counts against the published figures and against real tensors."""

from __future__ import annotations

import pytest
import torch

from jambascope import JambaConfig, memory

PUBLISHED = dict(n_heads=32, n_key_value_heads=8, d_head=128, d_vocab=65536)


@pytest.fixture(scope="module")
def jamba_v01():
    return JambaConfig.jamba(n_layers=32, d_model=4096, d_mlp=14336, **PUBLISHED)


@pytest.fixture(scope="module")
def jamba_15_large():
    return JambaConfig.jamba(n_layers=72, d_model=8192, d_mlp=24576, **PUBLISHED | dict(n_heads=64))


def test_jamba_v01_has_the_published_size_and_cache(jamba_v01):
    """arXiv 2403.19887: 12B active, 52B total; table 1: 4 GB of KV cache at 256K in 16 bit."""
    cost = memory.model_cost(jamba_v01)
    assert round(cost.parameters / 1e9) == 52 and round(cost.active_parameters / 1e9) == 12
    assert memory.kv_cache_bytes_per_token(jamba_v01, torch.bfloat16) == 16 << 10
    assert memory.kv_cache_bytes_per_token(jamba_v01, torch.bfloat16) * (256 << 10) == 4 << 30


def test_jamba_15_large_has_the_published_size_and_cache(jamba_15_large):
    """arXiv 2408.12570: 94B active, 398B total; 9 GB of KV cache at 256K."""
    cost = memory.model_cost(jamba_15_large)
    assert cost.parameters // 10**9 == 398 and round(cost.active_parameters / 1e9) == 94
    assert memory.kv_cache_bytes_per_token(jamba_15_large, torch.bfloat16) * (256 << 10) == 9 << 30


def test_counts_equal_a_real_model_and_its_memory(small_model, small_config, tokens):
    cost = memory.model_cost(small_config)
    assert cost.parameters == sum(p.numel() for p in small_model.parameters())
    idle = sum(
        p[small_config.experts_per_token :].numel()
        for name, p in small_model.named_parameters()
        if name.endswith(("mlp.gate_up_proj", "mlp.down_proj")) and p.ndim == 3
    )
    assert cost.active_parameters == cost.parameters - idle
    with torch.no_grad():
        state = small_model.new_state(2)
        assert state.nbytes == 2 * memory.mamba_state_bytes(small_config, torch.float32)
        small_model(tokens, state=state)
        grown = 2 * 11 * memory.kv_cache_bytes_per_token(small_config, torch.float32)
        assert state.nbytes == grown + 2 * memory.mamba_state_bytes(small_config, torch.float32)


def test_tied_embeddings_count_once():
    fields = dict(n_layers=1, d_model=16, d_vocab=100, d_mlp=8, num_experts=1)
    tied, untied = (memory.model_cost(JambaConfig.jamba(**fields, tie_embeddings=t)) for t in (True, False))
    assert untied.parameters - tied.parameters == 1600


@pytest.mark.parametrize(
    ("n", "text"), [(0, "0 B"), (1023, "1023 B"), (16 << 10, "16 KiB"), (3 << 19, "1.5 MiB"), (4 << 30, "4 GiB")]
)
def test_readable_bytes(n, text):
    assert memory.readable_bytes(n) == text


@pytest.mark.parametrize(("n", "text"), [(7, "7"), (1000, "1.0K"), (3_380_000, "3.4M"), (51_570_000_000, "51.6B")])
def test_readable_count(n, text):
    assert memory.readable_count(n) == text
