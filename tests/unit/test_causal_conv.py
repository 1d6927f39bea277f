"""The causal convolution: the reference against torch's, the CPU backend against the reference, gradients too."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from jambascope.errors import ConfigError
from jambascope.kernels.causal_conv import causal_conv1d


def make(batch, length, channels, width, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return dict(
        x=draw(batch, length, channels),
        weight=draw(channels, width),
        bias=draw(channels),
        past=draw(batch, width - 1, channels),
    )


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_the_reference_equals_torch(width, length):
    a = make(2, length, 6, width)
    inputs = torch.cat((a["past"], a["x"]), 1).transpose(1, 2)
    expected = F.conv1d(inputs, a["weight"][:, None], a["bias"], groups=6).transpose(1, 2)
    torch.testing.assert_close(causal_conv1d(**a), expected)
    torch.testing.assert_close(causal_conv1d(**a, silu=True), F.silu(expected))
    padded = F.pad(a["x"].transpose(1, 2), (width - 1, 0))
    alone = F.conv1d(padded, a["weight"][:, None], groups=6).transpose(1, 2)
    torch.testing.assert_close(causal_conv1d(a["x"], a["weight"], None), alone)


@pytest.mark.parametrize("silu", [True, False], ids=["silu", "linear"])
@pytest.mark.parametrize("width", [1, 2, 4, 7])
@pytest.mark.parametrize("length", [1, 2, 3, 40])
@pytest.mark.parametrize("channels", [1, 64, 100])
def test_cpu_equals_reference(silu, width, length, channels):
    results = {}
    for backend, dtype in (("reference", torch.float64), ("cpu", torch.float32)):
        leaves = {k: v.to(dtype).requires_grad_() for k, v in make(3, length, channels, width).items()}
        leaves = {k: v.detach().clone().requires_grad_() for k, v in leaves.items()}
        out = causal_conv1d(**leaves, silu=silu, backend=backend)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        (out.double() * weights).sum().backward()
        results[backend] = {"out": out} | {k: v.grad for k, v in leaves.items()}
    for name, truth in results["reference"].items():
        error = (results["cpu"][name].double() - truth).norm()
        assert error <= 1e-6 * (1 + truth.norm()), f"{name}: relative error {error / truth.norm():.1e}"


def test_slices_of_a_wider_projection_are_read_in_place():
    a = {k: v.float() for k, v in make(2, 9, 32, 4).items()}
    wide = torch.cat((a["x"], a["x"]), dim=-1)
    for part in (wide[..., :32], wide[..., 32:], wide[:, 2:, :32], wide.expand(2, 9, 64)[..., :32]):
        expected = causal_conv1d(**a | dict(x=part.clone()))
        assert torch.equal(causal_conv1d(**a | dict(x=part)), expected)


def test_no_bias():
    a = {k: v.float() for k, v in make(2, 9, 32, 4).items()}
    zero = causal_conv1d(**a | dict(bias=torch.zeros(32)))
    assert torch.equal(causal_conv1d(**a | dict(bias=None)), zero)


def test_backends_that_do_not_fit():
    a = make(1, 3, 4, 2)
    with pytest.raises(ConfigError, match="backend='cpu' takes float32 on the CPU, not torch.float64"):
        causal_conv1d(**a, backend="cpu")
    with pytest.raises(ConfigError, match="backend='warp'"):
        causal_conv1d(**a, backend="warp")
