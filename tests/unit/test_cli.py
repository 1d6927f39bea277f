"""The command line: what it prints and with which status it ends, some of it in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from jambascope import HookedJamba
from jambascope.cli import app, main
from jambascope.hf_format import config_to_hf
from jambascope.zoo.recipes import RECIPES

COMMAND = [sys.executable, "-c", "from jambascope.cli import main; main()"]


def run_apart(*arguments):
    """As a person does, in a process of its own."""
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=120)


@pytest.fixture
def run(capsys, monkeypatch):
    """The same in this process, which has imported what the command needs."""

    def run_here(*arguments):
        monkeypatch.setattr(sys, "argv", ["jambascope", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return SimpleNamespace(returncode=ended.value.code, **capsys.readouterr()._asdict())

    return run_here


@pytest.fixture(scope="module")
def directory(small_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    small_model.save_pretrained(path)
    return path


def test_help_lists_every_command_with_its_purpose(run):
    result = run("--help")
    assert result.returncode == 0
    for command in ("dashboard", "inspect", "hooks", "generate", "zoo", "bench", "study", "verify"):
        assert f"  {command} " in result.out
    for command in ("dashboard", "inspect", "hooks", "generate", "bench", "zoo", "study", "verify"):
        assert "Usage:" in run(command, "--help").out


def test_importing_and_asking_for_help_load_nothing_heavy():
    code = """
import sys
try:
    sys.argv = ["jambascope", "--help"]
    from jambascope.cli import main
    main()
except SystemExit:
    pass
import jambascope
heavy = {"torch", "numba", "transformers", "transformer_lens", "streamlit", "plotly", "pandas", "pydantic", "ray"}
heavy &= set(sys.modules)
assert not heavy, heavy
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0


def test_inspect_counts_a_directory(run, directory):
    result = run("inspect", str(directory), "--context", "1000", "--dtype", "float32")
    assert result.returncode == 0, result.err
    for words in ("attention", "mamba", "moe 2 of 5", "dense", "parameters, active", "names, shapes and types fit"):
        assert words in result.out
    # 1 attention layer, keys and values, 2 heads of 8 float32 numbers
    assert "128 B" in result.out and "KV cache at 1,000 tokens" in result.out and "125 KiB" in result.out


def test_inspect_needs_only_a_configuration(run, directory, tmp_path):
    fields = json.loads((directory / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields))
    result = run("inspect", str(tmp_path))
    assert result.returncode == 0 and "counted from config.json" in result.out


def test_generate_continues_ids(directory, small_model):
    result = run_apart("generate", str(directory), "5 17 3", "--max-new-tokens", "6")
    assert result.returncode == 0, result.stderr
    expected = small_model.generate(torch.tensor([[5, 17, 3]]), 6)[0].tolist()
    assert [int(word) for word in result.stdout.split()] == expected
    assert [line for line in result.stderr.splitlines() if "compiling the CPU kernel" not in line] == []
    refused = run_apart("generate", str(directory), "hello")
    assert refused.returncode == 1 and refused.stderr.startswith("jambascope: ") and refused.stderr.count("\n") == 1


def test_generate_with_experts_in_int8(run, directory):
    result = run("generate", str(directory), "5 17 3", "--max-new-tokens", "6", "--quantize", "experts_int8")
    assert result.returncode == 0, result.err
    quantized = HookedJamba.from_pretrained(directory, quantize="experts_int8")
    assert [int(word) for word in result.out.split()] == quantized.generate(torch.tensor([[5, 17, 3]]), 6)[0].tolist()
    assert "weights with ExpertsInt8" in run("inspect", str(directory)).out


def test_zoo_lists_what_ships(run):
    result = run("zoo")
    assert result.returncode == 0 and "jamba-micro" in result.out


def test_zoo_lists_the_whole_family_in_80_columns(tmp_path, monkeypatch):
    for name, recipe in RECIPES.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config_to_hf(recipe.config, torch.bfloat16)))
    monkeypatch.setattr("jambascope.zoo.packaged_models", lambda: {name: tmp_path / name for name in RECIPES})
    monkeypatch.setenv("COLUMNS", "80")
    result = CliRunner().invoke(app, ["zoo"])
    assert result.exit_code == 0, result.output
    table = result.output[: result.output.index("cards:")].splitlines()
    assert max(map(len, table)) <= 80 and not any("…" in line for line in table)
    assert any(line.split()[:3] == ["attention-micro", "all", "1,"] for line in table)
    assert any("Mamba-2 for Mamba" in line for line in table)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["inspect", "nowhere"], 1, "'nowhere' is neither a directory nor a packaged model"),
        (["generate", "MODEL", "hello"], 1, "token ids such as '5 17 3'"),
        (["generate", "MODEL", "5 99"], 1, "token id 99 is outside the vocabulary"),
        (["generate", "MODEL", ""], 1, "is empty"),
        (["generate", "MODEL", "5", "--dtype", "int4"], 1, "dtype='int4' must be one of"),
        (["generate", "MODEL", "5", "--quantize", "int4"], 1, "quantize='int4' is not known; use 'experts_int8'"),
        (["generate", "MODEL", "5", "--device", "cuda:77"], 1, "device='cuda:77' cannot be used here"),
        (["generate", "MODEL", "5", "--top-p", "7"], 1, "top_p=7.0"),
        (["generate", "MODEL"], 2, "Missing argument"),
        (["inspect", "MODEL", "--context", "0"], 2, "Invalid value for '--context'"),
        (["inspekt"], 2, "No such command 'inspekt'"),
        (["dashboard", "nowhere"], 1, "'nowhere' is neither a directory nor a packaged model"),
        (["bench", "sleep"], 1, "race='sleep' must be one of"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_errors_are_one_line(run, arguments, status, words, directory):
    result = run(*[str(directory) if a == "MODEL" else a for a in arguments])
    assert result.returncode == status
    assert words in result.err
    assert result.err.startswith("jambascope: ") and result.err.count("\n") == 1
    assert result.out == ""


def test_hooks_lists_every_point(run, directory, small_model, tmp_path):
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())  # no weights are needed
    result = run("hooks", str(tmp_path), "--length", "100", "--batch", "2", "--dtype", "float32")
    assert result.returncode == 0, result.err
    assert max(map(len, result.out.splitlines())) <= 100
    lines = {words[0]: words for line in result.out.splitlines() if (words := line.split())}
    points = {name.split(".", 2)[2] if name.startswith("blocks") else name for name in small_model.hook_rows}
    assert points <= set(lines)
    assert lines["hook_attn_out"][1:9] == ["B", "T", "D", "2", "100", "32", "float32", "25"]
    assert "Mamba layers: blocks.{0, 2, 3}" in result.out and "Attention layers: blocks.{1}" in result.out
    assert f"{len(small_model.hook_rows)} points" in result.out


def test_hooks_of_one_kind_in_markdown(run, directory):
    result = run("hooks", str(directory), "--kind", "moe", "--markdown")
    assert result.returncode == 0, result.err
    assert "| `mlp.router.hook_expert_indices` | B T S | 1 512 2 | int64 | 8 KiB |" in result.out
    assert "hook_resid_pre" not in result.out
    result = run("hooks", str(directory), "--kind", "mamba2")
    assert result.returncode == 1 and "kind='mamba2' is not in this model" in result.err
