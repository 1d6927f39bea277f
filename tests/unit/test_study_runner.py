"""Studies are asked once, kept cell by cell, gone on with after any end, and never half there."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections import Counter
from hashlib import sha256
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from jambascope import HookedJamba, files
from jambascope.errors import CheckpointError, ConfigError, RunError
from jambascope.model import initialize
from jambascope.studies.runner import directory as directories
from jambascope.studies.runner import run as running
from jambascope.studies.runner.command import RUNS
from jambascope.studies.runner.directory import RunDirectory
from jambascope.studies.runner.spec import Spec, as_text, make_spec, parse_settings
from jambascope.studies.runner.study import NAMES, load, questions

SOURCE = str(Path(__file__).with_name("norm_study.py"))
COMMAND = [sys.executable, "-c", "from jambascope.cli import main; main()", "study"]


@pytest.fixture(scope="module")
def models(small_config, tmp_path_factory) -> list[str]:
    """Two checkpoint directories."""
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = HookedJamba(small_config)
        initialize(model, std=0.2)
        path = tmp_path_factory.mktemp(f"model-{seed}")
        model.save_pretrained(path)
        found.append(str(path))
    return found


@pytest.fixture
def ask(models, tmp_path):
    """Ask the study of norms, in ``tmp_path/runs``, of the first model and seeds 0 to 2 unless told otherwise."""

    def asked(**values) -> running.Run:
        workers = running.Workers(ray=values.pop("ray", None))
        spec = make_spec("norms", load(SOURCE).spec, {"models": models[:1], "seeds": (0, 1, 2)} | values)
        return running.run(SOURCE, spec, tmp_path / "runs", workers)

    return asked


def the_run(tmp_path) -> Path:
    (path,) = (tmp_path / "runs").glob("norms-*")
    return path


def measured(log) -> Counter:
    return Counter(line.split()[1] for line in Path(log).read_text().splitlines())


# -- a whole run ---------------------------------------------------------------------------------------------


def test_a_run_keeps_every_number_and_nothing_else(ask, models):
    run = ask(models=models)
    assert sorted(p.name for p in run.path.iterdir()) == sorted(
        [".lock", "environment.json", "report.html", "results.parquet", "spec.json", "tensors.safetensors"]
    )
    directory, study, spec, rows = running.read(run.path)
    assert len(rows) == 2 * 3 * 2 * 3 and set(rows.model) == set(models) and run.measured == run.cells == 6
    model = HookedJamba.from_pretrained(models[1], dtype="float32")
    found = study.measure(spec, {"model": models[1], "seed": 2}, model)
    own = rows[(rows.model == models[1]) & (rows.seed == 2)]
    assert own["value"].tolist() == [row["value"] for row in found.rows]
    assert torch.equal(directory.tensors()["5/norms"], found.tensors["norms"])
    record = json.loads((run.path / "spec.json").read_text())
    assert record["spec"]["seeds"] == [0, 1, 2] and len(record["models"][0]["identity"]) == 64


def test_the_report_tells_all_and_needs_nothing_else(ask, models):
    page = (ask(log="").path / "report.html").read_text()
    for part in (
        "How large is the residual stream", "The norm of the residual stream.", "None: a study for tests.",
        "--seeds 0,1,2", "&lt;b&gt;not markup", "sha256", "plotly-graph-div", "processor",
    ):  # fmt: skip
        assert part in page
    assert "<b>not markup" not in page and 'src="http' not in page


def test_the_command_of_a_run_asks_the_same(ask, models, tmp_path):
    run = ask(scale="0.5", sequences="4")
    words = running.command(SOURCE, run.spec).split()
    assert words[:4] == ["jambascope", "study", "run", SOURCE]
    given = parse_settings(words[words.index("--set") + 1 :: 2])
    given |= {"models": (words[words.index("--model") + 1],), "seeds": words[words.index("--seeds") + 1]}
    assert make_spec("norms", type(run.spec), given) == run.spec


def test_the_same_question_is_answered_from_what_is_there(ask, models, tmp_path):
    log = tmp_path / "log"
    first = ask(log=str(log))
    again = ask(log=str(log))
    assert again.path == first.path and again.measured == 0 and measured(log) == {"0": 1, "1": 1, "2": 1}
    others = [ask(log=str(log), **other) for other in ({"sequences": 4}, {"seeds": (0, 1)}, {"models": (models[1],)})]
    assert len({run.path for run in (first, *others)}) == 4


def test_an_address_is_of_weights_not_of_places(models):
    weights = {"recipe": "jamba", "identity": "a" * 64}
    spec = {"seeds": [0], "models": ["here"]}
    here = directories.address("norms", 1, spec, [weights | {"directory": "here"}])
    assert here == directories.address("norms", 1, spec | {"models": ["there"]}, [weights | {"directory": "there"}])
    assert here != directories.address("norms", 2, spec, [weights])
    assert here != directories.address("norms", 1, spec, [weights | {"identity": "b" * 64}])
    contents = [directories.address("norms", 1, spec, [weights], {path: "c" * 64}) for path in ("here.py", "there.py")]
    assert here != contents[0] == contents[1] != directories.address("norms", 1, spec, [weights], {"here.py": "d" * 64})
    assert here == directories.address("norms", 1, spec, [weights], {})
    assert here.startswith("norms-") and len(here) == len("norms-") + 10


def test_an_edited_text_is_another_question(ask, tmp_path):
    """By what is in it and not by its path; and a run that began with another is not gone on with."""
    text = tmp_path / "words.txt"
    text.write_text("one")
    first = ask(text=str(text))
    record = json.loads((first.path / "spec.json").read_text())
    assert record["contents"] == {SOURCE: sha256(Path(SOURCE).read_bytes()).hexdigest(),
                                  str(text): sha256(b"one").hexdigest()}  # fmt: skip
    assert ask(text=str(text)).measured == 0
    text.write_text("two")
    with pytest.raises(KeyboardInterrupt):
        ask(text=str(text), log=str(tmp_path / "log"), fault="interrupt")
    (half,) = (path for path in (tmp_path / "runs").glob("norms-*") if not (path / "results.parquet").exists())
    text.write_text("three")
    with pytest.raises(RunError, match="words.txt holds something else than when this run began; put that back"):
        running.resume(half)
    text.write_text("two")
    assert running.resume(half).measured == 2
    text.unlink()
    assert len(running.read(first.path)[3]) == 18 and running.resume(first.path).measured == 0
    with pytest.raises(ConfigError, match="words.txt' cannot be read .No such file"):
        ask(text=str(text))


def test_an_edited_study_is_another_question(models, tmp_path):
    """Without its version raised; what it answered before stays readable."""
    own = tmp_path / "own_study.py"
    own.write_text(Path(SOURCE).read_text())
    spec = make_spec("norms", load(str(own)).spec, {"models": models[:1]})
    first = running.run(str(own), spec, tmp_path / "runs")
    own.write_text(own.read_text().replace("value.item()}", "1 + value.item()}"))
    second = running.run(str(own), spec, tmp_path / "runs")
    assert second.path != first.path and second.measured == 1
    rows, others = (running.read(run.path)[3] for run in (first, second))
    assert (others["value"] - rows["value"]).between(0.999, 1.001).all()
    copied = tmp_path / "copied.py"
    copied.write_text(own.read_text())
    assert running.run(str(copied), spec, tmp_path / "runs").path == second.path


def test_a_run_of_before_contents_were_kept_is_gone_on_with(ask, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        ask(log=str(tmp_path / "log"), fault="interrupt")
    path = the_run(tmp_path)
    record = json.loads((path / "spec.json").read_text())
    del record["contents"]
    (path / "spec.json").write_text(json.dumps(record))
    assert running.resume(path).measured == 2 and running.rewrite_report(path).exists()


# -- ends ----------------------------------------------------------------------------------------------------


def test_killed_it_goes_on_with_no_cell_lost_or_done_twice(ask, models, tmp_path):
    log = tmp_path / "log"
    settings = ["--model", models[0], "--seeds", "0,1,2", "--set", f"log={log}", "--set", "fault=kill"]
    command = [*COMMAND, "run", SOURCE, *settings, "--runs", str(tmp_path / "runs")]
    assert subprocess.run(command, capture_output=True, timeout=120).returncode == -9
    path = the_run(tmp_path)
    assert measured(log) == {"0": 1} and not (path / "results.parquet").exists()
    (path / "cells" / "00001-half.parquet.tmp").write_bytes(b"PAR1")
    with pytest.raises(RunError, match="not finished; go on with: jambascope study resume"):
        running.rewrite_report(path)
    run = running.resume(path)
    assert measured(log) == {"0": 1, "1": 1, "2": 1} and run.measured == 2
    rows = running.read(path)[3]
    shutil.rmtree(tmp_path / "runs")
    whole = ask(log=str(log), fault="kill")  # it happens once: this time it runs through
    assert whole.measured == 3 and whole.path == path and running.read(path)[3].equals(rows)


@pytest.mark.parametrize("fault, error", [("interrupt", KeyboardInterrupt), ("raise", ZeroDivisionError)])
def test_an_end_says_what_is_kept_and_how_to_go_on(ask, tmp_path, fault, error):
    with pytest.raises(error) as raised:
        ask(log=str(tmp_path / "log"), fault=fault)
    notes = " ".join(raised.value.__notes__)
    path = the_run(tmp_path)
    assert f"1 of 3 cells are kept; go on with: jambascope study resume {path}" in notes
    assert "seed 1" in notes or fault == "interrupt"
    assert running.resume(path).measured == 2


def test_a_number_that_is_none_names_its_cell(ask, tmp_path):
    with pytest.raises(RunError, match="norms gave value=nan.*model .*, seed 1: measure norm, place first, sample 1"):
        ask(log=str(tmp_path / "log"), fault="nan")
    assert RunDirectory.open(the_run(tmp_path)).record["study"] == "norms"
    assert len(list((the_run(tmp_path) / "cells").glob("*.parquet"))) == 1


def test_a_full_disk_is_an_error_of_the_disk(tmp_path, monkeypatch):
    """safetensors has errors of its own, as its 0.8 raises where the disk is full."""

    def full(*arguments):
        raise safetensors.SafetensorError('IoError(Os { code: 28, message: "No space left on device" })')

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(5)})


@pytest.mark.parametrize(
    ("study", "setting"), [("induction_heads", "k"), ("activation_patching", "directions"), ("stability", "rates")]
)
@pytest.mark.parametrize("value", ["", "{0},{0}"], ids=["none", "twice"])
def test_what_is_asked_several_times_is_given_each_once(study, setting, value):
    value = value.format({"k": "1", "directions": "noise", "rates": "0.1"}[setting])
    with pytest.raises(ConfigError, match=f"{setting}='{value}': give at least one, each once"):
        make_spec(study, load(study).spec, {setting: value})


@pytest.mark.parametrize("write", ["write_tensors", "write_table"])
@pytest.mark.parametrize("at", [1, 3], ids=["in a cell", "at the end"])
def test_a_full_disk_loses_nothing(ask, tmp_path, monkeypatch, write, at):
    """The second cell's file, or that of all results, does not fit."""
    real, count = getattr(files, write), iter(range(100))

    def full(path, *arguments):
        if next(count) == at:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, *arguments)

    monkeypatch.setattr(directories, write, full)
    with pytest.raises(RunError, match="No space left on device; make room"):
        ask(log=str(tmp_path / "log"))
    monkeypatch.undo()
    run = running.resume(the_run(tmp_path))
    again = {"1": 2} if at == 1 else {}  # the cell that could not be kept
    assert measured(tmp_path / "log") == {"0": 1, "1": 1, "2": 1} | again
    assert run.measured == (2 if at == 1 else 0) and len(running.read(run.path)[3]) == 18


