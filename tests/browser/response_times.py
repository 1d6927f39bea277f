"""How long the pages take to answer a new prompt, in headless Chromium: ``python tests/browser/response_times.py``.

From the key press until the page's script has run, figures included, and the browser has drawn them: the median of a
few prompts that nobody asked about before, on a model that is loaded.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from urllib.parse import urlencode

import numpy as np
from playwright.sync_api import Page, sync_playwright

from jambascope.zoo.words import WORDS

PAGES = ("overview", "attention", "ssm_state", "router", "induction", "formats", "patching")
APP, ATTRIBUTE = "document.querySelector('[data-testid=stApp]')", "data-test-script-state"
STATE = f"{APP}.getAttribute('{ATTRIBUTE}')"
WATCH = f"""() => {{
    window.ran = false;
    const seen = new MutationObserver(() => window.ran = true);
    seen.observe({APP}, {{attributes: true, attributeFilter: ['{ATTRIBUTE}']}});
}}"""
"""Notes a run that is over between two looks."""


def prompt(tokens: int, seed: int) -> str:
    """Of as many tokens as asked, with the one for its beginning."""
    return " ".join(np.random.default_rng(seed).choice(WORDS, tokens - 1))


def idle(page: Page) -> None:
    """Until the script has not run for a moment, and what it sent is drawn."""
    since = None
    while since is None or time.monotonic() - since < 0.15:
        if page.evaluate(STATE) == "notRunning" and not page.locator('[data-stale="true"]').count():
            since = since or time.monotonic()
        else:
            since = None
        page.wait_for_timeout(10)


def seconds(page: Page, text: str) -> float:
    box = page.get_by_label("Prompt", exact=True)
    box.fill(text)
    page.evaluate(WATCH)
    began = time.monotonic()
    box.press("Control+Enter")
    page.wait_for_function("window.ran", timeout=10_000)
    idle(page)
    return time.monotonic() - began - 0.15  # the moment that is waited


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="jamba-micro")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 2048])
    parser.add_argument("--prompts", type=int, default=5)
    parser.add_argument("--pages", nargs="+", default=list(PAGES), choices=PAGES)
    given = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = "from jambascope.cli import main; main()"
    server = subprocess.Popen(
        [sys.executable, "-c", program, "dashboard", given.model, "--port", str(port)], stdout=subprocess.DEVNULL
    )
    seeds = itertools.count()
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=1)
                break
            except OSError:
                time.sleep(0.2)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            for path, tokens in itertools.product(given.pages, given.tokens):
                page = browser.new_page(viewport={"width": 1440, "height": 900})
                query = urlencode({"model": given.model, "prompt": prompt(tokens, next(seeds))})
                page.goto(f"http://127.0.0.1:{port}/{path.removeprefix('overview')}?{query}")  # the page at the root
                page.get_by_label("Prompt", exact=True).wait_for(timeout=60_000)
                idle(page)
                took = [seconds(page, prompt(tokens, next(seeds))) for _ in range(given.prompts)]
                print(
                    f"{path:10} {tokens:5} tokens  median {statistics.median(took):.2f} s  (to {max(took):.2f})",
                    flush=True,
                )
                page.close()
            browser.close()
    finally:
        server.terminate()
        server.wait(10)


if __name__ == "__main__":
    main()
