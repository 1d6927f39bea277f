"""The small trained models that ship with the package."""

from __future__ import annotations

from pathlib import Path


def packaged_models() -> dict[str, Path]:
    """Name -> checkpoint directory of every packaged model."""
    folder = Path(__file__).parent
    return {p.parent.name: p.parent for p in sorted(folder.glob("*/config.json"))}
