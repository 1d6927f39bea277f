"""Every backend of the experts against the reference in float64: outputs, addends and every gradient."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch

from jambascope.errors import ConfigError, HookError, InputError
from jambascope.kernels import triton_runtime
from jambascope.kernels.experts import ExpertsInt8, experts
from jambascope.kernels.experts.int8 import quantize_rows

SIZES = {  # tokens, slots, experts, d_model, d_mlp
    "one-of-everything": (1, 1, 1, 1, 1),
    "one-token": (1, 2, 4, 20, 9),
    "few-tokens": (3, 2, 5, 33, 24),
    "one-expert": (21, 1, 1, 16, 17),
    "odd": (37, 3, 5, 18, 11),
    "more-experts-than-tokens": (7, 2, 19, 32, 40),
    "every-expert": (6, 4, 4, 16, 33),
}
LARGE = {
    "two-blocks-of-tokens": (2100, 2, 4, 16, 8),
    "rows-of-several-tasks": (700, 2, 3, 24, 40),
    "gate-and-up-kept": (40, 2, 3, 272, 24),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WEIGHTS = ("gate_up", "down")


def make(tokens, slots, n_experts, d_model, d_mlp, dtype=torch.float32, seed=0):
    """Random arguments in float64, rounded to what ``dtype`` can hold; a token may name an expert twice."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).double()

    return dict(
        x=draw(tokens, d_model),
        indices=torch.randint(n_experts, (tokens, slots), generator=generator),
        weights=draw(tokens, slots),
        gate_up=draw(n_experts, 2 * d_mlp, d_model) / 4,
        down=draw(n_experts, d_model, d_mlp) / 4,
    )


def int8(weight):
    return ExpertsInt8(*quantize_rows(weight.float()))


def run(arguments, dtype, backend, addends=False, quantized=False, device="cpu"):
    """Outputs with and without gradients, and gradients by name, of a random weighting of the outputs."""
    device = "cpu" if backend == "reference" else device
    values = {k: v.to(device) for k, v in arguments.items()}
    leaves = {k: v.to(dtype).detach().clone().requires_grad_() for k, v in values.items() if k != "indices"}
    given = leaves | {k: int8(values[k]) for k in WEIGHTS if quantized}
    out = experts(**given, indices=values["indices"], addends=addends, backend=backend)
    with torch.no_grad():
        again = experts(**given, indices=values["indices"], addends=addends, backend=backend)
    generator = torch.Generator().manual_seed(9)
    weighting = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(dtype).to(out.device)
    out.backward(weighting)
    results = {"output": out, "output without gradients": again}
    results |= {f"gradient of {k}": v.grad for k, v in leaves.items() if not (quantized and k in WEIGHTS)}
    return {k: v.detach().cpu() for k, v in results.items()}


def assert_close(result, expected, tolerance):
    assert result.keys() == expected.keys()
    for name, truth in expected.items():
        assert result[name].shape == truth.shape
        error = (result[name].double() - truth).norm() / truth.norm().clamp_min(1e-30)
        assert error < tolerance, f"{name}: relative error {error:.1e}"


def tolerance(dtype):
    return 2e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("addends", [False, True], ids=["combined", "addends"])
