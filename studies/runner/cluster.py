"""Cells as tasks of a Ray cluster: any number at a time, on any of its machines, tried again where a worker dies."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jambascope.errors import ConfigError, RunError
from jambascope.studies.runner.models import ModelOfRun, check_unchanged, open_model
from jambascope.studies.runner.spec import make_spec
from jambascope.studies.runner.study import Cell, Found, load

LOCAL = "local"
RETRIES = 3
"""How often a cell is tried again after its worker has died."""


def measure(
    address: str,
    source: str,
    asked: dict[str, Any],
    tasks: Mapping[int, tuple[Cell, dict[str, Any]]],
    device: str | None,
) -> Iterator[tuple[int, Found, float]]:
    """What each cell gives, as they are done; the caller writes it down.

    Args:
        address: ``"local"``, or of a running cluster, whose machines must see the models under the same paths.
        source: name of the study, or the path of its file.
        asked: the spec, JSON-able.
        tasks: number -> cell and its model.

    Raises:
        ConfigError: no Ray, or no cluster at the address.
        RunError: a cell whose workers died again and again. What a cell itself raises is raised here.
    """
    ray = _ray(address)
    with _connected(ray, address):
        gpus = 1 if device is not None and device.startswith("cuda") else 0
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(_measured)
        waiting = {task.remote(source, asked, *of_cell, device): i for i, of_cell in tasks.items()}
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            i = waiting.pop(done)
            yield i, *_result(ray, done, tasks[i][0])


def _measured(
    source: str, asked: dict[str, Any], cell: Cell, model: dict[str, Any], device: str | None
) -> tuple[Found, float]:
    """Of one cell, in a worker."""
    from jambascope.studies.runner.run import measure_cell

    study = load(source)
    opened = _open(ModelOfRun(**model), device)
    return measure_cell(study, make_spec(study.name, study.spec, asked), cell, opened)


@functools.lru_cache(maxsize=1)
def _open(model: ModelOfRun, device: str | None) -> Any:
    """A worker's last model: cells of one model follow each other."""
    return open_model(check_unchanged(model), device)


def _result(ray: Any, done: Any, cell: Cell) -> tuple[Found, float]:
    try:
        return ray.get(done)
    except ray.exceptions.RayTaskError as e:
        raise (e.cause if isinstance(e.cause, Exception) else e) from None
    except ray.exceptions.RayError as e:  # a worker or its node is gone, or was killed for memory
        raise RunError(
            f"the workers of the cell {cell} died {RETRIES + 1} times ({type(e).__name__}; memory?); "
            "finished cells are kept"
        ) from None


def _ray(address: str) -> Any:
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("--ray needs Ray, which is not installed: pip install 'jambascope[ray]'")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if address == LOCAL:
        # A cluster listens on every interface, whatever address its node is given; without clusters, which Ray knows of
        # other systems, on loopback alone. It is read when Ray is imported.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    import ray

    if address == LOCAL and not ray.util.get_node_ip_address().startswith("127."):
        raise ConfigError("--ray: Ray was imported before and would listen to the network; start a process of its own")
    return ray


@contextmanager
def _connected(ray: Any, address: str) -> Iterator[None]:
    """A cluster of this machine's own that ends after use; or one that runs."""
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address == LOCAL:
            ray.init(address="local", include_dashboard=False, **quiet)
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as e:
        # Ray's own message does not say that it was refused for want of the token that `ray start` makes.
        remedy = "" if address == LOCAL else "; where the cluster asks for a token, set RAY_AUTH_MODE=token"
        raise ConfigError(f"--ray {address}: no cluster could be reached or started ({e}){remedy}") from None
    try:
        yield
    finally:
        ray.shutdown()
