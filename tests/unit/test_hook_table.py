"""The whole hook table on every backend: read and edited in one pass, in pieces over a state, and while generating.

The truth is one pass in float64 on the reference, edited by indexing; positions are those of the whole sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial

import pytest
import torch

from jambascope import HookedJamba, JambaConfig, mamba, moe, ssm_mixer
from jambascope.hook_point import At
from jambascope.hook_table import HOOK_TABLE
from jambascope.model import initialize

SIZES = dict(
    d_model=16, d_vocab=29, n_heads=4, n_key_value_heads=2, d_head=4, d_mlp=12, num_experts=4, experts_per_token=2,
    d_inner=32, d_state=4, d_conv=4, dt_rank=3, mamba_d_head=8, mamba_n_groups=2, pad_token_id=0,
)  # fmt: skip
CONFIGS = {
    "hybrid": dict(mixers=("mamba", "attention", "mamba"), feed_forwards=("dense", "moe", "moe")),
    "mamba2": dict(mixers=("mamba2", "attention", "mamba2"), feed_forwards=("moe", "dense", "none")),
    "pure-mamba": dict(mixers=("mamba", "mamba"), feed_forwards=("none", "none"), inner_norms=False, d_inner=24),
    "one-expert": dict(
        mixers=("attention", "mamba"), feed_forwards=("moe", "moe"), num_experts=1, experts_per_token=1,
        n_key_value_heads=1, d_state=1, d_conv=2, rotary=True,
    ),
    "tiny": dict(mixers=("mamba",), feed_forwards=("moe",), d_inner=4, d_state=2, d_mlp=4, num_experts=3),
}  # fmt: skip
LENGTH, PIECES, EDITED = 9, (4, 1, 4), (2, 4, 6)
PROMPT, NEW, GENERATED = 4, 4, 5
"""``GENERATED`` is a position that exists only while generating; of ``EDITED``, 4 is a call of one token."""


BETWEEN_KERNELS = (
    *("hook_conv", "hook_conv_state", "hook_dt", "hook_ssm_write", "hook_ssm_state", "hook_ssm_read"),
    *("hook_expert_indices", "hook_expert_out"),
)


@dataclass
class Case:
    model: HookedJamba
    truth: HookedJamba
    tolerance: float

    slow: bool

    def points(self) -> list[str]:
        """Each row of the table in the first layer that has it; where kernels are slow, those between them."""
        first = {}
        for name, row in self.model.hook_rows.items():
            if not self.slow or name.rsplit(".", 1)[-1] in BETWEEN_KERNELS:
                first.setdefault(row, name)
        return list(first.values())


@cache
def twins(kind: str, dtype: torch.dtype) -> tuple[HookedJamba, HookedJamba]:
    """A model and the same weights in float64."""
    torch.manual_seed(0)
    model = HookedJamba(JambaConfig(**SIZES | CONFIGS[kind]))
    initialize(model, std=0.3)
    model = model.to(dtype).eval()
    truth = HookedJamba(model.config, dtype=torch.float64).eval()
    truth.load_state_dict(model.state_dict())
    return model, truth


def on_triton(kernel):
    """The kernel with its Triton backend, but for the truth's float64."""

    def function(x, *args, **options):
        return kernel(x, *args, **options, backend="auto" if x.dtype == torch.float64 else "triton")

    return function


BACKENDS = {"cpu": torch.float32, "reference": torch.float64, "bfloat16": torch.bfloat16, "triton": torch.float32}
TOLERANCES = {"cpu": 3e-5, "reference": 1e-9, "bfloat16": 0.08, "triton": 3e-5}
CASES = [f"{kind}-{backend}" for kind in CONFIGS for backend in BACKENDS if (kind == "tiny") == (backend == "triton")]
"""The interpreter of Triton is slow, so it gets a model of its own."""
PADDED = [(c, None) for c in CASES] + [(f"{kind}-cpu", s) for kind in ("hybrid", "mamba2") for s in ("left", "right")]
every_case = pytest.mark.parametrize(
    ("case", "side"), [pytest.param(*p, id="-".join(filter(None, p))) for p in PADDED], indirect=["case"]
)
every_run = pytest.mark.parametrize("run", ["one pass", "in pieces"])


@pytest.fixture
def case(request, monkeypatch) -> Case:
    kind, backend = request.param.rsplit("-", 1)
    if backend == "triton":
        if request.getfixturevalue("triton_device").type != "cpu":
            pytest.skip("in the interpreter only: it takes tensors on the CPU")
        for module, function in (
            (mamba, "selective_scan"),
            (ssm_mixer, "causal_conv1d"),
            (ssm_mixer, "causal_conv1d_step"),
            (moe, "experts"),
        ):
            monkeypatch.setattr(module, function, on_triton(getattr(module, function)))
    return Case(*twins(kind, BACKENDS[backend]), TOLERANCES[backend], backend == "triton")


def draw(model: HookedJamba, length: int) -> torch.Tensor:
    return torch.randint(3, model.config.d_vocab, (2, length), generator=torch.Generator().manual_seed(1))


def padded(side: str | None, length: int) -> torch.Tensor | None:
    if side is None:
        return None
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, :2] = side != "left"
    mask[1, -1:] = side != "right"
    return mask


def edit(part, hook, num_experts):
    """What is 0 stays so (the pattern at keys to come); states are pinned to what does not depend on earlier edits."""
    if hook.name.endswith(("hook_ssm_state", "hook_conv_state")):
        return torch.full_like(part, 0.7)
    return torch.where(part == 0, part, part * 0.5 + 0.3) if part.is_floating_point() else (part + 1) % num_experts