@pytest.mark.parametrize("quantized", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("size", SIZES | LARGE)
def test_cpu_equals_reference(size, quantized, addends):
    arguments = make(*(SIZES | LARGE)[size])
    expected = run(arguments, torch.float64, "reference", addends, quantized)
    assert_close(run(arguments, torch.float32, "cpu", addends, quantized), expected, tolerance(torch.float32))


@pytest.mark.parametrize("addends", [False, True], ids=["combined", "addends"])
@pytest.mark.parametrize("quantized", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("size", SIZES)
def test_triton_equals_reference(size, quantized, addends, triton_device):
    arguments = make(*SIZES[size])
    expected = run(arguments, torch.float64, "reference", addends, quantized)
    result = run(arguments, torch.float32, "triton", addends, quantized, triton_device)
    assert_close(result, expected, tolerance(torch.float32))


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("size", ["one-token", "odd"])
def test_half_precision(size, backend, dtype, quantized, triton_device):
    kind = DTYPES[dtype]
    arguments = make(*SIZES[size], dtype=kind)
    expected = run(arguments, torch.float64, "reference", quantized=quantized)
    result = run(arguments, kind, backend, quantized=quantized, device=triton_device)
    assert result["output"].dtype == result["gradient of x"].dtype == kind
    assert_close(result, expected, tolerance(kind))


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_the_addends_sum_to_the_output(backend, triton_device):
    arguments = {k: v.float() if v.is_floating_point() else v for k, v in make(*SIZES["odd"]).items()}
    if backend == "triton":
        arguments = {k: v.to(triton_device) for k, v in arguments.items()}
    combined = experts(**arguments, backend=backend)
    terms = experts(**arguments, backend=backend, addends=True)
    torch.testing.assert_close(terms.sum(1), combined, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_only_gradients_that_are_wanted(backend, triton_device):
    arguments = make(*SIZES["odd"])
    expected = run(arguments, torch.float64, "reference")
    device = triton_device if backend == "triton" else "cpu"
    for name in ("x", "weights", *WEIGHTS):
        values = {k: (v.float() if k != "indices" else v).to(device) for k, v in arguments.items()}
        leaf = values[name].requires_grad_()
        out = experts(**values, backend=backend)
        generator = torch.Generator().manual_seed(9)
        weighting = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        (gradient,) = torch.autograd.grad(out, leaf, weighting.float().to(device))
        assert_close({name: gradient.cpu()}, {name: expected[f"gradient of {name}"]}, tolerance(torch.float32))


def test_reference_gradients_by_finite_differences():
    arguments = make(4, 2, 3, 3, 2)
    indices = arguments.pop("indices")
    leaves = {k: v.requires_grad_() for k, v in arguments.items()}

    def function(*values):
        return experts(indices=indices, backend="reference", **dict(zip(leaves, values, strict=True)))

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


def test_reference_by_hand():
    """Two experts of one hidden unit, written out."""
    x = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    gate_up = torch.tensor([[[1.0, 0.5], [2.0, 1.0]], [[0.0, 1.0], [1.0, 1.0]]], dtype=torch.float64)
    down = torch.tensor([[[3.0], [4.0]], [[5.0], [6.0]]], dtype=torch.float64)
    weights = torch.tensor([[0.25, 0.5]], dtype=torch.float64)
    out = experts(x, torch.tensor([[1, 0]]), weights, gate_up, down, backend="reference")
    silu = torch.nn.functional.silu(torch.tensor(-2.0, dtype=torch.float64))
    # Expert 0: gate 0, up 0. Expert 1: gate -2, up -1.
    torch.testing.assert_close(out[0], 0.25 * silu * -1.0 * torch.tensor([5.0, 6.0], dtype=torch.float64))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_cpu_bits_do_not_depend_on_threads(threads):
    arguments = make(*LARGE["rows-of-several-tasks"])
    before = torch.get_num_threads()
    expected = run(arguments, torch.float32, "cpu")
    try:
        torch.set_num_threads(threads)
        result = run(arguments, torch.float32, "cpu")
    finally:
        torch.set_num_threads(before)
    for name, value in expected.items():
        assert torch.equal(result[name], value), name


def test_cpu_serves_python_threads_at_once():
    arguments = {k: v.float() if v.is_floating_point() else v for k, v in make(*SIZES["odd"]).items()}
    expected, failures = experts(**arguments), []

    def work():
        for _ in range(30):
            if not torch.equal(experts(**arguments), expected):
                failures.append(1)

    workers = [threading.Thread(target=work) for _ in range(3)]
    [w.start() for w in workers]
    [w.join() for w in workers]
    assert not failures


def test_inference_mode_before_and_after():
    arguments = {k: v.float() if v.is_floating_point() else v for k, v in make(*SIZES["odd"]).items()}
    with torch.inference_mode():
        inside = experts(**arguments)
    assert torch.equal(experts(**arguments), inside)
    with torch.inference_mode():
        assert torch.equal(experts(**{k: v.clone() for k, v in arguments.items()}), inside)


@pytest.mark.parametrize("index", [-1, 5])
@pytest.mark.parametrize("tokens", [1, 40])
def test_cpu_refuses_experts_that_do_not_exist(index, tokens):
    arguments = {k: v.float() if v.is_floating_point() else v for k, v in make(tokens, 2, 5, 16, 8).items()}
    arguments["indices"][-1, 1] = index
    with pytest.raises(InputError, match=r"there are 0\.\.4"):
        experts(**arguments, backend="cpu")


@pytest.mark.parametrize(
    ("dtype", "backend", "message"),
    [
        (torch.float64, "cpu", "does not take torch.float64 on cpu"),
        (torch.float64, "triton", "does not take torch.float64 on cpu"),
        (torch.float32, "numpy", "is not one of"),
    ],
)
def test_wrong_backends_are_refused(dtype, backend, message):
    arguments = {k: v.to(dtype) if v.is_floating_point() else v for k, v in make(*SIZES["odd"]).items()}
    with pytest.raises(ConfigError, match=message):
        experts(**arguments, backend=backend)


class _Launches:
    """Stands for a kernel, and notes its grid."""

    def __init__(self, grids):
        self.grids = grids

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *args, **options: None


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_nothing_waits_for_the_device(tokens, quantized, triton_device, fake_cuda, monkeypatch):
    """On tensors that hold no data, where reading a value raises; also what happens inside the launches' operators."""
    from jambascope.kernels.experts import triton, triton_kernels

    grids, devices = [], []
    # The device guard asks for a real one.
    monkeypatch.setattr(triton_runtime, "on", lambda device: devices.append(device) or contextlib.nullcontext())
    for name in [n for n in vars(triton_kernels) if n.endswith("_kernel")]:
        monkeypatch.setattr(triton_kernels, name, _Launches(grids))
    with fake_cuda(), torch.device("cuda"), torch.no_grad():
        x, weights = torch.empty(tokens, 32), torch.empty(tokens, 2)
        indices = torch.empty(tokens, 2, dtype=torch.int64)
        gate_up, down = torch.empty(5, 48, 32), torch.empty(5, 32, 24)
        if quantized:
            gate_up, down = (ExpertsInt8.empty(w.shape, "cuda") for w in (gate_up, down))
        pieces = [*triton._parts(gate_up), *triton._parts(down)]
        for addends in (False, True):
            shape = (tokens, 2, 32) if addends else (tokens, 32)
            out = experts(x, indices, weights, gate_up, down, addends=addends)
            assert out.shape == shape and out.device.type == "cuda"
            for keep in (False, True):
                results = [
                    op(x, indices, weights, *pieces, addends, keep)
                    for op in (triton._forward, triton._forward._init_fn)
                ]
                assert results[0][0].shape == shape
                assert [r.shape for r in results[0]] == [r.shape for r in results[1]]
            needs = (True, not quantized, not quantized)
            saved = (x, weights, pieces[0], pieces[2], pieces[1], pieces[3], *results[0][1:])
            results = [op(results[0][0], *saved, *needs) for op in (triton._backward, triton._backward._init_fn)]
            assert [(r.shape, r.dtype) for r in results[0]] == [(r.shape, r.dtype) for r in results[1]]
    assert len(devices) == len(grids) and {device.type for device in devices} == {"cuda"}, "a launch without its device"
    assert grids and all(isinstance(size, int) for grid in grids for size in grid)


def test_an_edited_route_is_checked_without_waiting(small_config, triton_device, fake_cuda):
    """The check of indices that a hook returns, and the rest of the layer, on tensors that hold no data."""
    from jambascope.moe import MoE
    from jambascope.state import Run

    with fake_cuda(), torch.device("cuda"), torch.no_grad():
        moe = MoE(small_config)
        for heard in (False, True):
            if heard:
                moe.router.hook_expert_indices.add_hook(lambda value, hook: value + 1)
                moe.hook_expert_out.add_hook(lambda value, hook: value * 2)
            x = torch.empty(2, 11, small_config.d_model)
            assert moe(x, Run(2, 11, x.device, None, None, None)).shape == x.shape


def test_the_layer_makes_addends_only_when_they_are_heard(small_model, tokens, monkeypatch):
    import jambascope.moe

    asked = []
    monkeypatch.setattr(
        jambascope.moe, "experts", lambda *a, addends: (asked.append(addends), experts(*a, addends=addends))[1]
    )
    plain = small_model(tokens)
    assert set(asked) == {False}
    _, cache = small_model.run_with_cache(
        tokens, names_filter=["blocks.1.mlp.hook_expert_out", "blocks.1.hook_mlp_out"]
    )
    assert True in asked
    torch.testing.assert_close(cache["blocks.1.mlp.hook_expert_out"].sum(2), cache["blocks.1.hook_mlp_out"])
    torch.testing.assert_close(small_model(tokens), plain)
    with pytest.raises(HookError, match=r"expert outside 0\.\.4"):
        small_model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.mlp.hook_expert_indices", lambda v, hook: v - 9)])


def floats(**changed):
    """Arguments in float32, with some of them changed."""
    arguments = {k: v.float() if v.is_floating_point() else v for k, v in make(*SIZES["odd"]).items()}
    return arguments | {k: change(arguments[k]) for k, change in changed.items()}


@pytest.mark.parametrize("backend", ["auto", "reference", "cpu", "triton"])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(x=lambda v: v[0]), r"x, indices and down have shapes \(18,\)"),
        (dict(x=lambda v: v[:-1]), r"indices has shape \(37, 3\)"),
        (dict(weights=lambda v: v[:, :2]), r"weights has shape \(37, 2\)"),
        (dict(gate_up=lambda v: v[:, :-1]), r"gate_up has shape .* it must be \(5, 22, 18\)"),
        (dict(gate_up=lambda v: int8(v[:2])), r"gate_up has shape \(2, 22, 18\)"),
        (dict(down=lambda v: v[:, 1:]), r"down has shape|gate_up has shape"),
        (dict(indices=lambda v: v.float()), "indices are torch.float32; give integers"),
        (dict(indices=lambda v: v.bool()), "indices are torch.bool; give integers"),
        (dict(down=lambda v: v.to("meta")), "down is on meta and x on cpu"),
    ],
)
def test_shapes_that_do_not_fit(changed, message, backend):
    with pytest.raises(InputError, match=message):
        experts(**floats(**changed), backend=backend)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_indices_of_any_integer_type(backend, dtype):
    arguments = floats(indices=lambda v: v.to(dtype))
    assert torch.equal(experts(**arguments, backend=backend), experts(**floats(), backend=backend))


