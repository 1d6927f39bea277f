"""``jambascope dashboard``: check the model, then serve the pages."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

SAFE = ("--server.address", "127.0.0.1", "--server.enableXsrfProtection", "true", "--browser.gatherUsageStats", "false")
"""Reachable from this machine alone, no forged requests, nothing told to Streamlit's makers."""


def dashboard(
    model: Annotated[
        str, typer.Argument(help="A packaged model, a checkpoint directory, or a Hugging Face hub id.")
    ] = "jamba-micro",
    port: Annotated[int, typer.Option(help="Port of the local address to serve on.", min=1, max=65535)] = 8501,
    device: Annotated[str | None, typer.Option(help="Where the model runs, such as cpu or cuda.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Type of the weights: float32, bfloat16 or float16; as stored when not given.")
    ] = None,
    model_memory: Annotated[
        float | None,
        typer.Option(help="GiB of weights kept open at once; half of the memory when not given.", min=0.001),
    ] = None,
    runs: Annotated[Path, typer.Option(help="Directory of study runs, to list and to save to.")] = Path("runs/studies"),
) -> None:
    """Open the dashboards on a model, at a local address that is printed."""
    # What cannot be opened raises here, a CheckpointError or ConfigError, before anything is served.
    from jambascope.checkpoint import check_tensors, find_directory, read_config
    from jambascope.dashboards import models
    from jambascope.devices import parse_device, parse_dtype

    parse_dtype(dtype)
    parse_device(device)
    directory = find_directory(model)
    check_tensors(directory, *read_config(directory))
    most = models.default_bytes(device) if model_memory is None else int(model_memory * 2**30)
    models.Shelf(most).check(models.checkpoint_of(str(directory), device, dtype))  # before it is loaded
    _check_port(port)
    given = model
    if directory == Path(model).expanduser():
        given = str(directory.resolve())
        models.remember(given)
    _compile_kernels(device)
    options = {"--device": device, "--dtype": dtype, "--model-memory": str(most), "--runs": str(runs.resolve())}
    _serve(given, port, options)


def _compile_kernels(device: str | None) -> None:
    """What most pages need a CPU compiles here once, where each kernel is named, not behind somebody's first page."""
    import torch

    from jambascope import HookedJamba
    from jambascope.devices import parse_device
    from jambascope.hooks.sweep import logit_difference, patch_sweep

    if parse_device(device).type == "cpu":
        model = HookedJamba.from_pretrained("jamba-micro")
        with torch.no_grad():
            for tokens in (1, 512):
                model(torch.zeros(1, tokens, dtype=torch.long))
            model.run_with_cache(torch.zeros(1, 2, dtype=torch.long))
            clean = torch.arange(1, 33)  # so long that rows go on from what the base run's scan read
            patch_sweep(model, clean, clean.flip(0), logit_difference(5, 6), progress=False)


def _check_port(port: int) -> None:
    from jambascope.errors import ConfigError

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as e:
            raise ConfigError(f"port={port} cannot be used ({e.strerror}); choose another with --port") from None


def _serve(model: str, port: int, options: dict[str, str | None]) -> None:
    """Run Streamlit in this process until interrupted; its settings lie beside the app in .streamlit/config.toml."""
    from streamlit.runtime.pages_manager import PagesManager
    from streamlit.web import cli

    # Streamlit takes a folder called pages for its older kind of multi-page app until st.navigation has been called
    # once, and would answer a link to a page, as the server's first request, with that file alone: an empty page.
    PagesManager.uses_pages_directory = False
    app = Path(__file__).parent / "app.py"
    # What keeps it safe does not depend on a file that somebody else's settings may stand before.
    arguments = ["run", str(app), "--server.port", str(port), *SAFE, "--", "--model", model]
    for option, value in options.items():
        if value is not None:
            arguments += [option, value]
    url = f"http://127.0.0.1:{port}"
    typer.echo(f"jambascope dashboard of {model}: {url}  (Ctrl+C ends it)")
    if _has_screen():
        threading.Thread(target=_open_browser, args=(url, port), daemon=True).start()
    cli.main(arguments, prog_name="streamlit", standalone_mode=False)


def _has_screen() -> bool:
    """Whether a browser window can appear here; on a machine reached by ssh the printed address has to do."""
    return sys.platform in ("darwin", "win32") or bool({"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys())


def _open_browser(url: str, port: int) -> None:
    """Open the page once the server answers. Streamlit's own way would first ask for an e-mail address."""
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                webbrowser.open(url)
                return
        time.sleep(0.2)
