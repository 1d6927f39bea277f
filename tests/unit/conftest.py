from __future__ import annotations

import copy
import functools
import sys
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from streamlit.testing.v1 import AppTest

from jambascope import HookedJamba, JambaConfig
from jambascope.dashboards import session
from jambascope.hooks.prefill import prefill
from jambascope.hooks.routing import Routing
from jambascope.model import initialize

SHAPE = dict(
    d_model=32, d_vocab=61, n_heads=4, n_key_value_heads=2, d_head=8, d_mlp=24, num_experts=5, d_state=6, n_ctx=128,
    bos_token_id=1, eos_token_ids=(2,), pad_token_id=0,
)  # fmt: skip


@pytest.fixture(scope="session")
def small_config() -> JambaConfig:
    """Every layer kind: Mamba and attention, dense and MoE."""
    return JambaConfig.jamba(n_layers=4, attn_layer_period=3, attn_layer_offset=1, **SHAPE)


@pytest.fixture(scope="session")
def small_model(small_config) -> HookedJamba:
    torch.manual_seed(0)
    model = HookedJamba(small_config)
    initialize(model, std=0.2)
    return model.eval()


@pytest.fixture(scope="session")
def built() -> HookedJamba:
    """Heads whose purpose is set by their weights.

    Embeddings are one-hot. The Mamba layer's convolution writes the previous token's one-hot beside the current one's.
    Key head 0 reads the previous token, key head 1 the current one; so query heads are

        0  reads the current token: induction      OV = identity
        1  reads nothing: even attention           OV = cyclic shift of the vocabulary
        2  reads the current token: duplicates     OV = minus identity
        3  reads the previous token: position i-1  OV = identity
    """
    V = 24
    config = JambaConfig(
        d_model=2 * V, d_vocab=V, mixers=("mamba", "attention"), feed_forwards=("none", "none"), n_heads=4,
        n_key_value_heads=2, d_head=V, d_inner=V, d_state=1, d_conv=2, proj_bias=True, n_ctx=64, bos_token_id=1,
        eos_token_ids=(2,), pad_token_id=0,
    )  # fmt: skip
    model = HookedJamba(config)
    one, none = torch.eye(V), torch.zeros(V, V)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for block in model.blocks:
            block.ln1.weight.fill_(1)
        model.ln_final.weight.fill_(1)
        model.embed.weight.copy_(torch.cat((one, none), 1))
        model.unembed.weight.copy_(torch.cat((one, none), 1))
        mixer = model.blocks[0].mixer
        mixer.in_proj.weight[:V].copy_(torch.cat((one, none), 1))  # x: the token; the gate is its bias alone
        mixer.in_proj.bias[V:] = 4.0
        mixer.conv1d.weight[:, 0, 0] = 1.0  # the earlier of the two inputs
        mixer.D.fill_(1)
        mixer.out_proj.weight.copy_(torch.cat((none, one)))
        attn = model.blocks[1].attn
        current, previous = torch.cat((one, none), 1), torch.cat((none, one), 1)
        attn.q_proj.weight.copy_(30 * torch.cat((current, torch.zeros(V, 2 * V), current, previous)))
        attn.k_proj.weight.copy_(30 * torch.cat((previous, current)))
        attn.v_proj.weight.copy_(torch.cat((current, current)))
        shift = one.roll(1, 0)
        attn.o_proj.weight[:V].copy_(torch.cat((one, shift, -one, one), 1))
    return model.eval()


@pytest.fixture(scope="session")
def random_routing() -> Callable[..., Routing]:
    """Unbalanced routes of prompts of about equal length, of tokens that know nothing of each other."""

    def make(tokens: int, experts: int, slots: int, seed: int = 0, prompts: int = 1, vocabulary: int = 7) -> Routing:
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(tokens, experts, generator=generator) + torch.linspace(-1, 1, experts)
        of_prompt = torch.arange(tokens) * prompts // tokens
        first = of_prompt.bincount().cumsum(0) - of_prompt.bincount()
        ids = torch.randint(vocabulary, (tokens,), generator=generator)
        probabilities = logits.softmax(-1)
        chosen = probabilities.topk(slots).indices
        return Routing(probabilities, chosen, ids, torch.arange(tokens) - first[of_prompt], of_prompt)

    return make


