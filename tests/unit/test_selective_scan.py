"""Every backend of the scan against the reference in float64: outputs, states, captures, edits, every gradient."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F

from jambascope.errors import ConfigError, InputError
from jambascope.kernels.selective_scan import StateEdits, selective_scan, step_size

SIZES = {  # batch, length, channels, states
    "one-of-everything": (1, 1, 1, 1),
    "one-token": (2, 1, 16, 16),
    "odd": (3, 65, 17, 3),
    "chunk-exact": (1, 64, 16, 16),
    "chunk-and-one": (2, 33, 48, 16),
    "d_state-1": (2, 70, 40, 1),
    "d_state-5": (2, 130, 33, 5),
    "d_state-64": (1, 40, 16, 64),
    "many-blocks": (1, 19, 320, 4),
}


def make(batch, length, channels, states, dtype=torch.float64, seed=0):
    """Random tensor arguments in float64, rounded to what ``dtype`` can hold."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).double()

    return dict(
        x=draw(batch, length, channels),
        dt=F.softplus(draw(batch, length, channels) - 1).to(dtype).double(),
        A=-torch.exp(draw(channels, states)),
        B=draw(batch, length, states),
        C=draw(batch, length, states),
        D=draw(channels),
        gate=draw(batch, length, channels),
        initial_state=draw(batch, channels, states),
    )


