"""What a sweep gives back when it fails, is stopped or is saved; and the metrics against the logits themselves."""

from __future__ import annotations

import json
import os

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
import xarray as xr

from jambascope import HookedJamba
from jambascope.errors import InputError
from jambascope.hooks.sweep import (
    Effects,
    KnockOuts,
    Node,
    PatchSweep,
    SweepError,
    engine,
    kl_divergence,
    knock_out_sweep,
    label_mass,
    log_probability,
    logit_difference,
    patch_sweep,
    path_patch,
    probability,
    rank,
    screen,
)

LENGTH = 5
DIFFERENCE = logit_difference(5, 6)
CLEAN, CORRUPTED = torch.randint(3, 29, (2, 2, LENGTH), generator=torch.Generator().manual_seed(3))
SWEEPS = {
    "patches": lambda model, metric, **options: patch_sweep(
        model, CLEAN, CORRUPTED, metric, ["resid_pre", "mlp_out"], **options
    ),
    "paths": lambda model, metric, **options: path_patch(
        model, CLEAN, CORRUPTED, metric, "mixer_out", ["q", "logits"], **options
    ),
    "knock-outs": lambda model, metric, **options: knock_out_sweep(
        model, CLEAN, metric, [(4, 0), (3, 3)], layers=[0, 1], **options
    ),
}


def raises(logits: torch.Tensor) -> torch.Tensor:
    return {}["no such key"]


def known(result) -> int:
    return sum(int(values.notnull().sum()) for values in result.values.values())


@pytest.fixture(params=SWEEPS)
def sweep(request):
    return SWEEPS[request.param]


FAILURES = {
    "raises": (raises, "failing raised KeyError: .no such key.", KeyError),
    "another shape": (lambda logits: logits[:, 0, 5:7], r"failing gave \(\d, 2\) for \d rows", InputError),
    "no tensor": (lambda logits: 3.0, "failing gave float for", InputError),
    "nan": (lambda logits: logits[:, 0, 5] * float("nan"), "failing is nan at", type(None)),
}


@pytest.mark.parametrize(("failure", "message", "cause"), FAILURES.values(), ids=list(FAILURES))
def test_a_metric_that_fails_late_loses_nothing(failure, message, cause, sweep, model_of_kind, monkeypatch):
    monkeypatch.setitem(engine.TOKENS_AT_ONCE, "cpu", 6)
    model, calls = model_of_kind("hybrid"), []

    def failing(logits: torch.Tensor) -> torch.Tensor:
        calls.append(len(logits))
        return failure(logits) if len(calls) == 6 else logits[:, 0, 5] - logits[:, 0, 6]

    with pytest.raises(SweepError, match=message) as error:
        sweep(model, failing, progress=False)
    found, whole = error.value.result, sweep(model, DIFFERENCE, progress=False)
    assert isinstance(error.value.__cause__, cause) and not found.complete
    assert 0 < known(found) < known(whole)
    for name, values in found.values.items():
        there = values.notnull().values
        np.testing.assert_allclose(values.values[there], whole.values[name].values[there], rtol=1e-9)


def test_a_metric_that_fails_at_once_says_so_with_its_cause(sweep, model_of_kind):
    with pytest.raises(InputError, match="raises raised KeyError") as error:
        sweep(model_of_kind("hybrid"), raises, progress=False)
    assert not isinstance(error.value, SweepError) and isinstance(error.value.__cause__, KeyError)


def test_another_failure_keeps_what_is_done_too(sweep, model_of_kind, monkeypatch):
    monkeypatch.setitem(engine.TOKENS_AT_ONCE, "cpu", 6)
    calls = []

    def progress(share, result):
        calls.append(share)
        if len(calls) == 4:
            raise MemoryError("no more")

    with pytest.raises(SweepError, match="MemoryError: no more; .result has what is done") as error:
        sweep(model_of_kind("hybrid"), DIFFERENCE, progress=progress)
    assert known(error.value.result) and isinstance(error.value.__cause__, MemoryError)


