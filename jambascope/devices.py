"""Devices and dtypes by name, refused with the project's own error when they cannot be used here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int

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


_COPY = 8_192  # numbers in 64 KiB


def index_tensor(indices: Sequence[int] | np.ndarray, device: torch.device | str) -> Int[torch.Tensor, " index"]:
    """What ``torch.tensor(indices, device=device)`` makes, without waiting for a GPU as that does.

    A stretch is arithmetic; others travel in pieces of 64 KiB, which a GPU's driver takes from pageable memory
    without waiting for the device (CUDA runtime API, "API synchronization behavior").
    """
    if isinstance(indices, range) and indices.step == 1:
        return torch.arange(indices.start, indices.stop, device=device)
    if isinstance(indices, np.ndarray) and torch.device(device).type == "cpu":
        return torch.from_numpy(indices.astype(np.int64))
    starts = range(0, max(len(indices), 1), _COPY)
    pieces = [torch.tensor(indices[s : s + _COPY], dtype=torch.long).to(device, non_blocking=True) for s in starts]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
