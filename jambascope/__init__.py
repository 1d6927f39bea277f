"""jambascope: open hybrid Transformer-Mamba-MoE language models, look at everything inside, change any of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jambascope.config import JambaConfig
    from jambascope.errors import JambascopeError
    from jambascope.model import HookedJamba
    from jambascope.state import InferenceState

__version__ = "0.1.0"
__all__ = ["HookedJamba", "InferenceState", "JambaConfig", "JambascopeError"]

_HOMES = {
    "HookedJamba": "jambascope.model",
    "InferenceState": "jambascope.state",
    "JambaConfig": "jambascope.config",
    "JambascopeError": "jambascope.errors",
}


def __getattr__(name: str) -> Any:
    """Import what is used when it is used: ``import jambascope`` itself loads neither torch nor numba."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'jambascope' has no attribute {name!r}")
