"""Elementwise functions against torch in float64, at sizes and strides that a mixer meets."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from jambascope.kernels import activations

SHAPES = [(1, 1, 1), (2, 3, 5), (1, 7, 16), (2, 5, 40), (3, 300, 128)]


def slices(shape):
    """Two neighbouring slices of one projection."""
    batch, length, width = shape
    both = 4 * torch.randn(batch, length, 2 * width, generator=torch.Generator().manual_seed(0))
    return both[..., :width], both[..., width:]


def check(result, expected):
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_without_gradients(shape):
    x, gate = slices(shape)
    bias = torch.randn(shape[2], generator=torch.Generator().manual_seed(1))
    assert activations._fits(x, gate)
    check(activations.silu(x), F.silu(x.double()))
    check(activations.gated(x, gate), x.double() * F.silu(gate.double()))
    check(activations.step_size(x, bias), F.softplus(x.double() + bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_with_gradients(dtype):
    x, gate = (v.to(dtype).requires_grad_() for v in slices((2, 3, 5)))
    assert activations.gated(x, gate).dtype == dtype
    step = activations.step_size(x, torch.ones(5, dtype=dtype))
    assert step.dtype == torch.promote_types(dtype, torch.float32)
    (step.sum() + activations.gated(x, gate).sum() + activations.silu(x).sum()).backward()
    assert x.grad.abs().sum() > 0 and gate.grad.abs().sum() > 0
