"""Files that an answer depends on, told apart by what is in them: texts, and a study of the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import file_digest
from pathlib import Path
from typing import Any

from jambascope.errors import ConfigError, RunError


def contents_of(paths: Sequence[str]) -> dict[str, str]:
    """Path -> sha256 of what is in the file.

    Raises:
        ConfigError: a file that cannot be read.
    """
    try:
        return {path: _sha256(Path(path).expanduser()) for path in paths}
    except OSError as e:
        raise ConfigError(f"{e.filename!r} cannot be read ({e.strerror}); give a file that can") from None


def check_contents(record: dict[str, Any]) -> None:
    """Of a run that goes on: its files hold what they held. Runs of before files were kept have nothing to compare.

    Raises:
        RunError: one that does not.
        ConfigError: one that is gone.
    """
    kept = record.get("contents", {})
    for path, digest in contents_of(list(kept)).items():
        if digest != kept[path]:
            raise RunError(
                f"{path} holds something else than when this run began; put that back, or run the study anew with: "
                f"{record['command']}"
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()
