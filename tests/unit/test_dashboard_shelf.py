"""Models kept open within a bound, shared between threads; directories that are remembered."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from jambascope import HookedJamba, JambaConfig
from jambascope.dashboards import models, session
from jambascope.dashboards.models import Shelf, bytes_of, checkpoint_of
from jambascope.errors import CheckpointError, ConfigError
from jambascope.zoo import packaged_models

CONFIG = JambaConfig(
    mixers=("attention",), feed_forwards=("dense",), d_model=16, d_vocab=20, d_mlp=8, n_heads=2, n_key_value_heads=1,
    d_head=8,
)  # fmt: skip


@pytest.fixture
def checkpoints(tmp_path) -> list[models.Checkpoint]:
    """Three models of one size."""
    for seed in range(3):
        torch.manual_seed(seed)
        HookedJamba(CONFIG).save_pretrained(tmp_path / f"model-{seed}")
    return [checkpoint_of(str(tmp_path / f"model-{seed}"), None, None) for seed in range(3)]


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("JAMBASCOPE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def open_directories(shelf: Shelf) -> list[str]:
    return [Path(checkpoint.directory).name for checkpoint in shelf.sizes()]


def shelf_for(count: float, checkpoints: list[models.Checkpoint]) -> Shelf:
    return Shelf(int(count * bytes_of(checkpoints[0])), free=lambda device: 1 << 40)


# -- what is kept ----------------------------------------------------------------------------------------------


def test_a_model_is_loaded_once_and_the_longest_unused_makes_room(checkpoints):
    shelf, (a, b, c) = shelf_for(2.5, checkpoints), checkpoints
    first = shelf.get(a)
    shelf.get(b)
    assert shelf.get(a) is first and open_directories(shelf) == ["model-1", "model-0"]
    shelf.get(c)
    assert open_directories(shelf) == ["model-0", "model-2"] and not shelf.holds(b)
    assert shelf.get(a) is first
    assert sum(shelf.sizes().values()) <= shelf.most_bytes


def test_what_does_not_fit_is_refused_before_it_is_loaded(checkpoints, monkeypatch):
    monkeypatch.setattr(HookedJamba, "from_pretrained", lambda *a, **k: pytest.fail("it was loaded"))
    with pytest.raises(ConfigError, match="keeps at most .*larger --model-memory"):
        shelf_for(0.5, checkpoints).get(checkpoints[0])
    nothing_free = Shelf(1 << 40, free=lambda device: bytes_of(checkpoints[0]))
    with pytest.raises(ConfigError, match="are free; close other programs"):
        nothing_free.get(checkpoints[0])


def test_a_refusal_closes_nothing(checkpoints):
    shelf = shelf_for(1.5, checkpoints)
    kept = shelf.get(checkpoints[0])
    shelf.most_bytes //= 2
    with pytest.raises(ConfigError, match="larger --model-memory"):
        shelf.get(checkpoints[1])
    assert shelf.get(checkpoints[0]) is kept


def test_closing_others_counts_as_room(checkpoints):
    a, b, _ = checkpoints
    shelf = Shelf(1 << 40, free=lambda device: 1 << (13 if shelf.holds(a) else 40))
    shelf.get(a)
    shelf.get(b)
    assert open_directories(shelf) == ["model-1"]


def test_files_that_changed_are_loaded_anew(checkpoints):
    shelf, (a, b, _) = shelf_for(2.5, checkpoints), checkpoints
    old = shelf.get(a)
    shelf.get(b)
    torch.manual_seed(9)
    HookedJamba(CONFIG).save_pretrained(a.directory)
    os.utime(Path(a.directory) / "config.json", ns=(a.modified + 10**9,) * 2)
    changed = checkpoint_of(a.directory, None, None)
    assert changed != a
    new = shelf.get(changed)
    assert new is not old and not torch.equal(new.W_E, old.W_E)
    assert open_directories(shelf) == ["model-1", "model-0"], "the old weights are gone, the other model stays"


def test_two_threads_load_once(checkpoints, monkeypatch):
    shelf, calls, load = shelf_for(2.5, checkpoints), [], HookedJamba.from_pretrained
    both = threading.Barrier(2)

    def slowly(directory, **options):
        calls.append(directory)
        threading.Event().wait(0.1)
        return load(directory, **options)

    def get(_):
        both.wait(5)
        return shelf.get(checkpoints[0])

    monkeypatch.setattr(HookedJamba, "from_pretrained", slowly)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(get, range(2))
    assert first is second and len(calls) == 1


def test_a_type_that_is_asked_for_decides_the_size(checkpoints):
    directory = checkpoints[0].directory
    wide, narrow = (bytes_of(checkpoint_of(directory, None, dtype)) for dtype in ("float32", "bfloat16"))
    assert wide == 2 * narrow


# -- what can be chosen ----------------------------------------------------------------------------------------


def test_recent_directories_survive_and_forget_what_is_gone(checkpoints, home, tmp_path):
    assert models.recent() == []
    a, b = (checkpoint.directory for checkpoint in checkpoints[:2])
    models.remember(a)
    models.remember(b)
    models.remember(a)
    assert models.recent() == [a, b]
    (Path(a) / "config.json").unlink()
    assert models.recent() == [b]
    models.remember(b)
    assert str(a) not in models.recent_file().read_text()


def test_only_so_many_are_remembered(home, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "MOST_RECENT", 2)
    for name in "abc":
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        models.remember(str(tmp_path / name))
    assert models.recent() == [str(tmp_path / "c"), str(tmp_path / "b")]


@pytest.mark.parametrize("text", ["", "{", "7", '{"a": 1}', "[1, null]", '["/no/such/place"]'])
def test_a_damaged_memory_is_an_empty_one(home, text):
    home.mkdir()
    models.recent_file().write_text(text)
    assert models.recent() == []


def test_a_home_that_cannot_be_written_remembers_nothing(checkpoints, tmp_path, monkeypatch):
    file = tmp_path / "a-file"
    file.write_text("")
    monkeypatch.setenv("JAMBASCOPE_HOME", str(file / "below"))
    models.remember(checkpoints[0].directory)
    assert models.recent() == []


def test_a_link_cannot_name_other_directories(checkpoints, home, monkeypatch):
    given, other = (checkpoint.directory for checkpoint in checkpoints[:2])
    monkeypatch.setattr(sys, "argv", ["app.py", "--model", given])
    session.start.cache_clear()
    try:
        assert session.model_choices() == list(dict.fromkeys([given, *packaged_models()]))
        assert other not in session.model_choices()
        models.remember(other)
        assert other in session.model_choices()
    finally:
        session.start.cache_clear()


def test_a_directory_that_is_gone_says_so(checkpoints):
    directory = Path(checkpoints[2].directory)
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()
    with pytest.raises(CheckpointError, match="cannot be read .*restore it"):
        checkpoint_of(str(directory), None, None)
