"""Races: the timing by a clock that is told what to say, the sides' equality, and every race at a tiny size."""

from __future__ import annotations

import json
import mmap
import re
import sys
from dataclasses import replace

import pytest
import torch
import typer

from jambascope.errors import ConfigError
from jambascope.hook_point import HookPoint
from jambascope.studies.bench import children, exp_kernel, kernel_races, peers, report, sweep_races, targets
from jambascope.studies.bench.command import bench
from jambascope.studies.bench.hook_removal import without_hook_points
from jambascope.studies.bench.models import Lab
from jambascope.studies.bench.products import call_products, forward_products
from jambascope.studies.bench.race import OURS, Race, Setting, Skip, Summary
from jambascope.studies.bench.races import RACES
from jambascope.studies.bench.timing import CpuClock, Side


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab(torch.device("cpu"), tmp_path_factory.mktemp("checkpoints"))


AT = Setting(d_model=32, batch=2, length=19)


# -- sides -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_scan_sides_compute_the_same(lab, backward, relative_error=lambda a, b: ((a - b).norm() / b.norm()).item()):
    sides = kernel_races.scan_sides(lab, AT, backward)
    ours = sides.pop(OURS).call()
    ours = ours if backward else [ours]
    checked = 0
    for name, side in sides.items():
        if isinstance(side, str) or name in RACES["scan"].bounds:
            continue
        theirs = side.call() if backward else [side.call()]
        for a, b in zip(ours, theirs, strict=True):
            b = b if a.shape == b.shape else b.transpose(1, 2)
            assert relative_error(a, b) < 1e-5, name
        checked += 1
    assert checked >= 1  # transformers at least


def test_expert_sides_compute_the_same(lab):
    sides = kernel_races.expert_sides(lab, AT)
    ours = sides[OURS].call()
    before = lab.theirs(32).config._experts_implementation
    for name in ("transformers eager", "transformers grouped"):
        torch.testing.assert_close(sides[name].call(), ours, rtol=1e-4, atol=1e-6)
    assert lab.theirs(32).config._experts_implementation == before


def test_models_that_race_agree(lab):
    tokens = lab.tokens(2, 19)
    with torch.no_grad():
        ours = lab.ours(32)(tokens)
        torch.testing.assert_close(lab.theirs(32)(tokens, use_cache=False).logits, ours, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lab.bridge(32)(tokens), ours, rtol=1e-4, atol=1e-5)


def test_products_are_those_of_the_forward(lab):
    """Counted by hand from the configuration: 7 Mamba layers, 1 attention layer, 4 dense and 4 MoE feed-forwards."""
    model, tokens = lab.ours(32), lab.tokens(2, 19)
    c, rows = model.config, 2 * 19
    products, queries = forward_products(model, tokens)
    D, E, F = c.d_model, c.d_inner, c.d_mlp
    mamba = D * 2 * E + E * (c.dt_rank + 2 * c.d_state) + c.dt_rank * E + E * D
    attention = 2 * D * c.n_heads * c.d_head + 2 * D * c.n_key_value_heads * c.d_head
    moe = D * c.num_experts + c.experts_per_token * 3 * D * F
    total = rows * (7 * mamba + attention + 4 * 3 * D * F + 4 * moe + D * c.d_vocab)
    assert sum(n * w.numel() for n, w in products) == total
    assert [q.shape for q in queries] == [(2, c.n_heads, 19, c.d_head)]
    call_products(products, queries)()


def test_sweep_sides_compute_the_same(lab):
    at = Setting(d_model=32, batch=1, length=sweep_races.LENGTHS[0])
    sides = sweep_races.sweep_sides(lab, at)
    every = sides[OURS].call().values["resid_pre"][0, 0]
    assert every.size == sides[OURS].units == 512 and every.std() > 0
    index = sweep_races.sample(at.length)
    ours = torch.tensor([every.sel(layer=layer, position=p).item() for layer, p in index.itertuples(index=False)])
    for name in (sweep_races.OUR_LOOP, sweep_races.THEIR_LOOP):
        assert sides[name].units == len(index)
        torch.testing.assert_close(sides[name].call(), ours, rtol=1e-4, atol=1e-5)