def some_positions(length):
    return sorted({0, length // 2, length - 1})


def marks(batch, length):
    """Padding at the left, in between and at the right, and documents that begin anywhere, also at padding."""
    generator = torch.Generator().manual_seed(5)
    mask = torch.rand(length, batch, generator=generator).T > 0.2  # transposed in memory
    mask[0, -(length // 4) :] = length < 4
    mask[-1, : length // 4] = False
    return dict(mask=mask, resets=torch.rand(batch, length, generator=generator) < 0.15)


def run(arguments, dtype, backend, edits=None, capture=None, absent=(), **options):
    """Results and gradients by name, of a random weighting of all outputs."""
    leaves = {k: v.to(dtype).detach().clone().requires_grad_() for k, v in arguments.items() if k not in absent}
    edit_leaves = {k: v.float().to(dtype).detach().clone().requires_grad_() for k, v in (edits or {}).items()}
    state_edits = StateEdits(some_positions(leaves["x"].shape[1]), **edit_leaves) if edits else None
    result = selective_scan(**leaves, **options, edits=state_edits, capture=capture, backend=backend)
    outputs = {k: v for k, v in result._asdict().items() if v is not None}
    generator = torch.Generator().manual_seed(9)
    weights = {k: torch.randn(v.shape, generator=generator, dtype=torch.float64) for k, v in outputs.items()}
    sum((v.double() * weights[k]).sum() for k, v in outputs.items()).backward()
    gradients = {f"gradient of {k}": v.grad for k, v in (leaves | edit_leaves).items()}
    return outputs | gradients


def assert_close(result, expected, tolerance):
    for name, truth in expected.items():
        error = (result[name].double() - truth).norm() / truth.norm().clamp_min(1e-30)
        assert error < tolerance or truth.norm() == result[name].norm() == 0, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("size", SIZES)
def test_cpu_equals_reference(size):
    arguments = make(*SIZES[size])
    capture = some_positions(SIZES[size][1])
    expected = run(arguments, torch.float64, "reference", capture=capture)
    assert_close(run(arguments, torch.float32, "cpu", capture=capture), expected, 2e-6)


@pytest.mark.parametrize("size", SIZES)
def test_cpu_equals_reference_with_edits(size):
    batch, length, channels, states = SIZES[size]
    arguments = make(*SIZES[size])
    generator = torch.Generator().manual_seed(3)
    shape = (batch, channels, len(some_positions(length)), states)
    edits = {k: torch.randn(shape, generator=generator, dtype=torch.float64) for k in ("scale", "shift")}
    expected = run(arguments, torch.float64, "reference", edits=edits, capture="all")
    assert_close(run(arguments, torch.float32, "cpu", edits=edits, capture="all"), expected, 2e-6)


@pytest.mark.parametrize("absent", [("gate",), ("D",), ("initial_state",), ("gate", "D", "initial_state")], ids=str)
def test_options_left_out(absent):
    arguments = make(2, 37, 24, 5)
    expected = run(arguments, torch.float64, "reference", absent=absent)
    assert_close(run(arguments, torch.float32, "cpu", absent=absent), expected, 2e-6)


@pytest.mark.parametrize("edited", [False, True], ids=["", "edited"])
@pytest.mark.parametrize("size", SIZES)
def test_cpu_equals_reference_with_raw_steps_and_marks(size, edited):
    batch, length, channels, states = SIZES[size]
    arguments = make(*SIZES[size])
    generator = torch.Generator().manual_seed(4)
    arguments["dt"] = 2 * torch.randn(batch, length, channels, generator=generator, dtype=torch.float64)
    arguments["dt_bias"] = torch.randn(channels, generator=generator, dtype=torch.float64)
    shape = (batch, channels, len(some_positions(length)), states)
    edits = {k: torch.randn(shape, generator=generator, dtype=torch.float64) for k in ("scale", "shift")}
    options = dict(edits=edits if edited else None, capture="all", dt_softplus=True, **marks(batch, length))
    expected = run(arguments, torch.float64, "reference", **options)
    assert_close(run(arguments, torch.float32, "cpu", **options), expected, 2e-6)


@pytest.mark.parametrize("gradients", [False, True], ids=["", "gradients"])
@pytest.mark.parametrize("ranks", [1, 3, 16, 17])
@pytest.mark.parametrize("size", ["one-of-everything", "odd", "chunk-and-one", "many-blocks"])
def test_steps_of_low_rank(size, ranks, gradients):
    batch, length, channels, _ = SIZES[size]
    generator = torch.Generator().manual_seed(6)
    arguments = make(*SIZES[size])
    arguments["dt"] = torch.randn(batch, length, ranks, generator=generator, dtype=torch.float64)
    arguments["dt_weight"] = torch.randn(channels, ranks, generator=generator, dtype=torch.float64) / ranks**0.5
    arguments["dt_bias"] = torch.randn(channels, generator=generator, dtype=torch.float64)
    options = dict(dt_softplus=True, capture="all", **marks(batch, length))
    written_out = arguments | {"dt": arguments["dt"] @ arguments["dt_weight"].T}
    del written_out["dt_weight"]
    expected = run(written_out, torch.float64, "reference", **options)
    if gradients:
        of_dt, names = expected.pop("gradient of dt"), ("dt", "dt_weight")
        expected["gradient of dt"] = of_dt @ arguments["dt_weight"]
        expected["gradient of dt_weight"] = torch.einsum("bte, btr -> er", of_dt, arguments["dt"])
        for backend, dtype, tolerance in (("cpu", torch.float32, 2e-6), ("reference", torch.float64, 1e-12)):
            found = run(arguments, dtype, backend, **options)
            assert set(names) <= {name.removeprefix("gradient of ") for name in found}
            assert_close(found, expected, tolerance)
        return
    with torch.no_grad():
        found = selective_scan(**{k: v.float() for k, v in arguments.items()}, **options, backend="cpu")
    assert_close(found._asdict(), {k: expected[k] for k in found._fields}, 2e-6)


def test_low_rank_steps_with_edits_that_want_a_gradient():
    arguments = {k: v.float() for k, v in make(2, 9, 20, 3).items()}
    generator = torch.Generator().manual_seed(8)
    dt, weight = (torch.randn(*shape, 4, generator=generator) for shape in ((2, 9), (20,)))
    options = dict(dt_bias=torch.randn(20, generator=generator), dt_softplus=True)
    gradients = []
    for given in ({"dt": dt, "dt_weight": weight}, {"dt": dt @ weight.T}):
        shift = torch.zeros(2, 20, 1, 3, requires_grad=True)
        edits = StateEdits([3], torch.ones(2, 20, 1, 3), shift)
        selective_scan(**arguments | given, **options, edits=edits).y.sum().backward()
        gradients.append(shift.grad)
    torch.testing.assert_close(*gradients)


def test_no_ranks_are_a_step_of_the_bias():
    arguments = {k: v.float() for k, v in make(1, 9, 20, 3).items()} | {"dt": torch.zeros(1, 9, 0)}
    bias = torch.linspace(-1, 1, 20)
    found = selective_scan(**arguments, dt_weight=torch.zeros(20, 0), dt_bias=bias, dt_softplus=True).y
    expected = selective_scan(**arguments | {"dt": torch.zeros(1, 9, 20)}, dt_bias=bias, dt_softplus=True).y
    torch.testing.assert_close(found, expected)
    with pytest.raises(InputError, match=r"dt, weight and bias have shapes .* give \[B T R\], \[E R\] and \[E\]"):
        step_size(torch.zeros(1, 9, 4), torch.zeros(20, 3), bias)


@torch.no_grad()
@pytest.mark.parametrize("ranks", [1, 8, 17])
@pytest.mark.parametrize("size", ["one-of-everything", "odd", "many-blocks"])
def test_step_sizes_are_those_of_the_scan_to_the_last_bit(size, ranks):
    batch, length, channels, _ = SIZES[size]
    generator = torch.Generator().manual_seed(7)
    arguments = {k: v.float() for k, v in make(*SIZES[size]).items()}
    dt, weight = (torch.randn(*shape, ranks, generator=generator) for shape in ((batch, length), (channels,)))
    bias = torch.randn(channels, generator=generator)
    steps = step_size(dt, weight, bias)
    truth = F.softplus(dt.double() @ weight.double().T + bias.double())
    assert steps.shape == (batch, length, channels) and (steps - truth).abs().max() < 1e-6 * truth.abs().max()
    expected = selective_scan(**arguments | {"dt": steps}, capture="all")
    options = dict(dt_weight=weight, dt_bias=bias, dt_softplus=True)
    for name, value in selective_scan(**arguments | {"dt": dt}, **options, capture="all")._asdict().items():
        assert torch.equal(value, getattr(expected, name)), name


@pytest.mark.parametrize("channels", [[0], [3, 4, 5, 20], list(range(16, 32)), [], [32]], ids=str)
def test_cpu_captures_chosen_channels(channels):
    arguments = make(2, 30, 33, 5)
    options = dict(capture=[0, 7, 29], capture_channels=channels)
    expected = run(arguments, torch.float64, "reference", **options)
    assert expected["captured"].shape == (2, len(channels), 3, 5)
    assert_close(run(arguments, torch.float32, "cpu", **options), expected, 2e-6)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_padding_is_as_if_it_were_not_there(backend):
    a = {k: v.float() for k, v in make(1, 12, 5, 3).items()}
    mask = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 1, 0, 1, 0, 0]]).bool()
    padded = {
        k: v.masked_fill(~mask[..., None], float("inf")) if v.ndim == 3 and k in "x gate" else v for k, v in a.items()
    }
    packed = {k: v[:, mask[0]] if v.ndim == 3 and k != "initial_state" else v for k, v in a.items()}
    result = selective_scan(**padded, mask=mask, backend=backend)
    expected = selective_scan(**packed, backend=backend)
    torch.testing.assert_close(result.y[mask], expected.y[0])
    torch.testing.assert_close(result.final_state, expected.final_state)
    assert (result.y[~mask] == 0).all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_packed_documents_do_not_see_each_other(backend):
    a = {k: v.float() for k, v in make(1, 12, 5, 3).items()}
    resets = torch.zeros(1, 12, dtype=torch.bool)
    resets[0, [4, 9]] = True
    result = selective_scan(**a, resets=resets, backend=backend)
    state = a.pop("initial_state")
    for start, stop in ((0, 4), (4, 9), (9, 12)):
        document = {k: v[:, start:stop] if v.ndim == 3 else v for k, v in a.items()}
        alone = selective_scan(**document, initial_state=state if start == 0 else None, backend=backend)
        torch.testing.assert_close(result.y[:, start:stop], alone.y)
    torch.testing.assert_close(result.final_state, alone.final_state)


@pytest.mark.parametrize("offset", [0, 40])
def test_a_gate_that_is_a_slice_is_read_in_place(offset):
    a = {k: v.float() for k, v in make(2, 20, 40, 4).items()}
    projection = torch.cat((a["gate"], a["x"]), dim=-1) if offset == 0 else torch.cat((a["x"], a["gate"]), dim=-1)
    result = selective_scan(**a | dict(gate=projection[..., offset : offset + 40]), backend="cpu")
    assert torch.equal(result.y, selective_scan(**a, backend="cpu").y)


@pytest.mark.parametrize("v", [-100.0, -20.0, -3.0, 0.0, 1e-3, 2.0, 30.0, 300.0])
def test_softplus_is_accurate_to_its_last_digits(v):
    a = dict(
        x=torch.ones(1, 1, 1),
        dt=torch.full((1, 1, 1), v),
        A=-torch.ones(1, 1),
        B=torch.ones(1, 1, 1),
        C=torch.ones(1, 1, 1),
    )
    step = selective_scan(**a, dt_softplus=True, backend="cpu").y.item()
    truth = F.softplus(torch.tensor(v, dtype=torch.float64), threshold=1e9).item()
    assert step == pytest.approx(truth, rel=4e-7, abs=1e-37)


@pytest.mark.parametrize(
    "edits",
    [StateEdits.set_to, StateEdits.add, StateEdits.multiply],
    ids=["set", "add", "multiply"],
)
def test_named_edits_do_what_they_say(edits):
    a = make(1, 6, 2, 2)
    value = torch.randn(1, 2, 1, 2, dtype=torch.float64)
    plain = selective_scan(**a, capture=[3]).captured
    changed = selective_scan(**a, capture=[3], edits=edits([3], value)).captured
    expected = {"set_to": value, "add": plain + value, "multiply": plain * value}[edits.__name__]
    torch.testing.assert_close(changed, expected)


@pytest.mark.parametrize("states", [100, 256])
def test_large_states(states):
    arguments = make(1, 20, 3, states)
    expected = run(arguments, torch.float64, "reference", capture=[4])
    assert_close(run(arguments, torch.float32, "cpu", capture=[4]), expected, 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_keeps_float32_states(dtype):
    arguments = make(2, 40, 32, 8, dtype=dtype)
    expected = run(arguments, torch.float64, "reference")
    result = run(arguments, dtype, "cpu")
    assert result["y"].dtype == dtype and result["final_state"].dtype == torch.float32
    assert_close(result, expected, 4 * torch.finfo(dtype).eps)


def test_reference_gradients_by_finite_differences():
    arguments = {k: v.requires_grad_() for k, v in make(1, 4, 2, 2).items()}
    edits = StateEdits([2], *torch.randn(2, 1, 2, 1, 2, dtype=torch.float64).requires_grad_())

    def function(*values):
        inputs = dict(zip([*arguments, "scale", "shift"], values, strict=True))
        changed = StateEdits(edits.positions, inputs.pop("scale"), inputs.pop("shift"))
        return selective_scan(**inputs, edits=changed, capture=[1, 3], backend="reference")

    assert torch.autograd.gradcheck(function, (*arguments.values(), edits.scale, edits.shift))


def test_reference_equals_mambapy():
    pscan = pytest.importorskip("mambapy.pscan").pscan
    a = make(2, 24, 6, 4)
    decay = torch.exp(a["dt"][..., None] * a["A"])
    write = (a["dt"] * a["x"])[..., None] * a["B"][:, :, None]
    states = pscan(decay, write.contiguous())
    expected = (states @ a["C"][..., None])[..., 0] + a["D"] * a["x"]
    result = selective_scan(a["x"], a["dt"], a["A"], a["B"], a["C"], a["D"], capture="all", backend="reference")
    torch.testing.assert_close(result.y, expected)
    torch.testing.assert_close(result.captured, states.permute(0, 2, 1, 3))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_cut_sequence_equals_one_pass(backend):
    a = {k: v.float() for k, v in make(2, 41, 20, 6).items()}
    whole = selective_scan(**a, backend=backend)
    state, ys = a.pop("initial_state"), []
    for part in torch.arange(41).tensor_split([1, 2, 30]):
        cut = {k: v[:, part] if v.ndim == 3 else v for k, v in a.items()}
        result = selective_scan(**cut, initial_state=state, backend=backend)
        state = result.final_state
        ys.append(result.y)
    torch.testing.assert_close(torch.cat(ys, 1), whole.y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, whole.final_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_step_of_zero_leaves_the_state(backend):
    a = {k: v.float() for k, v in make(1, 5, 3, 2).items()}
    a["dt"] = torch.zeros_like(a["dt"])
    assert torch.equal(selective_scan(**a, backend=backend).final_state, a["initial_state"])


def test_strong_decay_and_long_steps_stay_finite():
    a = {k: v.float() for k, v in make(1, 300, 16, 4).items()}
    a["dt"], a["A"] = a["dt"] * 50, a["A"] * 50
    a = {k: v.requires_grad_() for k, v in a.items()}
    result = selective_scan(**a, backend="cpu")
    result.y.sum().backward()
    expected = selective_scan(**{k: v.detach().double() for k, v in a.items()}, backend="reference").y
    torch.testing.assert_close(result.y.double(), expected, rtol=1e-4, atol=1e-4)
    assert all(v.grad.isfinite().all() for v in a.values())


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_bits_for_every_number_of_threads(threads):
    arguments = make(3, 100, 80, 16)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run(arguments, torch.float32, "cpu")
        torch.set_num_threads(threads)
        result = run(arguments, torch.float32, "cpu")
    finally:
        torch.set_num_threads(before)
    for name, value in expected.items():
        assert torch.equal(result[name], value), name


def test_two_threads_may_scan_at_once():
    """numba's default thread layer would abort the process here."""
    a = {k: v.float() for k, v in make(2, 400, 64, 16).items()}
    expected, results = selective_scan(**a, backend="cpu").y, {}

    def work(name):
        for _ in range(20):
            results[name] = selective_scan(**a, backend="cpu").y

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [w.start() for w in workers]
    [w.join() for w in workers]
    assert len(results) == 4 and all(torch.equal(y, expected) for y in results.values())


@pytest.mark.parametrize("name", ["x", "dt", "B", "gate", "initial_state"])
def test_what_is_not_a_number_stays_so(name):
    a = {k: v.float() for k, v in make(1, 6, 17, 3).items()} | dict(dt_bias=torch.zeros(17))
    a[name][0, 2] = float("nan")
    expected = selective_scan(**a, dt_softplus=True, backend="reference").y.isnan()
    assert expected.any()
    assert torch.equal(selective_scan(**a, dt_softplus=True, backend="cpu").y.isnan(), expected)


def test_decays_in_half_precision_are_widened_first():
    a = {k: v.float() for k, v in make(1, 30, 16, 4).items()}
    a["A"] = a["A"].bfloat16()
    expected = selective_scan(**a, backend="reference").y
    torch.testing.assert_close(selective_scan(**a, backend="cpu").y, expected, rtol=1e-5, atol=1e-5)


def test_forward_mode_and_func_transforms_go_through_torch():
    a = {k: v.float() for k, v in make(1, 5, 3, 2).items()}
    x = a.pop("x")
    _, tangent = torch.func.jvp(lambda x: selective_scan(x, **a).y, (x,), (torch.ones_like(x),))
    expected = selective_scan(torch.ones_like(x), **a).y  # linear in x, but for the state it starts from
    expected = expected - selective_scan(torch.zeros_like(x), **a).y
    torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-5)


def test_bad_arguments_are_named():
    a = {k: v.float() for k, v in make(2, 6, 4, 3).items()}
    with pytest.raises(InputError, match=r"dt has shape .*must be \(2, 6, 4\)"):
        selective_scan(**a | dict(dt=a["dt"][:, :5]))
    with pytest.raises(InputError, match=r"capture=\[3, 3\] must be ascending"):
        selective_scan(**a, capture=[3, 3])
    with pytest.raises(InputError, match=r"within 0\.\.5"):
        selective_scan(**a, capture=[6])
    with pytest.raises(InputError, match="edits.scale has shape"):
        selective_scan(**a, edits=StateEdits([1], torch.ones(2, 4, 2, 3), torch.ones(2, 4, 1, 3)))
    with pytest.raises(InputError, match="capture_channels says which"):
        selective_scan(**a, capture_channels=[1])
    with pytest.raises(InputError, match=r"capture_channels=\[4\] must be .* within 0\.\.3"):
        selective_scan(**a, capture="all", capture_channels=[4])
    with pytest.raises(InputError, match="capture='some' must be 'all'"):
        selective_scan(**a, capture="some")
    with pytest.raises(InputError, match="mask is torch.int64; give booleans"):
        selective_scan(**a, mask=torch.ones(2, 6, dtype=torch.long))
    with pytest.raises(InputError, match="axis of size 0"):
        selective_scan(**{k: v[:0] if v.ndim == 3 else v for k, v in a.items()})
    with pytest.raises(InputError, match="edits must be a StateEdits"):
        selective_scan(**a, edits=([0], None, None))
    with pytest.raises(InputError, match="x and A are"):
        selective_scan(**a | dict(x=a["x"][0]))
    with pytest.raises(InputError, match="no positions"):
        selective_scan(**a | {k: a[k][:, :0] for k in ("x", "dt", "B", "C", "gate")})
    with pytest.raises(ConfigError, match="backend='warp'"):
        selective_scan(**a, backend="warp")
    with pytest.raises(ConfigError, match="backend='cpu' computes in float32"):
        selective_scan(**{k: v.double() for k, v in a.items()}, backend="cpu")
