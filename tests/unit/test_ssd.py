"""SSD in chunks against its definition in float64, and the definition against finite differences and Mamba-1's scan."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from jambascope.errors import ConfigError, InputError
from jambascope.kernels.selective_scan import selective_scan
from jambascope.kernels.ssd import StateEdits, chunked, ssd

SIZES = {  # batch, length, heads, channels of a head, groups, states
    "one-of-everything": (1, 1, 1, 1, 1, 1),
    "one-token": (2, 1, 4, 8, 2, 16),
    "two-tokens": (2, 2, 3, 5, 3, 4),
    "odd": (3, 65, 6, 5, 3, 7),
    "chunk-exact": (1, 64, 2, 16, 1, 16),
    "chunk-and-one": (2, 129, 4, 3, 2, 5),
    "d_state-1": (2, 70, 2, 4, 1, 1),
    "d_state-256": (1, 70, 2, 3, 2, 256),
    "d_head-1": (2, 100, 6, 1, 2, 3),
}


def make(batch, length, heads, d_head, groups, states, dtype=torch.float64, seed=0):
    """Random tensor arguments in float64, rounded to what ``dtype`` can hold."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).double()

    return dict(
        x=draw(batch, length, heads, d_head),
        dt=draw(batch, length, heads) - 1,
        A=-torch.exp(draw(heads)),
        B=draw(batch, length, groups, states),
        C=draw(batch, length, groups, states),
        D=draw(heads),
        dt_bias=draw(heads),
        initial_state=draw(batch, heads, d_head, states),
    )


def random_edits(arguments, positions):
    batch, _, heads, d_head = arguments["x"].shape
    shape = (2, batch, heads, d_head, len(positions), arguments["B"].shape[-1])
    values = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return StateEdits(positions, *values)