def test_products_of_a_sweep_are_those_of_its_cells(lab):
    """Counted cell by cell: what a forward pass multiplies for a position, at every layer from the patched one on."""
    model, tokens, cells = lab.ours(32), lab.tokens(1, 19), range(0, 19, 4)
    c = model.config
    D, E, F = c.d_model, c.d_inner, c.d_mlp
    mamba = D * 2 * E + E * (c.dt_rank + 2 * c.d_state) + c.dt_rank * E
    attention = 2 * D * c.n_heads * c.d_head + 2 * D * c.n_key_value_heads * c.d_head
    moe = D * c.num_experts + c.experts_per_token * 3 * D * F
    of_layer = [
        (attention if mixer == "attention" else mamba + E * D) + (moe if kind == "moe" else 3 * D * F)
        for mixer, kind in zip(c.mixers, c.feed_forwards, strict=True)
    ]
    expected = sum((19 - p) * sum(of_layer[layer:-1]) for layer in range(c.n_layers) for p in cells)
    expected += c.n_layers * sum((19 - p) * mamba + E * D + moe + D * c.d_vocab for p in cells)
    found = sweep_races.sweep_products(model, tokens, cells)
    assert abs(sum(n * w.numel() for n, w in found) / expected - 1) < 0.01  # experts' rows are rounded
    assert max(n for n, _ in found) <= sweep_races.PIECE
    sweep_races.call_sweep_products(model, tokens, cells)()


def test_longer_prompts_are_patched_at_fewer_positions():
    for length in sweep_races.LENGTHS:
        assert sweep_races.depth(length) * len(sweep_races.positions(length)) == sweep_races.MOST_CELLS
    sizes = ["8 layers x 64 positions", "32 layers x 256 positions, every 16th"]
    assert [sweep_races.where(length) for length in sweep_races.LENGTHS] == sizes
    assert all(size in sweep_races.SWEEP.title for size in sizes)
    assert [t.lengths for t in targets.TARGETS if t.race == "sweep" and t.kind == "times faster"] == [(64,)]
    index = sweep_races.sample(256)
    assert index["layer"].nunique() == index["pos"].nunique() == len(index) == sweep_races.SAMPLE


def test_hook_points_are_gone_from_the_bare_model(lab, monkeypatch):
    model, tokens = lab.ours(32), lab.tokens(2, 19)
    bare = without_hook_points(model)
    calls = []
    original = HookPoint.__call__
    monkeypatch.setattr(HookPoint, "__call__", lambda self, value: (calls.append(self.name), original(self, value))[1])
    with torch.no_grad():
        expected = model(tokens)
        assert len(calls) > 100
        calls.clear()
        assert torch.equal(bare(tokens), expected)
    assert calls == []
    assert bare.embed.weight is model.embed.weight
    assert "forward" not in vars(model.blocks[0])


# -- peers -----------------------------------------------------------------------------------------------------


def test_missing_peers_are_named(lab, monkeypatch):
    find_spec = peers.importlib.util.find_spec
    gone = ("mambapy", "mamba_ssm")
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda n: None if n in gone else find_spec(n))
    peers.mamba_ssm_reference.cache_clear()
    sides = kernel_races.scan_sides(lab, AT, backward=False)
    peers.mamba_ssm_reference.cache_clear()
    assert sides["mambapy"] == "not installed: pip install mambapy"
    assert sides["mamba_ssm reference"] == "not installed: pip install mamba-ssm"


def test_the_stubs_of_mamba_ssm_do_not_stay():
    before = set(sys.modules)
    peers.mamba_ssm_reference.__wrapped__()
    left = set(sys.modules) - before
    assert not [name for name in left if name.split(".")[0] in ("mamba_ssm", "selective_scan_cuda")]


def test_a_child_says_why_it_failed():
    assert "'nowhere' is neither a directory nor a packaged model" in children.in_child("one-pass", "nowhere", "cpu", 4)


def test_the_high_water_mark_sees_what_was_freed():
    before = children.peak_bytes(reset=True)
    with mmap.mmap(-1, 120_000_000) as held:  # memory that nothing freed before can be used for
        held[:: mmap.PAGESIZE] = bytes(len(range(0, len(held), mmap.PAGESIZE)))
    assert children.peak_bytes() - before > 100e6


