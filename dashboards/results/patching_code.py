"""The Patching page as a program."""

from __future__ import annotations

from jambascope.dashboards.results.patching import (
    CHANGE,
    DIFFERENCE,
    EFFECT,
    MASS,
    VALUE,
    Asked,
    Cell,
    parts_of,
    text_of,
)
from jambascope.dashboards.session import View
from jambascope.hooks.sweep import Node


def code(view: View, other: View, asked: Asked, shown: str, cell: Cell) -> str:
    """The lines that compute ``effects``, what the maps show, and ``probabilities``, those of the next token with one
    cell patched."""
    makes = {
        DIFFERENCE: f"logit_difference({asked.correct}, {asked.wrong})",
        "probability": f"probability({asked.correct})",
        "log probability": f"log_probability({asked.correct})",
        "KL divergence": "kl_divergence()",
        "rank": f"rank({asked.correct})",
        MASS: f"label_mass({list(asked.labels)})",
    }
    maker = makes[asked.metric].partition("(")[0]
    first, last = asked.positions
    options = [f"direction={asked.direction!r}", "progress=False"]
    if last - first + 1 < len(view.ids):
        options.append(f"positions=range({first}, {last + 1})")
    take = {EFFECT: "effects()", CHANGE: "changes()", VALUE: "values"}[shown]
    lines = [
        "import torch",
        "from jambascope.hooks import run",
        f"from jambascope.hooks.sweep import Node, interventions, {maker}, patch_sweep, targets",
        "from jambascope.hooks.sweep.nodes import needed",
        "",
        f"corrupted = {other.prompt!r}",
        f"metric = {makes[asked.metric]}  # {', '.join(repr(text_of(view, t)) for t in (asked.correct, asked.wrong))}",
        "effects = {}",
    ]
    for kinds, layers in parts_of(view.model, asked):
        nodes = ", ".join(_node_code(asked.node(kind)) for kind in kinds)
        own = [*options, f"layers={layers}"] if layers is not None else options
        lines.append(f"found = patch_sweep(model, prompt, corrupted, metric, [{nodes}], {', '.join(own)})")
        lines.append(f"effects |= found.{take}  # node: [metric pair layer position ...]")
    base, source = ("corrupted", "prompt") if asked.direction == "denoise" else ("prompt", "corrupted")
    lines += [
        "",
        f"(target,) = targets(model, {_node_code(asked.node(cell.kind))}, [{cell.layer}])",
        "with torch.no_grad():",
        f"    runs = [run(model, text, capture=needed(target)) for text in ({base}, {source})]",
        f"    put = interventions(model, target, [{cell.position}], {cell.unit}, runs[1].cache, runs[0].cache)",
        f"    probabilities = run(model, {base}, put).logits[0, -1].softmax(-1)",
    ]
    return "\n".join(lines)


def _node_code(node: Node) -> str:
    options = [repr(node.component)]
    options += [f"window={node.window}"] if node.window else []
    options += ["conv=True"] if node.conv else []
    return f"Node({', '.join(options)})"
