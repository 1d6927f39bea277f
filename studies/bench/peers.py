"""The peers: how each is opened, and what is missing where one is not installed."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("transformers", "transformer-lens", "mambapy", "mamba-ssm")


def versions() -> dict[str, str]:
    """Installed versions of the peers and of what we run on; ``not installed`` for the others."""
    found = {}
    for name in ("jambascope", "torch", "numba", "triton", *PACKAGES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def transformers_scan() -> Callable[..., Any]:
    """The scan of transformers' Jamba in plain torch: (x, dt [B E T], A, B, C [B N T], D, z [B E T])."""
    from transformers.models.jamba import modeling_jamba

    scan = modeling_jamba.mamba_selective_scan
    return getattr(scan, "__wrapped__", scan)


def mambapy_scan() -> Callable[..., Any] | str:
    """mambapy's parallel scan: (x [B T E], dt [B T E], A, B [B T N], C [B T N], D), or why there is none."""
    if importlib.util.find_spec("mambapy") is None:
        return "not installed: pip install mambapy"
    from mambapy.mamba import MambaBlock

    return lambda *arguments: MambaBlock.selective_scan(None, *arguments)  # uses nothing of its block


@cache
def mamba_ssm_reference() -> Callable[..., Any] | str:
    """mamba_ssm's ``selective_scan_ref``, arguments as transformers' scan, or why there is none.

    The package does not import without its CUDA extension; the reference is plain torch. It is read from the
    installed source with the extension stubbed, and the stubs are gone afterwards.
    """
    spec = importlib.util.find_spec("mamba_ssm")
    if spec is None:
        return "not installed: pip install mamba-ssm"
    if importlib.util.find_spec("selective_scan_cuda") is not None:  # nothing to stub
        from mamba_ssm.ops.selective_scan_interface import selective_scan_ref

        return selective_scan_ref
    before = {name: module for name, module in sys.modules.items() if _is_stubbed(name)}
    try:
        if "mamba_ssm" not in sys.modules:
            package = types.ModuleType("mamba_ssm")
            package.__path__ = list(spec.submodule_search_locations or ())
            sys.modules["mamba_ssm"] = package
        sys.modules["selective_scan_cuda"] = types.ModuleType("selective_scan_cuda")
        from mamba_ssm.ops.selective_scan_interface import selective_scan_ref
    except ImportError as e:
        return f"its source cannot be loaded here: {e}"
    finally:
        for name in [name for name in sys.modules if _is_stubbed(name)]:
            del sys.modules[name]
        sys.modules.update(before)
    return selective_scan_ref


def _is_stubbed(name: str) -> bool:
    return name.split(".")[0] in ("mamba_ssm", "selective_scan_cuda")


def mamba_ssm_cuda() -> Callable[..., Any] | str:
    """mamba_ssm's CUDA scan, arguments as transformers' scan, or why there is none."""
    if importlib.util.find_spec("mamba_ssm") is None:
        return "not installed: pip install mamba-ssm"
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError as e:
        return f"cannot be imported here: {e}"
    return selective_scan_fn
