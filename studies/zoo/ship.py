"""``python -m jambascope.studies.zoo.ship``: put the trained family into the package, a model card with each.

For maintainers: it writes into the source tree of ``jambascope.zoo``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jambascope.zoo
from jambascope.errors import ConfigError, JambascopeError
from jambascope.memory import readable_bytes
from jambascope.model import HookedJamba
from jambascope.studies.zoo import records
from jambascope.studies.zoo.cards import Card
from jambascope.studies.zoo.records import Training
from jambascope.zoo import recipes
from jambascope.zoo.train import RECORD

FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", RECORD)
MOST_BYTES = 30_000_000
"""Of all packaged models together, without their cards."""


@dataclass(frozen=True)
class Shipment:
    """A model on its way into the package."""

    name: str
    training: Training
    card: str
    size: int
    """Bytes of ``FILES``."""


def ship(runs: Path, evaluation: Path, package: Path, names: Sequence[str] = ()) -> list[Shipment]:
    """Replace the packaged models: of each recipe the run of median held-out loss, and its card.

    Nothing is replaced unless everything is there and fits.

    Args:
        runs: directory of the runs, ``NAME/seed-*`` and ``NAME/search.json``.
        evaluation: what ``zoo eval --runs`` wrote about them.
        package: directory of the packaged models.
        names: of packaged recipes; all of them when empty.

    Raises:
        ConfigError: a recipe that does not ship, no finished run, runs of another spec, results that are missing or of
            other weights, or more than ``MOST_BYTES``.
    """
    packaged = [name for name, recipe in recipes.RECIPES.items() if recipe.packaged]
    if wrong := [name for name in names if name not in packaged]:
        raise ConfigError(f"{wrong[0]!r} is no packaged recipe; there are {', '.join(packaged)}")
    chosen = [name for name in packaged if name in names or not names]
    shipments = [_prepare(name, runs, evaluation) for name in chosen]
    others = [package / name for name in packaged if name not in chosen]
    total = sum(shipment.size for shipment in shipments) + sum(map(_size, others))
    if total > MOST_BYTES:
        raise ConfigError(
            f"the packaged models would take {total:,} bytes, more than {MOST_BYTES:,}; make them smaller"
        )
    for shipment in shipments:
        _replace(package / shipment.name, shipment)
    return shipments


def _prepare(name: str, runs: Path, evaluation: Path) -> Shipment:
    trained = records.trainings(name, runs)
    shipped = records.typical(trained)
    directory, size = shipped.job.directory, _size(shipped.job.directory)
    if missing := [file for file in FILES if not (directory / file).is_file()]:
        raise ConfigError(f"{directory} lacks {', '.join(missing)}; train it anew")
    card = Card(
        name=name,
        shipped=shipped,
        trained=trained,
        search=records.search(name, runs),
        rows=records.results(evaluation, trained),
        model=HookedJamba.from_pretrained(directory, dtype="float32"),
        size=size,
    )
    return Shipment(name, shipped, card.text(), size)


def _size(directory: Path) -> int:
    return sum((directory / file).stat().st_size for file in FILES if (directory / file).exists())


def _replace(target: Path, shipment: Shipment) -> None:
    """As a whole: nothing of the model before stays."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".ship-", dir=target.parent) as temporary:
        new, old = Path(temporary, "new", target.name), Path(temporary, "old")
        new.mkdir(parents=True)
        for file in FILES:
            shutil.copyfile(shipment.training.job.directory / file, new / file)
        (new / "README.md").write_text(shipment.card, encoding="utf-8")
        if target.exists():
            os.replace(target, old)
        os.replace(new, target)


def main() -> None:
    """Ship, and print what went where."""
    parser = argparse.ArgumentParser(
        prog="python -m jambascope.studies.zoo.ship", description=ship.__doc__.split("\n")[0]
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="packaged recipes; all of them when none is named")
    parser.add_argument("--runs", type=Path, default=Path("runs/zoo"))
    parser.add_argument("--evaluation", type=Path, default=Path("runs/zoo/evaluation"))
    parser.add_argument("--package", type=Path, default=Path(jambascope.zoo.__file__).parent)
    given = parser.parse_args()
    try:
        shipments = ship(given.runs, given.evaluation, given.package, given.names)
    except JambascopeError as e:
        sys.exit(f"ship: {e}")
    for shipment in shipments:
        print(f"{shipment.name}: seed {shipment.training.job.seed}, {readable_bytes(shipment.size)}")
    print(f"together {readable_bytes(sum(shipment.size for shipment in shipments))}")


if __name__ == "__main__":
    main()