def edit_by_index(positions, num_experts):
    """The same at ``positions`` of one pass over everything, without :class:`At`."""

    def function(value, hook):
        axis = hook.row.axes.index("T")
        value = value.clone()
        for position in positions:
            at = (slice(None),) * axis + (position,)
            value[at] = edit(value[at], hook, num_experts)
        return value

    return function


def one_pass(model, tokens, mask, hooks=()) -> torch.Tensor:
    with torch.no_grad():
        return model.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=list(hooks))


def in_pieces(model, tokens, mask, hooks=()) -> torch.Tensor:
    state, logits = model.new_state(len(tokens)), []
    with torch.no_grad(), model.hooks(list(hooks)):
        for start, size in zip((0, 4, 5), PIECES, strict=True):
            part = slice(start, start + size)
            logits.append(model(tokens[:, part], attention_mask=None if mask is None else mask[:, part], state=state))
    return torch.cat(logits, 1)


RUNS = {"one pass": one_pass, "in pieces": in_pieces}


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    value, truth = (v.double().nan_to_num(neginf=0.0) for v in (value, truth))
    return ((value - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def of_tokens(value: torch.Tensor, mask: torch.Tensor | None, axis: int, positions) -> torch.Tensor:
    """Entries at tokens, not padding."""
    value = value.movedim(axis, 1)
    return value if mask is None else value[mask[:, list(positions)].bool()]


def test_the_cases_cover_the_table():
    rows = {row for kind in CONFIGS for row in twins(kind, torch.float64)[1].hook_rows.values()}
    assert rows == set(HOOK_TABLE)


@every_run
@every_case
def test_every_point_is_read(run, case, side):
    run = RUNS[run]
    tokens, mask = draw(case.model, LENGTH), padded(side, LENGTH)
    truth, seen = {}, {}

    def keep(value, hook, into):
        into.setdefault(hook.name, []).append((list(hook.positions), value.clone()))

    everything = lambda name: True  # noqa: E731
    one_pass(case.truth, tokens, mask, [(everything, partial(keep, into=truth))])
    run(case.model, tokens, mask, [(everything, partial(keep, into=seen))])
    for name in [] if case.slow or run is one_pass else case.points():  # alone: nothing is computed for another's sake
        run(case.model, tokens, mask, [(name, partial(keep, into=seen))])
    wrong = {}
    for name, calls in seen.items():
        row, [(_, expected)] = case.model.hook_rows[name], truth[name]
        axis = row.axes.index("T")
        held = [p for positions, _ in calls for p in positions]
        assert held in (list(range(LENGTH)), 2 * list(range(LENGTH))), name
        for positions, value in calls:
            should = expected.index_select(axis, torch.tensor(positions))
            if "S_keys" in row.axes:
                should = should[..., : value.shape[-1]]
            assert value.shape == should.shape, name
            pair = (of_tokens(v, mask, axis, positions) for v in (value, should))
            wrong[name] = max(wrong.get(name, 0.0), relative_error(*pair))
    assert set(seen) == set(case.model.hook_rows)
    assert not {name: error for name, error in wrong.items() if error > case.tolerance}


@every_run
@every_case
def test_every_point_is_edited(run, case, side):
    tokens, mask = draw(case.model, LENGTH), padded(side, LENGTH)
    X = case.model.config.num_experts
    plain = one_pass(case.truth, tokens, mask)
    wrong, without_effect = {}, set()
    for name in case.points():
        expected = one_pass(case.truth, tokens, mask, [(name, edit_by_index(EDITED, X))])
        got = RUNS[run](case.model, tokens, mask, [(name, At(EDITED, partial(edit, num_experts=X)))])
        errors = relative_error(*(of_tokens(v, mask, 1, range(LENGTH)) for v in (got, expected)))
        if errors > case.tolerance:
            wrong[name] = errors
        if relative_error(expected, plain) < 1e-4:
            without_effect.add(name.rsplit(".", 1)[-1])
    assert not wrong
    assert without_effect <= ({"hook_out", "hook_expert_indices"} if X == 1 else set())  # one expert has no rival


@every_case
def test_every_point_is_edited_where_a_position_is_generated(case, side):
    model, X = case.model, case.model.config.num_experts
    prompt, mask = draw(model, PROMPT), padded(side, PROMPT)
    wrong = {}
    for name in case.points():
        logits, positions = [], []
        hooks = [
            (name, lambda value, hook, into=positions: into.extend(hook.positions)),
            (name, At(GENERATED, partial(edit, num_experts=X))),
            ("hook_logits", lambda value, hook, into=logits: into.append(value[:, -1:].clone())),
        ]
        with model.hooks(hooks):
            out = model.generate(prompt, NEW, stop_tokens=[], attention_mask=mask)
        whole = None if mask is None else torch.cat((mask.sort(1).values, torch.ones(2, NEW - 1, dtype=torch.long)), 1)
        expected = one_pass(case.truth, out[:, :-1], whole, [(name, edit_by_index([GENERATED], X))])
        errors = relative_error(torch.cat(logits, 1), expected[:, PROMPT - 1 :])
        if errors > case.tolerance:
            wrong[name] = errors
        only_last = name == "hook_logits" or name.startswith("ln_final")
        assert positions == list(range(PROMPT - 1 if only_last else 0, PROMPT + NEW - 1)), name
    assert not wrong