def some_positions(length):
    return sorted({0, length // 2, length - 1})


def marks(batch, length):
    """Padding left, right and inside; documents that begin at the first, the last and neighbouring positions."""
    generator = torch.Generator().manual_seed(4)
    mask, resets = (torch.rand(batch, length, generator=generator) < p for p in (0.7, 0.1))
    mask[0, : length // 3] = False
    mask[-1, -(length // 3) :] = False
    resets[0, [0, -1]] = True
    resets[-1, length // 2 : length // 2 + 2] = True
    return dict(mask=mask, resets=resets)


def run(arguments, dtype, backend, edits=None, **options):
    """Results and gradients by name, of a random weighting of all outputs."""
    leaves = {k: v.to(dtype).detach().clone().requires_grad_() for k, v in arguments.items()}
    edited = {}
    if edits is not None:
        kind = torch.promote_types(dtype, torch.float32)
        edited = {k: getattr(edits, k).to(kind).detach().clone().requires_grad_() for k in ("scale", "shift")}
        edits = edits._replace(**edited)
    result = ssd(**leaves, dt_softplus=True, edits=edits, backend=backend, **options)
    outputs = {k: v for k, v in result._asdict().items() if v is not None}
    generator = torch.Generator().manual_seed(9)
    weights = {k: torch.randn(v.shape, generator=generator, dtype=torch.float64) for k, v in outputs.items()}
    sum((v.double() * weights[k]).sum() for k, v in outputs.items()).backward()
    return outputs | {f"gradient of {k}": v.grad for k, v in (leaves | edited).items()}


def assert_close(result, expected, tolerance):
    assert set(result) == set(expected)
    for name, truth in expected.items():
        assert result[name].shape == truth.shape, name
        error = (result[name].double() - truth).norm() / truth.norm().clamp_min(1e-30)
        assert error < tolerance or truth.norm() == result[name].norm() == 0, f"{name}: relative error {error:.1e}"


CAPTURES = {
    "plain": lambda length: {},
    "few": lambda length: dict(capture=some_positions(length)),
    "none": lambda length: dict(capture=[]),
    "all": lambda length: dict(capture="all"),
}


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("size", SIZES)
def test_chunked_equals_reference(size, capture):
    arguments, options = make(*SIZES[size]), CAPTURES[capture](SIZES[size][1])
    expected = run(arguments, torch.float64, "reference", **options)
    assert_close(run(arguments, torch.float64, "chunked", **options), expected, 1e-12)
    assert_close(run(arguments, torch.float32, "chunked", **options), expected, 2e-6)


@pytest.mark.parametrize("dense", [False, True], ids=["few-edits", "edits-everywhere"])
@pytest.mark.parametrize("size", SIZES)
def test_chunked_equals_reference_with_edits(size, dense):
    arguments, length = make(*SIZES[size]), SIZES[size][1]
    edits = random_edits(arguments, list(range(length)) if dense else some_positions(length))
    capture = some_positions(length)
    expected = run(arguments, torch.float64, "reference", edits=edits, capture=capture)
    assert_close(run(arguments, torch.float64, "chunked", edits=edits, capture=capture), expected, 1e-12)
    assert_close(run(arguments, torch.float32, "chunked", edits=edits, capture=capture), expected, 4e-6)


@pytest.mark.parametrize("way", ["chunks", "segments", "trajectory", "trajectory-with-edits"])
@pytest.mark.parametrize("kind", [("mask",), ("resets",), ("mask", "resets")], ids="+".join)
def test_padding_and_packed_documents(way, kind):
    arguments = make(3, 97, 4, 3, 2, 5)
    options = {k: v for k, v in marks(3, 97).items() if k in kind}
    if way == "segments":
        options |= dict(capture=[7, 50], edits=random_edits(arguments, [7, 48]))
    elif way != "chunks":
        options |= dict(capture="all")
        if way.endswith("edits"):
            options |= dict(edits=random_edits(arguments, list(range(0, 97, 2))))
    expected = run(arguments, torch.float64, "reference", **options)
    assert_close(run(arguments, torch.float64, "chunked", **options, chunk_size=16), expected, 1e-12)
    if "mask" in kind:
        assert (expected["y"][~options["mask"]] == 0).all()


def test_packed_documents_equal_each_alone():
    a = make(1, 60, 4, 3, 2, 5)
    resets = torch.zeros(1, 60, dtype=torch.bool)
    starts = [0, 1, 20, 47]
    resets[0, starts] = True
    packed = ssd(**a, dt_softplus=True, resets=resets, chunk_size=16)
    per_position = ("x", "dt", "B", "C")
    for start, end in zip(starts, [*starts[1:], 60], strict=True):
        alone = {k: v[:, start:end] if k in per_position else v for k, v in a.items() if k != "initial_state"}
        result = ssd(**alone, dt_softplus=True)
        torch.testing.assert_close(packed.y[:, start:end], result.y)
    torch.testing.assert_close(packed.final_state, result.final_state)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_padding_equals_leaving_it_out(backend):
    a = make(1, 50, 4, 3, 2, 5)
    mask = marks(1, 50)["mask"]
    padded = ssd(**a, dt_softplus=True, mask=mask, backend=backend)
    tokens = {k: v[:, mask[0]] if k in ("x", "dt", "B", "C") else v for k, v in a.items()}
    result = ssd(**tokens, dt_softplus=True, backend=backend)
    torch.testing.assert_close(padded.y[:, mask[0]], result.y)
    torch.testing.assert_close(padded.final_state, result.final_state)


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 64, 1000])
def test_the_chunk_size_changes_nothing(chunk_size):
    a = make(2, 75, 4, 3, 2, 5)
    expected = ssd(**a, backend="reference")
    result = ssd(**a, chunk_size=chunk_size)
    torch.testing.assert_close(result.y, expected.y)
    torch.testing.assert_close(result.final_state, expected.final_state)


def test_many_spans_equal_one(monkeypatch):
    """A long pass holds the decays of a few chunks at a time."""
    arguments = make(2, 75, 4, 3, 2, 5)
    expected = run(arguments, torch.float64, "chunked", chunk_size=8, **marks(2, 75))
    monkeypatch.setattr(chunked, "SPAN_ELEMENTS", 2 * 2 * 4 * 8**2)
    assert_close(run(arguments, torch.float64, "chunked", chunk_size=8, **marks(2, 75)), expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_keeps_float32_states(dtype):
    arguments = make(2, 80, 4, 8, 2, 8, dtype=dtype)
    expected = run(arguments, torch.float64, "reference", capture="all")
    result = run(arguments, dtype, "chunked", capture="all")
    assert result["y"].dtype == dtype and result["final_state"].dtype == result["captured"].dtype == torch.float32
    assert_close(result, expected, 4 * torch.finfo(dtype).eps)


def test_reference_gradients_by_finite_differences():
    a = {k: v.requires_grad_() for k, v in make(1, 4, 4, 2, 2, 2).items()}
    edits = random_edits(a, [2])
    resets, mask = torch.tensor([[False, False, True, False]]), torch.tensor([[True, False, True, True]])

    def function(*values):
        inputs = dict(zip([*a, "scale", "shift"], values, strict=True))
        changed = StateEdits([2], inputs.pop("scale"), inputs.pop("shift"))
        options = dict(dt_softplus=True, edits=changed, capture=[1, 3], mask=mask, resets=resets)
        return ssd(**inputs, **options, backend="reference")

    assert torch.autograd.gradcheck(function, (*a.values(), *(v.requires_grad_() for v in edits[1:])))


def test_it_is_mamba_1_with_one_decay_per_head():
    """Where dt and A agree over the channels of a head, and over the states, both scans are the same recurrence."""
    a = make(2, 40, 3, 4, 1, 5)
    result = ssd(**a, dt_softplus=True, capture="all")
    wide = dict(
        x=a["x"].flatten(2),
        dt=a["dt"].repeat_interleave(4, -1),
        A=a["A"].repeat_interleave(4)[:, None].repeat(1, 5),
        B=a["B"][:, :, 0],
        C=a["C"][:, :, 0],
        D=a["D"].repeat_interleave(4),
        dt_bias=a["dt_bias"].repeat_interleave(4),
        initial_state=a["initial_state"].flatten(1, 2),
    )
    expected = selective_scan(**wide, dt_softplus=True, capture="all", backend="reference")
    torch.testing.assert_close(result.y.flatten(2), expected.y)
    torch.testing.assert_close(result.captured.flatten(1, 2), expected.captured)
    torch.testing.assert_close(result.final_state.flatten(1, 2), expected.final_state)


def test_steps_from_a_cut_equal_one_pass():
    """Chunks, then single steps as in decoding."""
    a = make(2, 41, 4, 3, 2, 5)
    whole = ssd(**a, dt_softplus=True)
    state, ys = a.pop("initial_state"), []
    for part in torch.arange(41).tensor_split([1, 2, 30, 39, 40]):
        cut = {k: v[:, part] if v.ndim > 1 else v for k, v in a.items()}
        result = ssd(**cut, dt_softplus=True, initial_state=state)
        state = result.final_state
        ys.append(result.y)
    torch.testing.assert_close(torch.cat(ys, 1), whole.y)
    torch.testing.assert_close(state, whole.final_state)


def test_strong_decay_and_long_steps_stay_finite_and_exact():
    """Sums of 64 decays reach 1e5 here, where a float32 holds no decay of single positions any more."""
    a = {k: v.float() for k, v in make(1, 300, 4, 4, 1, 4).items()}
    a["A"][0], a["A"][1] = -0.01, -400.0
    a["dt"], a["dt_bias"] = a["dt"] * 5, a["dt_bias"] * 0
    a = {k: v.requires_grad_() for k, v in a.items()}
    result = ssd(**a, dt_softplus=True)
    result.y.sum().backward()
    expected = ssd(**{k: v.detach().double() for k, v in a.items()}, dt_softplus=True, backend="reference").y
    errors = (result.y.double() - expected).transpose(0, 2).flatten(1).norm(dim=1)
    errors = errors / expected.transpose(0, 2).flatten(1).norm(dim=1)
    assert (errors < 2e-6).all(), errors
    assert all(v.grad.isfinite().all() for v in a.values())


def test_steps_without_softplus_are_taken_as_they_are():
    a = make(2, 20, 4, 3, 2, 5)
    expected = ssd(**a, dt_softplus=True)
    dt = F.softplus(a["dt"] + a.pop("dt_bias"))
    torch.testing.assert_close(ssd(**a | dict(dt=dt)).y, expected.y)


@pytest.mark.parametrize("options", ["plain", "marks", "few", "all", "edits"])
def test_nothing_waits_on_the_device(options, fake_cuda):
    with fake_cuda():

        def draw(*shape):
            return torch.empty(*shape, device="cuda")

        a = dict(x=draw(2, 200, 4, 8), dt=draw(2, 200, 4), A=draw(4), B=draw(2, 200, 2, 16), C=draw(2, 200, 2, 16))
        a |= dict(D=draw(4), dt_bias=draw(4), initial_state=draw(2, 4, 8, 16), dt_softplus=True)
        if options == "marks":
            a |= {k: torch.empty(2, 200, dtype=torch.bool, device="cuda") for k in ("mask", "resets")}
        elif options == "edits":
            positions = range(0, 200, 2)
            a |= dict(edits=StateEdits.add(positions, draw(2, 4, 8, 100, 16)), capture="all")
        elif options != "plain":
            a |= dict(capture=[3, 150] if options == "few" else "all")
        result = ssd(**a)
        assert result.y.shape == (2, 200, 4, 8) and result.y.device.type == "cuda"
        assert result.captured is None or result.captured.shape[3] == (2 if options == "few" else 200)


def test_bad_arguments_are_named():
    a = {k: v.float() for k, v in make(2, 6, 4, 3, 2, 5).items()}
    with pytest.raises(InputError, match=r"dt has shape .*must be \(2, 6, 4\)"):
        ssd(**a | dict(dt=a["dt"][:, :5]))
    with pytest.raises(InputError, match="3 groups, which must divide the 4 heads"):
        ssd(**a | dict(B=torch.zeros(2, 6, 3, 5), C=torch.zeros(2, 6, 3, 5)))
    with pytest.raises(InputError, match=r"give \[B T H P\]"):
        ssd(**a | dict(x=a["x"][0]))
    with pytest.raises(InputError, match="no positions"):
        ssd(**a | {k: a[k][:, :0] for k in ("x", "dt", "B", "C")})
    with pytest.raises(InputError, match="capture=.* must be ascending"):
        ssd(**a, capture=[3, 3])
    with pytest.raises(InputError, match="mask is torch.int64"):
        ssd(**a, mask=torch.ones(2, 6, dtype=torch.long))
    with pytest.raises(InputError, match="edits.scale has shape"):
        ssd(**a, edits=StateEdits([1], torch.ones(2, 4, 3, 2, 5), torch.ones(2, 4, 3, 1, 5)))
    with pytest.raises(ConfigError, match="backend='warp'"):
        ssd(**a, backend="warp")
    with pytest.raises(ConfigError, match="chunk_size=0"):
        ssd(**a, chunk_size=0)
    with pytest.raises(ConfigError, match="chunk_size=16.0 must be a whole number"):
        ssd(**a, chunk_size=16.0)
