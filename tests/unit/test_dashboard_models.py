"""Pages on models that lack a part, run without a browser: each says so instead of failing."""

from __future__ import annotations

import socket
import sys
import tomllib
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from jambascope import HookedJamba, JambaConfig
from jambascope.dashboards import command, models, session, widgets
from jambascope.errors import CheckpointError, ConfigError
from jambascope.zoo.words import VOCABULARY

APP = Path(session.__file__).with_name("app.py")
SIZES = dict(d_model=16, d_vocab=20, d_inner=32, d_state=4, d_mlp=8, n_heads=2, n_key_value_heads=1, d_head=8)
PURE = {
    "mamba": JambaConfig(mixers=("mamba",) * 2, feed_forwards=("none",) * 2, **SIZES),
    "mamba2": JambaConfig(
        mixers=("mamba2", "attention"), feed_forwards=("none", "moe"), num_experts=2, mamba_d_head=8, **SIZES
    ),
    "attention": JambaConfig(mixers=("attention",) * 2, feed_forwards=("dense",) * 2, **SIZES),
    "one expert": JambaConfig(mixers=("mamba", "attention"), feed_forwards=("moe",) * 2, num_experts=1, **SIZES),
}


@pytest.mark.parametrize(
    ("kind", "page", "message"),
    [
        ("mamba", "attention", "no attention layers"),
        ("mamba", "router", "no mixture-of-experts layers"),
        ("attention", "ssm_state", "no Mamba layers"),
        ("attention", "router", "no mixture-of-experts layers"),
    ],
)
def test_a_page_without_its_part_says_so(run_page, kind, page, message):
    app = run_page(PURE[kind], page)
    assert not app.exception
    assert message in app.info[0].value


@pytest.mark.parametrize("kind", PURE)
@pytest.mark.parametrize("page", ["overview", "attention", "ssm_state", "router"])
@pytest.mark.parametrize("prompt", ["5", "5 17 3"])
def test_no_page_fails_on_any_kind_of_model(run_page, kind, page, prompt):
    app = run_page(PURE[kind], page, prompt)
    assert not app.exception
    assert app.title


def test_the_examples_are_in_the_packaged_models_language():
    assert {word for text in session.TEXT_EXAMPLES for word in text.split()} <= VOCABULARY.keys()


def test_the_app_itself_starts_on_a_directory(tmp_path, monkeypatch):
    HookedJamba(PURE["mamba"]).save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "argv", ["app.py", "--model", str(tmp_path)])
    session.start.cache_clear()
    app = AppTest.from_file(APP, default_timeout=60).run()
    session.start.cache_clear()
    assert not app.exception and not app.error
    assert app.sidebar.selectbox(key="model").value == str(tmp_path)
    assert app.sidebar.text_area(key="prompt").value


def test_the_command_refuses_before_it_serves(tmp_path, monkeypatch):
    served = []
    monkeypatch.setattr(command, "_serve", lambda *arguments: served.append(arguments))
    with pytest.raises(CheckpointError, match="neither a directory nor a packaged model"):
        command.dashboard("no-such-model")
    with pytest.raises(CheckpointError, match="config.json"):
        command.dashboard(str(tmp_path))
    HookedJamba(PURE["mamba"]).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="dtype='int3'"):
        command.dashboard(str(tmp_path), dtype="int3")
    with pytest.raises(ConfigError, match="device='nowhere'"):
        command.dashboard(str(tmp_path), device="nowhere")
    assert not served
    command.dashboard(str(tmp_path), port=8765, dtype="bfloat16")
    given, port, options = served[0]
    assert (given, port, options["--dtype"]) == (str(tmp_path.resolve()), 8765, "bfloat16")
    assert models.recent()[0] == given
    with pytest.raises(ConfigError, match="larger --model-memory"):
        command.dashboard(str(tmp_path), model_memory=1e-6)


@pytest.mark.parametrize("text", ["<unk>", "a*b_c", ":smile:", "$x$", "[l](u)", "# t"])
def test_plain_text_is_not_markdown(text):
    shown = widgets.plain(text)
    assert not any(sign in shown.replace("\\" + sign, "") for sign in "<*_$[#")


def test_a_browser_opens_once_the_server_answers(monkeypatch):
    opened = []
    monkeypatch.setattr(command.webbrowser, "open", opened.append)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        command._open_browser(f"http://127.0.0.1:{port}", port)
    assert opened == [f"http://127.0.0.1:{port}"]


@pytest.mark.parametrize(("variables", "expected"), [({}, False), ({"DISPLAY": ":0"}, True)], ids=["ssh", "desktop"])
def test_only_a_screen_gets_a_browser(variables, expected, monkeypatch):
    monkeypatch.setattr(command.sys, "platform", "linux")
    monkeypatch.setattr(command.os, "environ", variables)
    assert command._has_screen() is expected


def test_the_server_is_reached_from_this_machine_alone(monkeypatch, tmp_path):
    """Whatever settings Streamlit finds in the home or the working directory."""
    from streamlit.web import cli

    called = []
    monkeypatch.setattr(cli, "main", lambda arguments, **options: called.extend(arguments))
    monkeypatch.setattr(command, "_has_screen", lambda: False)
    command.dashboard("jamba-micro", port=8766)
    flags = dict(zip(called[2::2], called[3::2], strict=False))
    assert flags["--server.address"] == "127.0.0.1" and flags["--server.enableXsrfProtection"] == "true"
    assert flags["--browser.gatherUsageStats"] == "false"
    settings = tomllib.loads(APP.with_name(".streamlit").joinpath("config.toml").read_text())
    assert settings["server"]["address"] == "127.0.0.1" and settings["server"]["maxUploadSize"] <= 5