def test_a_directory_that_cannot_be_written_is_said_before_the_work(ask, tmp_path, monkeypatch):
    def denied(*arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system", str(tmp_path))

    monkeypatch.setattr(directories.tempfile, "mkdtemp", denied)
    with pytest.raises(RunError, match="Read-only file system"):
        ask(log=str(tmp_path / "log"))
    assert not (tmp_path / "log").exists()


def test_ended_between_results_and_report_it_only_reports(ask, tmp_path, monkeypatch):
    monkeypatch.setattr(running.report, "page_of", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ask(log=str(tmp_path / "log"))
    monkeypatch.undo()
    path = the_run(tmp_path)
    assert (path / "cells").exists()
    assert running.resume(path).measured == 0
    assert (path / "report.html").exists() and not (path / "cells").exists()


def test_two_processes_do_not_work_on_one_run(ask, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        ask(log=str(tmp_path / "log"), fault="interrupt")
    path = the_run(tmp_path)
    with RunDirectory.open(path).lock():
        with pytest.raises(RunError, match="in use by process"):
            running.resume(path)
        with pytest.raises(RunError, match="in use by process"):
            running.rewrite_report(path)
    assert running.resume(path).measured == 2
    with RunDirectory.open(path).lock():  # a finished one is only read
        assert running.resume(path).measured == 0


# -- damage --------------------------------------------------------------------------------------------------


def _remove(name):
    return lambda path: (path / name).unlink()


def _cut(name):
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:-40])


def _flip(name):
    def damage(path):
        content = bytearray((path / name).read_bytes())
        content[60] ^= 0xFF
        (path / name).write_bytes(content)

    return damage


def _say(key, value):
    def damage(path):
        record = json.loads((path / "spec.json").read_text())
        (path / "spec.json").write_text(json.dumps(record | {key: value}))

    return damage


@pytest.mark.parametrize(
    "damage, message",
    [
        (_remove("spec.json"), "has no spec.json, so it is no run, or half deleted"),
        (_cut("spec.json"), "spec.json cannot be read"),
        (_remove("tensors.safetensors"), "has no tensors.safetensors, though its results have tensors"),
        (_remove("environment.json"), "environment.json cannot be read"),
        (_cut("results.parquet"), "results.parquet is damaged .*run it anew with: jambascope study run"),
        (_flip("results.parquet"), "results.parquet is damaged"),
        (_say("version", 0), "is of version=0 of norms, and this is version 1"),
        (_say("format", 9), "is a run of format=9, and this jambascope reads 1"),
        (_say("spec", {"layers": 3}), "spec.json does not fit norms"),
        (_remove("results.parquet"), "not finished"),
    ],
    ids=["no spec", "cut spec", "no tensors", "no environment", "cut results", "flipped results", "other version",
         "other format", "unknown setting", "no results"],
)  # fmt: skip
def test_a_damaged_run_says_so(ask, damage, message):
    path = ask().path
    damage(path)
    with pytest.raises(RunError, match=message):
        running.rewrite_report(path)


@pytest.mark.parametrize("damage", [_cut, _flip])
@pytest.mark.parametrize("suffix", ["parquet", "safetensors"])
def test_a_damaged_cell_is_named_with_its_remedy(ask, tmp_path, damage, suffix):
    with pytest.raises(KeyboardInterrupt):
        ask(log=str(tmp_path / "log"), fault="interrupt")
    path = the_run(tmp_path)
    (cell,) = (path / "cells").glob(f"*.{suffix}")
    damage(cell.name)(cell.parent)
    with pytest.raises(RunError, match="is damaged.*to measure that cell anew") as raised:
        running.resume(path)
    assert str(next((path / "cells").glob("*.parquet"))) in str(raised.value)
    next((path / "cells").glob("*.parquet")).unlink()
    assert running.resume(path).measured == 3


def test_other_weights_under_a_run_are_noticed(ask, models, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(models[0], moved)
    with pytest.raises(KeyboardInterrupt):
        ask(models=[str(moved)], log=str(tmp_path / "log"), fault="interrupt")
    shutil.copy(Path(models[1]) / "model.safetensors", moved)
    with pytest.raises(RunError, match="holds other weights"):
        running.resume(the_run(tmp_path))


# -- asking --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, message",
    [
        ({"sequence": "3"}, "'sequence' is no setting of norms; did you mean 'sequences'"),
        ({"sequences": "many"}, "sequences='many': input should be a valid integer.*default 3: Of a seed"),
        ({"sequences": "1"}, "sequences='1': input should be greater than or equal to 2"),
        ({"seeds": "0,0"}, "seeds='0,0': give at least one, each once"),
        ({"seeds": "-1"}, "seeds are whole numbers from 0 on"),
        ({"seeds": ""}, "give at least one"),
        ({"scale": "nan"}, "scale='nan': input should be a finite number"),
        ({"layer": "9"}, "norms of .*: layer=9 must be below 4"),
    ],
)
def test_what_cannot_be_asked_is_said_before_the_work(ask, tmp_path, values, message):
    with pytest.raises(ConfigError, match=message):
        ask(log=str(tmp_path / "log"), **values)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("settings, message", [(["k"], "KEY=VALUE"), (["k=1", "k=2"], "--set k is given twice")])
def test_settings_are_keys_and_values(settings, message):
    with pytest.raises(ConfigError, match=message):
        parse_settings(settings)


def test_a_value_survives_its_text():
    assert parse_settings(["a-b = x=y"]) == {"a_b": "x=y"}
    spec = make_spec("any", Spec, {"models": "a, b", "seeds": "1,2"})
    assert spec.models == ("a", "b") and spec.seeds == (1, 2) and as_text(spec.seeds) == "1,2"


def test_models_are_found_and_told_apart(ask, models, tmp_path):
    with pytest.raises(CheckpointError, match="neither a directory nor a packaged model"):
        ask(models=["nothing"])
    shutil.copytree(models[0], tmp_path / "copy")
    with pytest.raises(ConfigError, match="are the same weights; leave one out"):
        ask(models=[models[0], str(tmp_path / "copy")])


def test_studies_are_listed_without_loading_anything_heavy():
    assert [name for name, _ in questions()] == list(NAMES)
    code = (
        "import sys; from jambascope.studies.runner.study import questions as q; q(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    for name, question in questions():
        assert load(name).question == question and load(name).name == name
    with pytest.raises(ConfigError, match="did you mean 'label_heads'"):
        load("label_head")
    assert RUNS == Path("runs/studies")
