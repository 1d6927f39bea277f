"""The causal convolution: the reference against torch's, every backend against the reference, gradients too."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from jambascope.errors import ConfigError, InputError
from jambascope.kernels.causal_conv import causal_conv1d, causal_conv1d_step, next_past

MARKS = {
    "padding-left": ("000111111", None),
    "padding-right": ("111111000", None),
    "padding-between": ("110100101", None),
    "only-padding": ("000000000", None),
    "one-token": ("000010000", None),
    "documents": (None, "100010010"),
    "past-goes-on": (None, "000010010"),
    "a-token-each": (None, "111111111"),
    "documents-and-padding": ("011011101", "010010100"),
    "reset-at-padding": ("011011101", "000100000"),
}


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


def marks(name, other="110111101"):
    """mask and resets [2 9]: a row as named and another one."""

    def rows(text, second):
        return None if text is None else torch.tensor([[c == "1" for c in row] for row in (text, second)])

    mask, resets = MARKS[name]
    return dict(mask=rows(mask, other), resets=rows(resets, "001000000"))


def run(arguments, dtype, backend, device="cpu", **options):
    """Output and gradients by name, of a random weighting of all outputs."""
    leaves = {k: v.to(device, dtype).detach().clone().requires_grad_() for k, v in arguments.items()}
    out = causal_conv1d(**leaves, backend=backend, **{k: _on(v, device) for k, v in options.items()})
    assert out.dtype == dtype
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out.double() * weights.to(device)).sum().backward()
    return {"out": out} | {f"gradient of {k}": v.grad for k, v in leaves.items()}


def _on(value, device):
    return value.to(device) if isinstance(value, torch.Tensor) else value


def assert_close(result, expected, tolerance):
    for name, truth in expected.items():
        error = (result[name].cpu().double() - truth).norm()
        assert error <= tolerance * (1 + truth.norm()), f"{name}: relative error {error / truth.norm():.1e}"


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


def documents(row, mask, resets):
    """The positions of each document's tokens in a row; the first goes on from the past and may have none."""
    found = [[]]
    for t in range(9):
        if resets is not None and resets[row, t]:
            found.append([])
        if mask is None or mask[row, t]:
            found[-1].append(t)
    return found


@pytest.mark.parametrize("name", MARKS)
@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_each_document_is_convolved_as_if_it_stood_alone(name, width):
    a, m = make(2, 9, 3, width), marks(name)
    expected, expected_past = torch.zeros_like(a["x"]), torch.empty_like(a["past"])
    for row in range(2):
        past = a["past"][row]
        for n, tokens in enumerate(documents(row, **m)):
            past = torch.zeros_like(past) if n else past
            if tokens:
                alone = a["x"][row, tokens][None], a["weight"], a["bias"], past[None]
                expected[row, tokens] = causal_conv1d(*alone, silu=True, backend="reference")[0]
            expected_past[row] = torch.cat((past, a["x"][row, tokens]))[len(tokens) :]
    torch.testing.assert_close(causal_conv1d(**a, **m, silu=True, backend="reference"), expected)
    assert torch.equal(next_past(a["x"], a["past"], **m), expected_past)


@pytest.mark.parametrize("silu", [True, False], ids=["silu", "linear"])
@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("length", [1, 3, 32, 70])
@pytest.mark.parametrize("channels", [1, 16, 100])
def test_cpu_equals_reference(silu, width, length, channels):
    a = make(3, length, channels, width)
    assert_close(run(a, torch.float32, "cpu", silu=silu), run(a, torch.float64, "reference", silu=silu), 1e-6)


@pytest.mark.parametrize("name", MARKS)
@pytest.mark.parametrize("width", [1, 4])
def test_cpu_equals_reference_with_padding_and_documents(name, width):
    a, options = make(2, 9, 20, width), marks(name) | dict(silu=True)
    assert_close(run(a, torch.float32, "cpu", **options), run(a, torch.float64, "reference", **options), 1e-6)


