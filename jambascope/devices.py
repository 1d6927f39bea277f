"""Devices and dtypes by name, refused with the project's own error when they cannot be used here."""

from __future__ import annotations

import torch

from jambascope.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A floating type from its name; None stays None."""
    found = DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if found is not None and found not in DTYPES.values() or found is None and dtype is not None:
        raise ConfigError(f"dtype={str(dtype)!r} must be one of {', '.join(DTYPES)}")
    return found


def parse_device(device: torch.device | str | None) -> torch.device:
    """A device that exists here, from its name; None is the CPU."""
    try:
        found = torch.device("cpu" if device is None else device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError) as e:
        raise ConfigError(f"device={str(device)!r} cannot be used here ({str(e).splitlines()[0]}); try cpu") from None
    return found
