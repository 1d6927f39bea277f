"""Files that appear under their names only when complete: a kill leaves the one before, or none."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa
    import torch


def write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_table(path: Path, table: pa.Table) -> None:
    """As parquet, with checksums that :func:`read_table` looks at."""
    import pyarrow.parquet as pq

    temporary = path.with_name(path.name + ".tmp")
    pq.write_table(table, temporary, write_page_checksum=True)
    os.replace(temporary, path)


def read_table(path: Path) -> pa.Table:
    """What :func:`write_table` wrote; of a damaged file pyarrow raises ``OSError`` or an ``ArrowException``."""
    import pyarrow.parquet as pq

    return pq.read_table(path, page_checksum_verification=True)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """As safetensors, whose errors of the disk are made ``OSError``."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
    except SafetensorError as e:
        raise OSError(str(e)) from e
    os.replace(temporary, path)