@pytest.mark.parametrize("size", [(2, 5, 3, 4), (1, 35, 70, 2), (1, 1, 64, 8), (1, 33, 2, 1)], ids=str)
@pytest.mark.parametrize("silu", [True, False], ids=["silu", "linear"])
def test_triton_equals_reference(size, silu, triton_device):
    a = make(*size)
    expected = run(a, torch.float64, "reference", silu=silu)
    assert_close(run(a, torch.float32, "triton", triton_device, silu=silu), expected, 1e-6)


@pytest.mark.parametrize("name", MARKS)
def test_triton_equals_reference_with_padding_and_documents(name, triton_device):
    a, options = make(2, 9, 5, 4), marks(name) | dict(silu=True)
    expected = run(a, torch.float64, "reference", **options)
    assert_close(run(a, torch.float32, "triton", triton_device, **options), expected, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_half_precision_accumulates_in_float32(dtype, backend, triton_device):
    a = {k: v.to(dtype).double() for k, v in make(2, 40, 20, 4).items()}
    expected = run(a, torch.float64, "reference", silu=True)
    device = triton_device if backend == "triton" else "cpu"
    result = run(a, dtype, backend, device, silu=True)
    # One rounding of each result; the weighting's gradient arrives rounded as well.
    assert_close(result, expected, torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_what_padding_holds_is_not_read(backend, triton_device):
    device = triton_device if backend == "triton" else torch.device("cpu")
    a, mask = {k: v.float().to(device) for k, v in make(2, 9, 20, 4).items()}, marks("padding-between")["mask"]
    mask = mask.to(device)
    expected = causal_conv1d(**a, mask=mask, backend=backend)
    a["x"] = torch.where(mask[..., None], a["x"], float("nan")).requires_grad_()
    out = causal_conv1d(**a, mask=mask, backend=backend)
    assert torch.equal(out, expected) and torch.equal(out == 0, ~mask[..., None].expand_as(out))
    out.sum().backward()
    assert torch.equal(a["x"].grad == 0, ~mask[..., None].expand_as(out))


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("channels", [5, 37])
def test_steps_equal_one_pass(backend, width, channels, triton_device):
    device = triton_device if backend == "triton" else torch.device("cpu")
    a = {k: v.float().to(device) for k, v in make(2, 6, channels, width).items()}
    expected = causal_conv1d(**a | dict(x=a["x"].double(), weight=a["weight"].double()), silu=True, backend="reference")
    past = a["past"]
    for t in range(6):
        before = past.clone()
        out, new = causal_conv1d_step(a["x"][:, t], a["weight"], a["bias"], past, silu=True, backend=backend)
        torch.testing.assert_close(out.double(), expected[:, t], rtol=1e-5, atol=1e-6)
        assert torch.equal(new, torch.cat((past, a["x"][:, t : t + 1]), 1)[:, 1:]) and torch.equal(past, before)
        past = new


def test_a_step_is_differentiable():
    a = {k: v.requires_grad_() for k, v in make(2, 1, 3, 4).items()}
    assert torch.autograd.gradcheck(
        lambda x, weight, bias, past: causal_conv1d_step(x[:, 0], weight, bias, past, silu=True), tuple(a.values())
    )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_cut_sequence_equals_one_pass(backend):
    a = {k: v.float() for k, v in make(2, 9, 20, 4).items()}
    m = marks("documents-and-padding")
    whole = causal_conv1d(**a, **m, backend=backend)
    past, parts = a["past"], []
    for part in torch.arange(9).tensor_split([1, 2, 6]):
        x, options = a["x"][:, part], {k: v[:, part] for k, v in m.items()}
        parts.append(causal_conv1d(x, a["weight"], a["bias"], past, **options, backend=backend))
        past = next_past(x, past, **options)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert torch.equal(past, next_past(a["x"], a["past"], **m))


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_slices_of_a_wider_projection_are_read_in_place(backend, triton_device):
    device = triton_device if backend == "triton" else torch.device("cpu")
    a = {k: v.float().to(device) for k, v in make(2, 9, 32, 4).items()}
    wide = torch.cat((a["x"], a["x"]), dim=-1)
    transposed = a["x"].transpose(1, 2).contiguous().transpose(1, 2)
    for part in (wide[..., :32], wide[..., 32:], wide[:, 2:, :32], wide.expand(2, 9, 64)[..., :32], transposed):
        expected = causal_conv1d(**a | dict(x=part.clone()), backend=backend)
        assert torch.equal(causal_conv1d(**a | dict(x=part), backend=backend), expected)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_bits_for_every_number_of_threads(threads):
    a, before = make(3, 300, 80, 4), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run(a, torch.float32, "cpu", silu=True)
        torch.set_num_threads(threads)
        result = run(a, torch.float32, "cpu", silu=True)
    finally:
        torch.set_num_threads(before)
    for name, value in expected.items():
        assert torch.equal(result[name], value), name


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_without_bias_or_past(backend, triton_device):
    device = triton_device if backend == "triton" else torch.device("cpu")
    a = {k: v.float().to(device) for k, v in make(2, 9, 32, 4).items()}
    zeros = a | dict(bias=torch.zeros_like(a["bias"]), past=torch.zeros_like(a["past"]))
    expected = causal_conv1d(**zeros, backend=backend)
    x = a["x"].requires_grad_()
    out = causal_conv1d(x, a["weight"], None, backend=backend)
    assert torch.equal(out, expected)
    out.sum().backward()
    assert x.grad.isfinite().all()


def test_nothing_waits_for_the_device(monkeypatch, fake_cuda):
    monkeypatch.setattr("jambascope.kernels.causal_conv.can_launch", lambda x: True)
    monkeypatch.delattr("jambascope.kernels.causal_conv.reference.causal_conv1d")
    with fake_cuda():
        x, weight, past = (torch.empty(*shape, device="cuda") for shape in ((2, 9, 64), (32, 4), (2, 3, 32)))
        marks = {name: torch.empty(2, 9, dtype=torch.bool, device="cuda") for name in ("mask", "resets")}
        x = x[..., :32]
        out = causal_conv1d(x, weight, None, past, silu=True, **marks)
        assert out.shape == (2, 9, 32) and out.is_contiguous() and out.device.type == "cuda"
        assert next_past(x, past, **marks).shape == past.shape
        out, past = causal_conv1d_step(x[:, 0], weight, None, past)
        assert out.shape == (2, 32) and past.shape == (2, 3, 32)


def test_bad_arguments_are_named():
    a = make(1, 3, 4, 2)
    with pytest.raises(ConfigError, match="backend='cpu' computes in float32 on the CPU, not torch.float64"):
        causal_conv1d(**a, backend="cpu")
    with pytest.raises(ConfigError, match="backend='triton' needs .* not torch.float64"):
        causal_conv1d(**a, backend="triton")
    with pytest.raises(ConfigError, match="backend='warp'"):
        causal_conv1d(**a, backend="warp")
    with pytest.raises(ConfigError, match="d_conv up to 8, not 9"):
        causal_conv1d(**{k: v.float() for k, v in make(1, 3, 4, 9).items()}, backend="cpu")
    with pytest.raises(InputError, match=r"past has shape \(1, 1, 4\).* must be \(1, 2, 4\)"):
        causal_conv1d(**a | dict(weight=torch.ones(4, 3)))
    with pytest.raises(InputError, match="no positions"):
        causal_conv1d(**a | dict(x=a["x"][:, :0]))
    with pytest.raises(InputError, match="mask is torch.float32; give bool, True for tokens"):
        causal_conv1d(**a, mask=torch.ones(1, 3))
    with pytest.raises(InputError, match=r"x and weight have shapes \(1, 3, 4\).* give \[B E\] and \[E K\]"):
        causal_conv1d_step(**a)