@pytest.mark.parametrize("at", [3, 6], ids=["before a cell is done", "later"])
def test_a_screen_that_fails_keeps_its_estimates(at, model_of_kind, monkeypatch):
    monkeypatch.setitem(engine.TOKENS_AT_ONCE, "cpu", 6)
    model, calls = model_of_kind("hybrid"), []
    whole = screen(model, CLEAN, CORRUPTED, DIFFERENCE, "resid_pre", top=12, progress=False)

    def failing(logits: torch.Tensor) -> torch.Tensor:
        calls.append(len(logits))
        return raises(logits) if len(calls) == 4 + at else logits[:, 0, 5] - logits[:, 0, 6]

    with pytest.raises(SweepError, match="failing raised KeyError") as error:
        screen(model, CLEAN, CORRUPTED, failing, "resid_pre", top=12, progress=False)
    xr.testing.assert_allclose(error.value.result.estimates["resid_pre"], whole.estimates["resid_pre"])
    assert (known(error.value.result.true) > 0) == (at == 6)


def test_progress_rises_to_one_as_results_fill_in(sweep, model_of_kind, monkeypatch):
    monkeypatch.setitem(engine.TOKENS_AT_ONCE, "cpu", 6)
    model, seen = model_of_kind("hybrid"), []
    found = sweep(model, DIFFERENCE, progress=lambda share, result: seen.append((share, known(result))))
    shares, cells = zip(*seen, strict=True)
    assert shares[0] == 0 and shares[-1] == 1 and list(shares) == sorted(shares) and len(set(shares)) > 3
    assert list(cells) == sorted(cells) and len(set(cells)) > 3 and cells[-1] == known(found) and found.complete
    stopped = sweep(model, DIFFERENCE, progress=lambda share, _: share < shares[len(shares) // 2])
    assert 0 < known(stopped) < known(found) and not stopped.complete
    assert sweep(model, DIFFERENCE, progress=lambda share, _: share < 1).complete  # at the end there is nothing to stop


@pytest.mark.parametrize("options", [{}, {"positions": [(0, 1), 3], "direction": "noise"}], ids=["all", "some"])
def test_what_is_saved_is_loaded(options, model_of_kind, monkeypatch, tmp_path):
    monkeypatch.setitem(engine.TOKENS_AT_ONCE, "cpu", 40)
    nodes = ["z", "resid_pre", Node("y", channels=20), Node("z", channels=3)]
    found = patch_sweep(
        model_of_kind("hybrid"), CLEAN, CORRUPTED, [DIFFERENCE, rank(5)], nodes, progress=lambda share, _: share < 0.8,
        **options,
    )  # fmt: skip
    found.save(tmp_path / "cells.parquet")
    loaded = PatchSweep.load(tmp_path / "cells.parquet")
    assert list(loaded.values) == list(found.values) and not loaded.complete and loaded.direction == found.direction
    for name, values in found.values.items():
        xr.testing.assert_identical(loaded.values[name], values)
    xr.testing.assert_identical(loaded.clean, found.clean)
    xr.testing.assert_identical(loaded.corrupted, found.corrupted)
    table = loaded.table()
    assert set(table["direction"]) == {found.direction} and not table["complete"].any()
    pd.testing.assert_frame_equal(table, found.table())


def test_what_was_saved_before_files_said_their_kind_is_loaded(model_of_kind, tmp_path):
    found = patch_sweep(model_of_kind("hybrid"), CLEAN, CORRUPTED, DIFFERENCE, ["z", "mlp_out"], progress=False)
    found.save(tmp_path / "new.parquet")
    table = pq.read_table(tmp_path / "new.parquet")
    about = json.loads(table.schema.metadata[b"jambascope"])
    del about["kind"], about["beside"]
    metadata = {**table.schema.metadata, b"jambascope": json.dumps(about)}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "old.parquet")
    for name, values in PatchSweep.load(tmp_path / "old.parquet").values.items():
        xr.testing.assert_identical(values, found.values[name])
    with pytest.raises(InputError, match="has PatchSweep; open it with PatchSweep.load"):
        Effects.load(tmp_path / "old.parquet")


@pytest.mark.parametrize("kind", ["paths", "knock-outs"])
def test_paths_and_knock_outs_are_loaded_too(kind, model_of_kind, tmp_path):
    model, path = model_of_kind("hybrid"), tmp_path / "found.parquet"
    if kind == "paths":
        found, load = path_patch(model, CLEAN, CORRUPTED, DIFFERENCE, progress=False), Effects.load
    else:
        found, load = knock_out_sweep(model, CLEAN, [DIFFERENCE, rank(5)], progress=False), KnockOuts.load
    found.save(path)
    loaded = load(path)
    assert list(loaded.values) == list(found.values) and loaded.complete and loaded.direction == found.direction
    for name, values in found.values.items():
        xr.testing.assert_identical(loaded.values[name], values)
    for name in ("clean", "corrupted"):
        xr.testing.assert_identical(getattr(loaded, name), getattr(found, name))
    pd.testing.assert_frame_equal(loaded.table(), found.table())
    with pytest.raises(InputError, match=f"has {type(found).__name__}; open it with {type(found).__name__}.load"):
        PatchSweep.load(path)
    patch_sweep(model, CLEAN, CORRUPTED, DIFFERENCE, ["z", "mlp_out"], progress=False).save(path)
    with pytest.raises(InputError, match="has PatchSweep; open it with PatchSweep.load"):
        load(path)


def test_heads_and_their_channels_are_two_axes(model_of_kind):
    model = model_of_kind("hybrid")
    found = patch_sweep(model, CLEAN, CORRUPTED, DIFFERENCE, Node("z", channels=3), positions=[2, 4], progress=False)
    (values,) = found.values.values()
    heads, groups = model.config.n_heads, -(-model.config.d_head // 3)
    assert values.dims == ("metric", "pair", "layer", "position", "head", "channels")
    assert values.shape[2:] == (4, 2, heads, groups)
    table = found.table()
    assert set(table["of"]) == {"head, channels"} and set(table["group"]) == set(range(groups))
    row = table.iloc[7]
    cell = values.sel(layer=row["layer"], position=row["position"], head=row["unit"], channels=row["group"])
    assert float(cell[0, 0]) == row["value"]


def test_what_was_never_measured_is_saved_too(model_of_kind, tmp_path):
    found = patch_sweep(model_of_kind("hybrid"), CLEAN, CORRUPTED, DIFFERENCE, progress=lambda *_: False)
    found.save(tmp_path / "cells.parquet")
    assert known(PatchSweep.load(tmp_path / "cells.parquet")) == known(found)


@pytest.mark.parametrize(
    "where", ["no/such/folder/cells.parquet", "file/cells.parquet", "folder", "locked/cells.parquet"]
)
def test_where_nothing_can_be_written_it_says_so(where, sweep, model_of_kind, tmp_path):
    found = sweep(model_of_kind("hybrid"), DIFFERENCE, progress=lambda *_: False)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "locked").mkdir(mode=0o500)
    if where.startswith("locked") and os.access(tmp_path / "locked", os.W_OK):
        pytest.skip("this user may write anywhere")
    with pytest.raises(InputError, match="path='.*' cannot be written .*; give a file in a folder that exists"):
        found.save(tmp_path / where)
    assert not list(tmp_path.glob("**/*.tmp"))


@pytest.mark.parametrize(
    "content", [None, b"", b"PAR1 and no more", "table"], ids=["none", "empty", "damaged", "other"]
)
def test_what_is_no_saved_sweep_is_refused(content, tmp_path):
    path = tmp_path / "cells.parquet"
    if content == "table":
        pd.DataFrame({"node": ["z"]}).to_parquet(path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match="is no sweep that PatchSweep.save wrote"):
        PatchSweep.load(path)


def test_the_table_of_knock_outs_has_its_edges(model_of_kind, tmp_path):
    found = knock_out_sweep(model_of_kind("hybrid"), CLEAN, DIFFERENCE, [(4, 0), (-2, 3)], progress=False)
    table = found.table()
    assert "effect" not in table and set(table["mixer"]) == {"attention", "mamba"} and table["complete"].all()
    assert table[["query", "key"]].drop_duplicates().values.tolist() == [[4, 0], [3, 3]]
    np.testing.assert_allclose(table["change"], table["value"] - table["clean"])
    assert len(table) == 2 * 2 * (3 + 4) and table["change"].notna().all()  # pairs, edges; layers, heads
    found.save(tmp_path / "edges.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "edges.parquet"), table, check_dtype=False)


def direct(logits: torch.Tensor, pair: int, clean: torch.Tensor, own, wrong, labels) -> dict[str, float]:
    """Metrics of one position of a row from its logits [V], as their definitions say."""
    z, reference = logits.double().numpy(), clean.double().numpy()
    p, theirs = (np.exp(values) / np.exp(values).sum() for values in (z, reference))
    return {
        "probability": p[own[pair]],
        "log_probability": np.log(p[own[pair]]),
        "rank": sum(value > z[own[pair]] for value in z),
        "label_mass": sum(p[label] for label in labels[pair]),
        "kl_divergence": sum(a * np.log(a / b) for a, b in zip(theirs, p, strict=True)),
        "logit_difference": z[own[pair]] - z[wrong],
    }


def check_metrics(model, own, wrong, labels, as_given, position, direction, rel):
    """Of both runs and of a patched one, with tokens as they are given, against ids."""
    metrics = [f(as_given(own), position=position) for f in (probability, log_probability, rank)]
    metrics += [label_mass(as_given(labels), position), kl_divergence(position)]
    metrics.append(logit_difference(as_given(own), as_given(wrong), position))
    found = patch_sweep(
        model, CLEAN, CORRUPTED, metrics, layers=[2], positions=[1], direction=direction, progress=False
    )
    base, source = (CORRUPTED, CLEAN) if direction == "denoise" else (CLEAN, CORRUPTED)
    with torch.no_grad():
        clean, corrupted = model(CLEAN), model(CORRUPTED)
        stream = model.run_with_cache(source)[1]["blocks.2.hook_resid_pre"][:, 1]

        def put(value, hook):
            value[:, 1] = stream
            return value

        patched = model.run_with_hooks(base, fwd_hooks=[("blocks.2.hook_resid_pre", put)])
    values = found.values["resid_pre"].sel(layer=2, position=1)
    for measured, logits in ((found.clean, clean), (found.corrupted, corrupted), (values, patched)):
        for pair in range(2):
            expected = direct(logits[pair, position], pair, clean[pair, position], own, wrong, labels)
            for name, value in expected.items():
                assert measured.sel(metric=name, pair=pair).item() == pytest.approx(value, rel=rel, abs=rel), name


@pytest.mark.parametrize("position", [-1, 2])
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_metrics_are_what_the_logits_say(direction, position, model_of_kind):
    lists = [[3, 9], [4, 8]]
    check_metrics(model_of_kind("hybrid"), [4, 7], 6, lists, lambda ids: ids, position, direction, 1e-9)


def test_metrics_of_words_are_those_of_their_tokens():
    model = HookedJamba.from_pretrained("jamba-micro")
    own, wrong, lists = [40, 77], 60, [[33, 39, 40], [45, 48, 77]]

    def words(ids):
        return [words(i) for i in ids] if isinstance(ids, list) else model.tokenizer.decode([ids])

    assert [model.to_single_token(words(i)) for i in (*own, wrong, *sum(lists, []))] == [*own, wrong, *sum(lists, [])]
    check_metrics(model, own, wrong, lists, words, -1, "denoise", 1e-4)
