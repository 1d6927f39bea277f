"""The ``jambascope`` command. Heavy imports happen inside the commands, so that ``--help`` stays quick."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

    from jambascope.config import JambaConfig

app = typer.Typer(
    name="jambascope",
    help="Look inside hybrid Transformer-Mamba-MoE language models (the Jamba family), and change what is there.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
zoo_app = typer.Typer(
    help="The small trained models that ship with the package.", rich_markup_mode=None, invoke_without_command=True
)
app.add_typer(zoo_app, name="zoo")

Model = Annotated[str, typer.Argument(help="A packaged model's name, a checkpoint directory, or a hub id.")]
Device = Annotated[str | None, typer.Option(help="Where to run: cpu, cuda, cuda:1, ... [default: cpu]")]
Quantize = Annotated[str | None, typer.Option(help="experts_int8: expert weights in int8. [default: as stored]")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. [default: as stored]")]


@app.command()
def inspect(
    model: Model,
    context: Annotated[int, typer.Option(min=1, help="Context length, in tokens, to count memory for.")] = 262_144,
    dtype: Annotated[str, typer.Option(help="Type in which weights and caches are counted.")] = "bfloat16",
) -> None:
    """Layers, parameters total and active, and bytes of weights, KV cache and SSM state. Reads no weights."""
    from rich.console import Console
    from rich.table import Table

    from jambascope import checkpoint, memory
    from jambascope.devices import parse_dtype
    from jambascope.memory import readable_bytes, readable_count

    kind = parse_dtype(dtype)
    directory = checkpoint.find_directory(model, weights=False)
    config, model_type = checkpoint.read_config(directory)
    checked = checkpoint.check_tensors(directory, config, model_type) if checkpoint.has_weights(directory) else None
    cost = memory.model_cost(config)

    console = Console()
    layers = Table(title=f"{model} ({model_type}): {config.n_layers} layers, d_model {config.d_model}")
    for name in ("layer", "mixer", "feed-forward"):
        layers.add_column(name)
    for name in ("parameters", "active"):
        layers.add_column(name, justify="right")
    for i, layer in enumerate(cost.layers):
        experts = f" {config.experts_per_token} of {config.num_experts}" if layer.feed_forward == "moe" else ""
        counts = readable_count(layer.parameters), readable_count(layer.active_parameters)
        layers.add_row(str(i), layer.mixer, layer.feed_forward + experts, *counts)
    rest = readable_count(cost.embedding_parameters)
    layers.add_row("", "embeddings, final norm", "", rest, rest)
    console.print(layers)

    per_token = memory.kv_cache_bytes_per_token(config, kind)
    state = memory.mamba_state_bytes(config, kind)
    rows = [
        ("parameters, total", f"{readable_count(cost.parameters)} ({cost.parameters:,})"),
        ("parameters, active per token", f"{readable_count(cost.active_parameters)} ({cost.active_parameters:,})"),
        (f"weights in {dtype}", readable_bytes(memory.weight_bytes(config, kind))),
        *_quantized_row(config, kind),
        (f"KV cache per token in {dtype}", readable_bytes(per_token)),
        (f"KV cache at {context:,} tokens", readable_bytes(per_token * context)),
        ("SSM and conv state, per sequence at any length", readable_bytes(state)),
        ("tensors on disk", "names, shapes and types fit" if checked else "none (counted from config.json)"),
    ]
    totals = Table(show_header=False)
    for row in rows:
        totals.add_row(*row)
    console.print(totals)


def _quantized_row(config: JambaConfig, dtype: torch.dtype) -> list[tuple[str, str]]:
    from jambascope.kernels.experts.int8 import QUANTIZE
    from jambascope.memory import readable_bytes, weight_bytes

    if not config.moe_layers:
        return []
    return [("weights with ExpertsInt8", readable_bytes(weight_bytes(config, dtype, QUANTIZE)))]


@app.command()
def hooks(
    model: Model,
    length: Annotated[int, typer.Option(min=1, help="Tokens in each sequence.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    dtype: Annotated[str, typer.Option(help="Type in which activations are counted.")] = "bfloat16",
    kind: Annotated[
        list[str] | None, typer.Option(help="Points of this kind of layer only, such as mamba; may be repeated.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """Every hook point: layers, axes, shape, bytes, what an edit does. Reads no weights."""
    from rich.console import Console
    from rich.table import Table

    from jambascope import checkpoint, hook_page
    from jambascope.devices import parse_dtype
    from jambascope.memory import readable_bytes

    config, model_type = checkpoint.read_config(checkpoint.find_directory(model, weights=False))
    sections = hook_page.sections(config, kind or ())
    size = config, batch, length, parse_dtype(dtype)
    title = f"{model} ({model_type}): hook points at {batch} x {length:,} tokens in {dtype}"
    if markdown:
        typer.echo(hook_page.model_markdown(title, sections, *size))
        return
    console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 100)
    console.print(title, highlight=False)
    plain = dict(box=None, padding=(0, 2, 0, 0), title_justify="left")
    for section in sections:
        table = Table(title="\n" + section.title, **plain)
        for heading in ("point", "axes", "shape", "type", "bytes", "an edit"):
            table.add_column(heading, no_wrap=heading != "an edit", justify="right" if heading == "bytes" else "left")
        for line in hook_page.lines(section, *size):
            table.add_row(*line)
        console.print(table)
    table = Table(title="\nThese points in all their layers", show_header=False, **plain)
    for what, points, total in hook_page.totals(sections, *size):
        table.add_row(what, f"{points:,} points", readable_bytes(total))
    console.print(table)
    console.print("\nBytes are of one layer. * expanded: kept by run_with_cache only when asked for by name.")


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text; token ids such as '5 17 3' for a checkpoint without tokenizer.")],
    max_new_tokens: Annotated[int, typer.Option(min=0, help="How many tokens to add at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw among the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw among the likeliest that together reach p.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed for sampling.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
) -> None:
    """Continue a prompt and print prompt and continuation."""
    from jambascope import HookedJamba

    loaded = HookedJamba.from_pretrained(model, device=device, dtype=dtype, quantize=quantize)
    options = dict(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, progress=sys.stderr.isatty())
    typer.echo(loaded.generate(prompt, max_new_tokens, **options))


@zoo_app.callback()
def zoo(context: typer.Context) -> None:
    """The small trained models that ship with the package."""
    if context.invoked_subcommand is not None:
        return
    from rich.console import Console
    from rich.table import Table

    from jambascope import checkpoint, memory
    from jambascope.zoo import packaged_models
    from jambascope.zoo.recipes import RECIPES

    plain = dict(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    sizes, differences = Table(**plain), Table(**plain)
    for heading in ("model", "attention", "MoE", "parameters", "active", "on disk"):
        sizes.add_column(heading, no_wrap=True)
    differences.add_column("model", no_wrap=True)
    differences.add_column("what sets it apart")
    for name, directory in packaged_models().items():
        config, _ = checkpoint.read_config(directory)
        cost = memory.model_cost(config)
        sizes.add_row(
            name,
            _layers(config.attention_layers, config.n_layers),
            _layers(config.moe_layers, config.n_layers),
            memory.readable_count(cost.parameters),
            memory.readable_count(cost.active_parameters),
            memory.readable_bytes(sum(p.stat().st_size for p in directory.iterdir())),
        )
        if name in RECIPES:
            differences.add_row(name, RECIPES[name].about)
    console = Console()
    console.print(sizes)
    console.print()
    console.print(differences)
    cards = {directory.parent for directory in packaged_models().values()}
    for folder in sorted(cards):
        typer.echo(f"\ncards: {folder}/NAME/README.md")


def _layers(layers: Sequence[int], n_layers: int) -> str:
    return "all" if len(layers) == n_layers else ", ".join(map(str, layers)) or "-"


@zoo_app.command()
def train(
    name: Annotated[str, typer.Argument(help="Which model of the zoo to train anew.")],
    out: Annotated[
        str | None,
        typer.Option(help="Directory for checkpoints, log and the finished model. [default: runs/zoo/NAME/seed-SEED]"),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps. [default: the recipe's]")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights and data. [default: the recipe's]")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="The highest learning rate. [default: the recipe's]")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in OUT.")] = False,
    snapshots: Annotated[bool, typer.Option(help="Keep the weights of a dozen steps on the way, too.")] = False,
) -> None:
    """Train a model of the zoo anew on this machine, with a log and checkpoints in OUT."""
    from jambascope.zoo.train import train as run

    where = run(name, out, steps=steps, seed=seed, learning_rate=learning_rate, resume=resume, snapshots=snapshots)
    typer.echo(f"{where}: jambascope dashboard {where} opens it")


def _add_commands_of_other_floors() -> None:
    """Commands that live above this package (dashboard, bench, study, zoo eval) register themselves by entry point: a
    function, or a group of commands."""
    for group, parent in (("jambascope.commands", app), ("jambascope.zoo_commands", zoo_app)):
        for entry in sorted(entry_points(group=group), key=lambda e: e.name):
            found = entry.load()
            if isinstance(found, typer.Typer):
                parent.add_typer(found, name=entry.name)
            else:
                parent.command(name=entry.name)(found)


def main() -> None:
    """Run the command line: errors are one line on stderr, status 2 for wrong usage and 1 for the rest."""
    from jambascope.errors import JambascopeError

    _add_commands_of_other_floors()
    try:
        status = app(standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        _fail("interrupted", 130)
    except JambascopeError as e:
        _fail(str(e) + _notes(e), 1)
    except BrokenPipeError:  # the reader of a pipe (head, say) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as e:
        if hasattr(e, "format_message"):  # wrong usage, as typer's own copy of click raises it
            _fail(e.format_message(), e.exit_code)
        if os.environ.get("JAMBASCOPE_TRACEBACK"):
            raise
        _fail(f"unexpected {type(e).__name__}: {e}{_notes(e)} (set JAMBASCOPE_TRACEBACK=1 to see where)", 1)
    sys.exit(status or 0)


def _notes(error: BaseException) -> str:
    """What was added to an error on its way: where it happened, what was kept."""
    return "".join(f"; {note}" for note in getattr(error, "__notes__", ()))


def _fail(message: str, status: int) -> None:
    print("jambascope: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(status)
