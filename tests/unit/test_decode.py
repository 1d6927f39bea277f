"""One token in one call gives what the layer gives operation by operation; RMSNorm in one pass what torch gives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from jambascope.config import JambaConfig
from jambascope.kernels import decode, rms_norm
from jambascope.model import HookedJamba

CONFIGS = {
    "jamba": dict(),
    "state-1": dict(d_state=1, dt_rank=1),
    "odd": dict(d_model=23, d_state=3, dt_rank=5, d_mlp=37, d_inner=48),
    "wide-rank": dict(dt_rank=40, d_conv=2),
    "no-conv-memory": dict(d_conv=1),
    "biases": dict(proj_bias=True, conv_bias=True),
    "no-biases": dict(conv_bias=False),
    "plain-mamba": dict(inner_norms=False, feed_forwards=("none", "none")),
    "channels-not-16": dict(d_inner=40),
    "moe": dict(feed_forwards=("moe", "none")),
    "moe-odd": dict(feed_forwards=("dense", "moe"), d_model=19, d_mlp=21, num_experts=5, experts_per_token=3),
    "one-expert": dict(feed_forwards=("moe", "moe"), num_experts=1, experts_per_token=1),
}


def make(**changes) -> HookedJamba:
    sizes = dict(d_model=32, d_inner=64, d_state=16, dt_rank=8, d_mlp=64, d_vocab=50, d_conv=4, num_experts=4)
    kinds = dict(mixers=("mamba", "mamba"), feed_forwards=("dense", "dense"))
    config = JambaConfig(**sizes | kinds | dict(n_heads=1, n_key_value_heads=1, d_head=16) | changes)
    torch.manual_seed(0)
    model = HookedJamba(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def one_by_one(model, tokens, mask=None):
    state = model.new_state(len(tokens))
    first = model(tokens[:, :3], state=state, attention_mask=mask)
    return torch.cat([first, *(model(tokens[:, t : t + 1], state=state) for t in range(3, tokens.shape[1]))], dim=1)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_token_at_a_time_equals_one_pass(name, rows, monkeypatch):
    model = make(**CONFIGS[name])
    tokens = torch.randint(0, 50, (rows, 9), generator=torch.Generator().manual_seed(1))
    calls = []
    step = decode.mamba_block_step
    monkeypatch.setattr(decode, "mamba_block_step", lambda *a: calls.append(1) or step(*a))
    with torch.no_grad():
        torch.testing.assert_close(one_by_one(model, tokens), model(tokens), rtol=2e-4, atol=2e-5)
    assert len(calls) == (0 if name == "channels-not-16" else 2 * 6)


def test_a_step_continues_after_padding():
    model = make()
    tokens = torch.randint(0, 50, (2, 8), generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    result = one_by_one(model, tokens, mask)
    with torch.no_grad():
        torch.testing.assert_close(result[:1, 1:], model(tokens[:1, 1:]), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("point", ["mixer.hook_dt", "mixer.hook_ssm_state", "mlp.hook_post"])
def test_a_listener_is_heard_at_every_token(point):
    model, heard = make(), []
    tokens = torch.randint(0, 50, (1, 6), generator=torch.Generator().manual_seed(3))
    with model.hooks([(f"blocks.1.{point}", lambda v, hook: heard.append(v.shape))]):
        one_by_one(model, tokens)
    assert len(heard) == 4


def test_hooks_of_torch_are_heard_too():
    model, heard = make(), []
    handle = model.blocks[0].mixer.x_proj.register_forward_hook(lambda *a: heard.append(1))
    tokens = torch.randint(0, 50, (1, 6), generator=torch.Generator().manual_seed(3))
    one_by_one(model, tokens)
    handle.remove()
    one_by_one(model, tokens)
    assert len(heard) == 4, "the prefill and three tokens; none after the hook was removed"


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def replaced_module(model):
    mixer = model.blocks[0].mixer
    doubled = Doubled(64, 32, bias=False)
    doubled.weight = mixer.out_proj.weight
    mixer.out_proj = doubled


def replaced_forward(model):
    forward = model.blocks[0].mixer.forward
    model.blocks[0].mixer.forward = lambda *a: 2 * forward(*a)


def parametrised(model):
    class Twice(torch.nn.Module):
        def forward(self, weight):
            return 2 * weight

    torch.nn.utils.parametrize.register_parametrization(model.blocks[0].mixer.in_proj, "weight", Twice())


def transposed_weight(model):
    out_proj = model.blocks[1].mlp.down_proj
    out_proj.weight.data = out_proj.weight.data.clone().T.contiguous().T


@pytest.mark.parametrize("change", [replaced_module, replaced_forward, parametrised, transposed_weight])
def test_a_changed_layer_is_called(change):
    model = make()
    tokens = torch.randint(0, 50, (1, 8), generator=torch.Generator().manual_seed(5))
    one_by_one(model, tokens)
    change(model)
    with torch.no_grad():
        torch.testing.assert_close(one_by_one(model, tokens), model(tokens), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_default_dtype_does_not_matter(dtype):
    model = make(mixers=("mamba", "attention"), feed_forwards=("moe", "dense"))
    tokens = torch.randint(0, 50, (2, 40), generator=torch.Generator().manual_seed(6))

    def run():
        model.zero_grad()
        model(tokens, return_type="loss").backward()
        return one_by_one(model, tokens), model.run_with_cache(tokens)[0], model.embed.weight.grad.clone()

    expected = run()
    try:
        torch.set_default_dtype(dtype)
        results = run()
    finally:
        torch.set_default_dtype(torch.float32)
    for result, truth in zip(results, expected, strict=True):
        torch.testing.assert_close(result, truth)


def test_replaced_weights_are_seen():
    model = make()
    tokens = torch.randint(0, 50, (1, 6), generator=torch.Generator().manual_seed(3))
    before = one_by_one(model, tokens)
    model.blocks[0].mixer.D.data = torch.full_like(model.blocks[0].mixer.D, 7.0)
    after = one_by_one(model, tokens)
    assert not torch.allclose(before, after)
    with torch.no_grad():
        torch.testing.assert_close(after, model(tokens), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (1, 7, 16), (2, 5, 40), (3, 700, 128)], ids=str)
def test_rms_norm_equals_torch(shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape[:2], shape[2] + 9, generator=generator)[..., 4 : 4 + shape[2]]
    weight = torch.randn(shape[2], generator=generator)
    with torch.no_grad():
        assert rms_norm.fits(x, weight)
        expected = F.rms_norm(x.double(), shape[2:], weight.double(), 1e-6)
        torch.testing.assert_close(rms_norm.rms_norm(x, weight, 1e-6).double(), expected, rtol=1e-6, atol=1e-6)
        expected = (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
        torch.testing.assert_close(rms_norm.root_mean_square(x, 1e-6).double(), expected, rtol=1e-6, atol=1e-6)
    assert not rms_norm.fits(x.double(), weight)
    assert not rms_norm.fits(x.requires_grad_(), weight), "gradients go through torch"
