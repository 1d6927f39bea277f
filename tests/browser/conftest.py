"""One server and one headless Chromium for all browser tests."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest

PACKAGED = "jamba-micro"
STARTUP_SECONDS = 120
"""It may have kernels to compile."""
TIMEOUT = 40_000
"""Milliseconds; beside another worker's tests a page takes many times as long as alone."""
VIEWPORT = {"width": 1440, "height": 900}


def _missing(reason: str) -> None:
    """Skip on a developer's machine; a run that promises to test everything fails instead."""
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def browser() -> Iterator:
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        _missing("neither chromium nor google-chrome is on the PATH")
    try:
        from playwright.sync_api import expect, sync_playwright
    except ImportError:
        _missing("playwright is not installed; it is in the 'test' extra")
    expect.set_options(timeout=TIMEOUT)
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def bare_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model as transformers saves it, without a tokenizer: prompts are token ids."""
    import torch
    from transformers import JambaConfig, JambaForCausalLM

    torch.manual_seed(0)
    config = JambaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        mamba_d_state=8,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    )
    directory = tmp_path_factory.mktemp("bare")
    JambaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def runs_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server lists and saves study runs; empty to begin with."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def server(browser, bare_checkpoint: Path, runs_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of ``jambascope dashboard CHECKPOINT``, which offers the packaged models as well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    program = "from jambascope.cli import main; main()"
    command = [sys.executable, "-c", program, "dashboard", str(bare_checkpoint), "--port", str(port)]
    command += ["--runs", str(runs_root)]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=log.parent)
    try:
        _wait_until_healthy(f"http://127.0.0.1:{port}/_stcore/health", process, log)
        yield f"http://127.0.0.1:{port}"
        assert "Traceback" not in log.read_text(), f"the server logged an exception:\n{log.read_text()}"
    finally:
        process.terminate()
        process.wait(10)


def _wait_until_healthy(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + STARTUP_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"the server ended with status {process.returncode}:\n{log.read_text()}")
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"the server did not answer within {STARTUP_SECONDS} s:\n{log.read_text()}")


@pytest.fixture(scope="session")
def shared_context(browser) -> Iterator:
    """One browser cache for all tests that need no other; Streamlit keeps a session per page all the same."""
    context = browser.new_context(viewport=VIEWPORT)
    yield context
    context.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator:
    """Beside a failure, what the test's pages said then."""
    report = yield
    if report.when == "call" and report.failed:
        from playwright.sync_api import Error

        for page in getattr(item, "pages", []):
            try:
                lines = page.locator("body").inner_text(timeout=2000).splitlines()
            except Error as problem:  # it may be closed, or not answer
                lines = [str(problem)]
            report.sections.append((f"Page {page.url}", "\n".join(line for line in lines if line.strip())))
    return report


@pytest.fixture
def open_page(request, browser, shared_context, server: str) -> Iterator:
    """``open_page(path, **query)``, closed after the test; ``fresh=True``: as another person's browser would."""
    closing, request.node.pages = [], []

    def open_(path: str = "", fresh: bool = False, **query: str):
        context = browser.new_context(viewport=VIEWPORT) if fresh else shared_context
        page = context.new_page()
        closing.append(context if fresh else page)
        request.node.pages.append(page)
        page.set_default_timeout(TIMEOUT)
        page.goto(f"{server}/{path}?{urlencode(query)}")
        page.get_by_label("Prompt", exact=True).wait_for()
        return page

    yield open_
    for opened in closing:
        opened.close()


@pytest.fixture(scope="session")
def model():
    """The packaged model, to compare what the pages show with what it computes."""
    from jambascope import HookedJamba

    return HookedJamba.from_pretrained(PACKAGED)