@pytest.mark.parametrize("tokens", [1, 37])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_one_weight_in_int8_goes_to_the_reference(weight, tokens, triton_device):
    arguments = floats(**{weight: int8})
    arguments |= {k: arguments[k][:tokens] for k in ("x", "indices", "weights")}
    assert torch.equal(experts(**arguments), experts(**arguments, backend="reference"))
    for backend in ("cpu", "triton"):
        with pytest.raises(ConfigError, match=f"backend='{backend}' does not take .* use 'auto'"):
            experts(**arguments, backend=backend)


@pytest.mark.parametrize("backend", ["auto", "reference", "cpu", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int8])
@pytest.mark.parametrize("names", [WEIGHTS, ("down",)], ids=["both", "down"])
def test_weights_of_another_type_are_refused(names, dtype, backend):
    with pytest.raises(ConfigError, match="does not take .* convert gate_up and down to the type of x"):
        experts(**floats(**{name: lambda v: v.to(dtype) for name in names}), backend=backend)


@pytest.mark.parametrize("size", ["one-token", "odd"])
def test_default_types_change_nothing(size):
    arguments = make(*SIZES[size])
    expected = run(arguments, torch.float32, "cpu")
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            leaves = {k: v.float().requires_grad_() for k, v in arguments.items() if k != "indices"}
            out = experts(**leaves, indices=arguments["indices"], backend="cpu")
            with torch.no_grad():
                again = experts(**leaves, indices=arguments["indices"], backend="cpu")
            out.backward(torch.ones(out.shape, dtype=torch.float32, device="cpu"))
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(out, expected["output"]) and torch.equal(again, expected["output without gradients"])
    assert all(v.grad.dtype == torch.float32 and v.grad.isfinite().all() for v in leaves.values())


@pytest.mark.parametrize("addends", [False, True], ids=["combined", "addends"])
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_no_tokens(backend, addends, triton_device):
    arguments = make(0, 2, 3, 16, 8)
    results = run(arguments, torch.float32, backend, addends, device=triton_device)
    assert results["output"].shape == ((0, 2, 16) if addends else (0, 16))
    assert not results["gradient of down"].any()