@pytest.fixture(scope="session")
def mamba2_config() -> JambaConfig:
    """A hybrid of Mamba-2 and attention; 8 heads of 8 channels in 2 groups."""
    fields = dict(mixer="mamba2", mamba_d_head=8, mamba_n_groups=2)
    return JambaConfig.jamba(n_layers=3, attn_layer_period=3, attn_layer_offset=1, **fields, **SHAPE)


@pytest.fixture(scope="session")
def mamba2_model(mamba2_config) -> HookedJamba:
    torch.manual_seed(0)
    model = HookedJamba(mamba2_config)
    initialize(model, std=0.2)
    return model.eval()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 61, (2, 11), generator=torch.Generator().manual_seed(1))


KINDS = {
    "hybrid": (("mamba", "attention", "mamba", "mamba"), ("dense", "moe", "none", "moe")),
    "mamba2": (("mamba2", "attention", "mamba2"), ("moe", "dense", "none")),
    "no-attention": (("mamba", "mamba"), ("none", "none")),
    "no-moe": (("mamba", "attention"), ("dense", "dense")),
    "attention": (("attention", "attention"), ("dense", "dense")),
    "one-slot": (("attention", "mamba"), ("moe", "moe")),
}


@functools.cache
def make_kind(kind: str) -> HookedJamba:
    mixers, feed_forwards = KINDS[kind]
    torch.manual_seed(0)
    model = HookedJamba(
        JambaConfig(
            mixers=mixers, feed_forwards=feed_forwards, d_model=16, d_vocab=29, n_heads=4, n_key_value_heads=2,
            d_head=4, d_mlp=12, num_experts=3, d_state=4, n_ctx=64, d_inner=32, dt_rank=2, mamba_d_head=8,
            experts_per_token=1 if kind == "one-slot" else 2,
        ),
        dtype="float64",
    )  # fmt: skip
    initialize(model, std=0.3)
    for name, parameter in model.named_parameters():
        if "ln" in name:
            parameter.data.uniform_(0.5, 2.0)
    return model.eval()


@pytest.fixture(scope="session")
def model_of_kind() -> Callable[[str], HookedJamba]:
    """Kind -> a small float64 model with norm weights that are not 1; one of the caller's own."""
    return lambda kind: copy.deepcopy(make_kind(kind))


@pytest.fixture(params=KINDS)
def any_model(request) -> HookedJamba:
    """Each of those models in turn."""
    return copy.deepcopy(make_kind(request.param))


@pytest.fixture(scope="session")
def captured() -> Callable:
    """``captured(capture, model, tokens)``: what a run with a capture keeps, in one pass or in pieces."""

    def kept(capture, model, tokens, piece=None, mask=None):
        hooks, finish = capture.hooks(model, *tokens.shape, piece=piece)
        if piece is None:
            with torch.no_grad(), model.hooks(hooks):
                model(tokens, attention_mask=mask)
        else:
            prefill(model, tokens, piece=piece, attention_mask=mask, fwd_hooks=hooks, logits="all")
        return finish()

    return kept


@pytest.fixture
def run_page(tmp_path, monkeypatch) -> Iterator[Callable[..., AppTest]]:
    """``run_page(config, page, prompt, **state)``: that page on a random model, once nothing is computed any more."""

    def run(config: JambaConfig, page: str, prompt: str = "5 17 3", **state) -> AppTest:
        torch.manual_seed(0)
        HookedJamba(config).save_pretrained(tmp_path)
        monkeypatch.setattr(sys, "argv", ["app.py", "--model", str(tmp_path), "--runs", str(tmp_path / "runs")])
        session.start.cache_clear()
        lines = [
            "from jambascope.dashboards import session",
            f"from jambascope.dashboards.pages import {page} as page",
            f"page.page(session.view({str(tmp_path)!r}, {prompt!r}))",
        ]
        app = AppTest.from_string("\n".join(lines), default_timeout=60)
        for name, value in state.items():
            app.session_state[name] = value
        app.run()
        deadline = time.monotonic() + 60
        while any(button.label == "Stop" for button in app.button) and time.monotonic() < deadline:
            time.sleep(0.1)
            app.run()
        assert all(button.label != "Stop" for button in app.button)
        return app

    yield run
    session.start.cache_clear()