def test_exponentials_in_registers_are_exponentials(triton_device):
    x = torch.linspace(-1, 1, 1500, device=triton_device)
    expected = x.double()
    for _ in range(exp_kernel.CHAIN):
        expected = torch.exp2(-expected)
    torch.testing.assert_close(exp_kernel.exponentials(x).double(), expected, rtol=1e-5, atol=0)


# -- figures to reach ------------------------------------------------------------------------------------------


def summary(target: targets.Target, ratio: float) -> Summary:
    size = target.d_model, target.batch, target.lengths[0]
    return Summary(target.race, target.side, *size, "ms", 7, 1, 1, 1, ratio, ratio, ratio)


@pytest.mark.parametrize("target", targets.TARGETS, ids=lambda t: t.text)
def test_figures_are_judged_at_their_bound(target):
    at_bound = {"times faster": target.bound, "times the bound": 1 / target.bound, "overhead": 1 + target.bound}
    better = 1.01 if target.kind != "overhead" else 0.999
    for factor, reached in ((better, True), (1 / better, False)):
        (verdict,) = [
            v
            for v in targets.judge([summary(target, at_bound[target.kind] * factor)], [], "cpu")
            if v.text == target.text
        ]
        assert verdict.reached is reached, verdict
    skip = Skip(target.race, target.side, target.d_model, target.batch, target.lengths[0], "too slow")
    (verdict,) = [v for v in targets.judge([], [skip], "cpu") if v.text == target.text]
    assert verdict.reached is None and verdict.measured == "too slow"


def test_figures_of_long_contexts():
    flat = [Summary("long", "", 128, 1, n, "us per token", 7, v, v, v, None, None, None)
            for n, v in ((1024, 10.0), (16384, 9.5), (262_144, 10.9))]  # fmt: skip
    peak = Summary("long", "one pass over 262,144 tokens", 128, 1, 0, "peak GB", 1, 3.0, 3.0, 3.0, None, None, None)
    assert [v.reached for v in targets.judge([*flat, peak], [], "cpu")[-2:]] == [True, True]
    bad = [*flat[:2], replace(flat[2], median=11.2), replace(peak, median=8.1)]
    assert [v.reached for v in targets.judge(bad, [], "cpu")[-2:]] == [False, False]
    assert [v.reached for v in targets.judge(flat[:2], [], "cpu")[-2:]] == [None, None]
    assert targets.judge(flat, [], "cuda") == []


def test_figures_of_races_that_were_not_run_are_not_shown():
    skip = Skip("generate", "other", 128, 1, 64, "")
    (missing,) = targets.judge([], [skip], "cpu")
    assert missing.measured == "run jambascope bench generate --d-model 128 --length 64"
    at_512 = Summary("generate", "transformers", 128, 1, 512, "ms", 7, 1, 1, 1, 6.0, 6.0, 6.0)
    (found,) = targets.judge([at_512], [], "cpu")
    assert found.reached and found.where == "batch 1, after a prompt of 512 tokens"


# -- the command -----------------------------------------------------------------------------------------------


