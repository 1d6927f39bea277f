"""``jambascope bench``: races against transformers, in one process, as ratios."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def bench(
    d_model: Annotated[list[int], typer.Option(help="Widths to race at; repeat the option for several.")] = [128, 512],
    batch: Annotated[int, typer.Option(min=1, help="Sequences per pass.")] = 4,
    length: Annotated[int, typer.Option(min=2, help="Tokens per sequence.")] = 512,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs per side, interleaved; the median counts.")] = 7,
    race: Annotated[
        list[str] | None, typer.Option(help="forward, training-step or generate. [default: all three]")
    ] = None,
    out: Annotated[Path | None, typer.Option("--json", help="Also write every timing to this file.")] = None,
) -> None:
    """Race forward, training step and generation against transformers' JambaForCausalLM on the same random weights."""
    from rich.console import Console
    from rich.table import Table

    from jambascope.studies.bench.races import RACES, run_races

    names = race or list(RACES)
    console = Console()
    table = Table("d_model", "race", "ours, ms", "transformers, ms", "ratio", "spread")
    results = []
    for width in d_model:
        for result in run_races(width, batch, length, names, repeats, progress=Console(stderr=True).print):
            results.append(result)
            low, high = result["ratio_low"], result["ratio_high"]
            table.add_row(
                str(width),
                result["race"],
                f"{result['ours_ms']:.1f}",
                f"{result['transformers_ms']:.1f}",
                f"{result['ratio']:.1f}x",
                f"{low:.1f}x to {high:.1f}x",
            )
    console.print(table)
    if out is not None:
        out.write_text(json.dumps(results, indent=2) + "\n")
