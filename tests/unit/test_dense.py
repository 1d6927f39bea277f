"""The feed-forward that every token goes through: the native loop against torch's products in float64."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from jambascope.kernels.experts import dense


def truth(x, gate, up, down):
    x, gate, up, down = (v.double() for v in (x, gate, up, down))
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def drawn(tokens, d_model, d_mlp):
    generator = torch.Generator().manual_seed(sum(tokens))
    x = torch.randn(*tokens, d_model, generator=generator)
    shapes = (d_mlp, d_model), (d_mlp, d_model), (d_model, d_mlp)
    return x, *(torch.randn(*shape, generator=generator) / shape[1] ** 0.5 for shape in shapes)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [(256,), (1, 257), (3, 331), (2, 4, 400), (1, 8191)], ids=str)
@pytest.mark.parametrize("d_model, d_mlp", [(8, 8), (20, 9), (33, 24), (128, 256)])
def test_equals_the_products(tokens, d_model, d_mlp):
    x, *weights = drawn(tokens, d_model, d_mlp)
    assert dense.fits(x, *weights)
    found, expected = dense.feed_forward(x, *weights), truth(x, *weights)
    assert found.shape == x.shape
    assert (found - expected).norm() < 1e-6 * expected.norm()


@torch.no_grad()
def test_what_it_leaves_to_torch():
    x, gate, up, down = drawn((300,), 16, 24)
    assert dense.fits(x, gate, up, down)
    assert not dense.fits(x[:255], gate, up, down)
    assert not dense.fits(x.T.contiguous().T, gate, up, down)
    assert not dense.fits(x.double(), gate, up, down)
    assert not dense.fits(x, gate, up.bfloat16(), down)
    assert not dense.fits(x, *drawn((1,), 700, 400)[1:])
    with torch.autocast("cpu"):
        assert not dense.fits(x, gate, up, down)
    with torch.enable_grad():
        assert not dense.fits(x, gate, up, down)


@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bits_do_not_depend_on_threads(threads):
    x, *weights = drawn((700,), 32, 40)
    expected, before = dense.feed_forward(x, *weights), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(dense.feed_forward(x, *weights), expected)
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def test_the_layer_takes_it_while_nobody_listens_or_has_changed_it(small_model, monkeypatch):
    taken = []
    whole = dense.feed_forward
    monkeypatch.setattr(dense, "feed_forward", lambda *given: taken.append(1) or whole(*given))
    layer = small_model.config.feed_forwards.index("dense")
    mlp = small_model.blocks[layer].mlp
    x = torch.randn(2, 200, small_model.config.d_model)
    alone = mlp(x, None)
    assert len(taken) == 1
    seen = []
    handle = mlp.hook_post.register_forward_hook(lambda module, given, out: seen.append(out))
    heard = mlp(x, None)
    handle.remove()
    assert len(taken) == 1 and len(seen) == 1
    torch.testing.assert_close(heard, alone, rtol=1e-5, atol=1e-6)
    mlp.down_proj.bias = torch.nn.Parameter(torch.full((small_model.config.d_model,), 3.0))
    torch.testing.assert_close(mlp(x, None), alone + 3, rtol=1e-5, atol=1e-6)
    mlp.down_proj.bias = None
    assert len(taken) == 1
    twice = functools.partial(lambda given, weight: F.linear(given, weight * 2), weight=mlp.up_proj.weight)
    monkeypatch.setitem(mlp.up_proj.__dict__, "forward", twice)
    torch.testing.assert_close(mlp(x, None), 2 * alone, rtol=1e-5, atol=1e-6)
    assert len(taken) == 1