def test_every_race_at_a_tiny_size(tmp_path, capsys):
    out, page = tmp_path / "bench.json", tmp_path / "bench.html"
    bench(race=list(RACES), d_model=[32], length=[16, 24], full=False, batch=2, repeats=1, budget=60, device="cpu",
          out=out, page=page)  # fmt: skip
    said = capsys.readouterr()
    assert "[20 of 20] long, d_model 32" in said.err
    found = json.loads(out.read_text())
    sides = {(r["race"], r["side"]) for r in found["rows"] if r["quantity"] in report.UNITS}
    expected = {
        "scan": [OURS, "transformers", "torch.exp"],
        "scan-backward": [OURS, "transformers"],
        "experts": [OURS, "transformers eager", "transformers grouped", "matrix products alone"],
        "prefill": [OURS, "transformers", "matrix products alone"],
        "cache": [OURS, "TransformerLens bridge", "transformers forward"],
        "generate": [OURS, "transformers"],
        "training-step": [OURS, "transformers"],
        "load": [OURS, "transformers"],
        "hooks": ["hook points removed", "no hooks", "one residual hook"],
        "sweep": [OURS, "hooks.patching (8 cells)", "TransformerLens (8 cells)", "matrix products alone"],
        "long": ["pure Mamba, 16 tokens", "pure Mamba, 24 tokens"],
    }
    assert {(race, side) for race, names in expected.items() for side in names} <= sides
    assert set(expected) == set(RACES)
    peaks = {(r["race"], r["side"]) for r in found["rows"] if r["quantity"] == "peak GB"}
    assert peaks == {("load", OURS), ("load", "transformers"), ("long", "jamba-micro, one pass over 24 tokens")}
    assert all(r["value"] >= 0 for r in found["rows"])
    assert {s["side"] for s in found["skips"]} <= {"mambapy", "mamba_ssm reference"}, found["skips"]
    assert all(s["reason"].startswith("not installed") for s in found["skips"])
    assert found["environment"]["transformers"] and len(found["figures"]) == len(targets.TARGETS) + 2
    assert any("spent outside its matrix products" in line for line in found["bounds"])
    assert all(f"{name}: {race.title}" in said.out for name, race in RACES.items())
    text = page.read_text()
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", text)  # nothing is fetched
    assert text.count('class="plotly-graph-div"') == len(RACES) + 2  # and two peaks of loading
    assert "Machine and versions" in text and "Figures to reach" in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(full=True, length=[64]), "leave out --length or --full"),
        (dict(d_model=[100]), "d_model=100 must be a multiple of 64"),
        (dict(out="missing/bench.json"), "create it first"),
        (dict(out="."), "it is a directory; name a file"),
        (dict(device="meta"), "device='meta' cannot be raced on; it must be cpu or cuda"),
        (dict(device="tpu"), "device='tpu' cannot be used here"),
        (dict(device="cuda:99"), "device='cuda:99' cannot be used here"),
    ],
    ids=lambda v: "" if isinstance(v, str) else " ".join(v),
)
def test_mistakes_are_told_before_anything_runs(options, words, tmp_path):
    if "out" in options:
        options = options | {"out": tmp_path / options["out"]}
    with pytest.raises(ConfigError, match=re.escape(words)):
        bench(**(dict(race=["scan"], d_model=None, length=None, full=False, batch=1, repeats=1, budget=1.0,
                      device="cpu", out=None, page=None) | options))  # fmt: skip


@pytest.mark.parametrize(("kind", "status"), [(KeyboardInterrupt, 130), (OSError, 1)], ids=["Ctrl-C", "unwritable"])
def test_what_was_measured_is_written_and_the_status_tells(kind, status, tmp_path, monkeypatch, capsys):
    def stop() -> None:
        raise kind

    def unwritable(*_) -> None:
        raise OSError("no space left")

    monkeypatch.setitem(RACES, "scan", Race("scan", "", lambda lab, at: {OURS: Side(lambda: 1)}))
    monkeypatch.setitem(RACES, "cache", Race("cache", "", lambda lab, at: {"peer": Side(stop)}))
    if kind is OSError:
        monkeypatch.setattr(report, "write_json", unwritable)
    out, page = tmp_path / "bench.json", tmp_path / "bench.html"
    with pytest.raises(typer.Exit) as e:
        bench(race=["scan", "cache"], d_model=[32], length=[16, 16], full=False, batch=1, repeats=1, budget=1.0,
              device="cpu", out=out, page=page)  # fmt: skip
    assert e.value.exit_code == status
    assert page.stat().st_size > 1000
    if kind is OSError:
        assert "bench.json could not be written: no space left" in capsys.readouterr().err
    else:
        assert len(json.loads(out.read_text())["rows"]) == 1


def test_a_failure_of_our_own_ends_with_status_1(monkeypatch):
    monkeypatch.setitem(RACES, "scan", Race("scan", "", lambda lab, at: {OURS: Side(lambda: 1 / 0)}))
    with pytest.raises(typer.Exit) as e:
        bench(race=["scan"], d_model=[32], length=[16], full=False, batch=1, repeats=1, budget=1.0, device="cpu",
              out=None, page=None)  # fmt: skip
    assert e.value.exit_code == 1


def test_the_clock_measures_milliseconds():
    clock = CpuClock()
    assert 18 < clock.time(lambda: __import__("time").sleep(0.02)) < 2000
    assert clock.free_bytes() > 1e6
