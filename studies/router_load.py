"""How evenly do the routers use their experts, what do they go by, and does it matter which expert is gone?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from pydantic import Field

from jambascope.config import JambaConfig
from jambascope.errors import ConfigError
from jambascope.hooks.expert_parallel import parallel_table
from jambascope.hooks.routing import (
    Routing,
    balance_loss,
    capture_routing,
    concatenate,
    expert_load,
    margin,
    retained_mass,
    token_entropy,
)
from jambascope.hooks.routing_chance import load_chance, load_table, prompt_sums, row
from jambascope.hooks.routing_dependence import dependence, domain_specialization, position_bins, token_ids
from jambascope.model import HookedJamba
from jambascope.studies import expert_ablation
from jambascope.studies.corpus import TEXT, Corpus, check_corpus, corpus
from jambascope.studies.expert_ablation import CHANGE, FORMS, SPECIFIC, TRAINED_CV, TRAINED_LOSS, TRAINED_VIOLATION
from jambascope.studies.figures.points import Dot, dots
from jambascope.studies.figures.routing import domain_shares, expert_loads
from jambascope.studies.router_reading import balance_table, dependence_lines, parallel_lines, reading
from jambascope.studies.runner.spec import Files, Spec
from jambascope.studies.runner.study import Cell, Found, Study, grid_and_once
from jambascope.studies.runner.summary import summarize

RETAINED, ENTROPY, MARGIN = "retained mass", "token entropy (nats)", "top-1 less top-2"
BY = ("layer", "condition")


class RouterSpec(Spec):
    """Settings of the study."""

    prompts: int = Field(8, ge=2, description="Of each domain; favourites are found on one half of them.")
    length: int = Field(128, ge=8, description="Tokens of a prompt.")
    text: Files = Field((), description=TEXT)
    devices: tuple[int, ...] = Field((2, 4), description="Devices that experts are spread over, in blocks.")
    window: int = Field(256, ge=1, description="Tokens that are dispatched in one step.")
    draws: int = Field(7, ge=1, description="Random other experts that are taken away; fewer where fewer exist.")
    shuffles: int = Field(20, ge=1, description="Times that tokens are shuffled for what dependence is by chance.")
    trainings: int = Field(3, ge=0, description="Pairs of small models trained with the balancing loss and without.")
    steps: int = Field(150, ge=1, description="Of each of those trainings.")
    coefficient: float = Field(0.01, gt=0, description="Of the balancing loss in them; Jamba's is 0.001.")
    batch_size: int = Field(16, ge=1, description="Prompts run at a time.")


def cells(spec: RouterSpec) -> list[Cell]:
    """Every model and seed; and the trainings once, which need only the number of experts of the first model."""
    return grid_and_once(spec, "routes", "balancing loss", wanted=spec.trainings > 0)


def check(spec: RouterSpec, config: JambaConfig, directory: Path) -> None:
    if not config.moe_layers:
        raise ConfigError("it has no mixture-of-experts layer, so nothing is routed; leave it out")
    for devices in spec.devices:
        if not 1 <= devices <= config.num_experts:
            raise ConfigError(f"devices={devices} must lie in 1..{config.num_experts}, so that each has an expert")
    if config.num_experts <= config.experts_per_token:
        raise ConfigError(
            f"each token takes all of its {config.num_experts} experts, so nothing is chosen; leave it out"
        )
    check_corpus(directory, config, spec.text, spec.length)


def measure(spec: RouterSpec, cell: Cell, model: HookedJamba) -> Found:
    if cell["part"] == "balancing loss":
        trained = (spec.coefficient, spec.steps, spec.trainings, cell["seed"])
        return Found(expert_ablation.balancing_rows(model.config, *trained))
    texts = corpus(model, spec.text, spec.prompts, spec.length, cell["seed"])
    routes = capture_routing(model, texts.tokens, batch_size=spec.batch_size)
    rows = _certainty_rows(routes)
    rows += _corpus_rows("balance", load_table(routes, seed=cell["seed"]), len(texts.tokens))
    rows += [
        {"measure": "balance: variation of a multinomial", "layer": layer, "sample": 0, "value": chance.mean}
        for layer, routing in routes.items()
        for chance in [load_chance(routing, distinct=False)["variation"]]
    ]
    rows.append({"measure": "balance loss, layers pooled", "sample": 0, "value": balance_loss(routes.values())})
    rows += _parallel_rows(spec, cell["seed"], routes, texts)
    rows += _dependence_rows(spec, cell["seed"], routes, texts)
    rows += _share_rows(routes, texts)
    return Found([*rows, *_ablation_rows(spec, cell["seed"], model, routes, texts)], {"tokens": texts.tokens})


def _certainty_rows(routes: dict[int, Routing]) -> list[dict[str, Any]]:
    """Of every prompt, tokens averaged."""
    rows = []
    for layer, r in routes.items():
        p = r.probabilities
        values = {RETAINED: retained_mass(p, r.indices), ENTROPY: token_entropy(p), MARGIN: margin(p)}
        tokens = prompt_sums(r.prompts, torch.ones(len(r)))
        for name, each in values.items():
            means = prompt_sums(r.prompts, each) / tokens
            rows += [{"measure": name, "layer": layer, "sample": i, "value": v} for i, v in enumerate(means.tolist())]
    return rows


def _corpus_rows(kind: str, table: list[dict[str, Any]], n: int, **labels: str) -> list[dict[str, Any]]:
    """Rows of tables of the whole corpus, which bring intervals of their own; a measure without a value is none."""
    return [
        {**r, **labels, "measure": f"{kind}: {r['measure']}", "sample": 0, "n": n}
        for r in table
        if np.isfinite(r["value"])
    ]


def _parallel_rows(spec: RouterSpec, seed: int, routes: dict[int, Routing], texts: Corpus) -> list[dict[str, Any]]:
    """Domains mixed, as prompts come, and one after the other, which is the worst that can happen."""
    rows = []
    order = texts.domains.argsort(stable=True)
    for name, routed in (("mixed", routes), ("by domain", {i: _reordered(r, order) for i, r in routes.items()})):
        for devices in spec.devices:
            table = parallel_table(routed, devices, spec.window, draws=200, seed=seed)
            first = devices == spec.devices[0]  # drops know nothing of devices
            table = [r for r in table if first or not r["measure"].startswith("dropped")]
            rows += _corpus_rows("parallel", table, -(-texts.tokens.numel() // spec.window), condition=name)
    return rows


def _reordered(r: Routing, order: torch.Tensor) -> Routing:
    """Prompts in another order."""
    parts = [torch.nonzero(r.prompts == p)[:, 0] for p in order.tolist()]
    return concatenate(
        Routing(r.probabilities[at], r.indices[at], token_ids(r)[at], r.positions[at], r.prompts[at]) for at in parts
    )


def _dependence_rows(spec: RouterSpec, seed: int, routes: dict[int, Routing], texts: Corpus) -> list[dict[str, Any]]:
    """On the token and the position, tokens shuffled for the control; on the domain, prompts shuffled."""
    table = []
    for layer, r in routes.items():
        found = {
            "token": dependence(r, token_ids(r), spec.shuffles, seed),
            "position": dependence(r, position_bins(r.positions), spec.shuffles, seed),
        }
        if len(texts.names) > 1:
            found["domain"] = dependence(r, texts.domains[r.prompts], spec.shuffles, seed, "prompts")
        table += [row(layer, name, d.fraction, d.shuffled) for name, d in found.items()]
    return _corpus_rows("dependence", table, len(texts.tokens))


def _share_rows(routes: dict[int, Routing], texts: Corpus) -> list[dict[str, Any]]:
    rows = []
    for layer, r in routes.items():
        found = domain_specialization(r, texts.domains[r.prompts])
        ends = (found.share.tolist(), found.low.tolist(), found.high.tolist())
        for domain, *values in zip(found.labels.tolist(), *ends, strict=True):
            for expert, (share, low, high) in enumerate(zip(*values, strict=True)):
                where = {"layer": layer, "domain": texts.names[domain], "expert": expert, "sample": 0}
                rows.append({"measure": "share of domain", **where, "value": share, "low": low, "high": high})
        load = expert_load(r.indices, r.num_experts).tolist()
        rows += [
            {"measure": "load", "layer": layer, "expert": e, "sample": 0, "value": v, "n": r.indices.numel()}
            for e, v in enumerate(load)
        ]
    return rows


def _ablation_rows(
    spec: RouterSpec, seed: int, model: HookedJamba, routes: dict[int, Routing], texts: Corpus
) -> list[dict[str, Any]]:
    """Busiest experts and favourites are found on one half of each domain's prompts, and taken away on the other."""
    rng = np.random.default_rng([seed, 5])
    rank = torch.zeros_like(texts.domains)
    for domain in range(len(texts.names)):
        own = (texts.domains == domain).nonzero()[:, 0]
        rank[own] = torch.arange(len(own))
    finding = rank < spec.prompts // 2
    tokens, domains = texts.tokens[~finding], texts.domains[~finding]
    first = int(finding.sum())
    whole = expert_ablation.prompt_losses(model, tokens, batch=spec.batch_size)
    rows: list[dict[str, Any]] = []
    for layer, r in routes.items():
        labels = torch.where(finding, texts.domains, -1)[r.prompts]
        found = domain_specialization(r, labels, draws=2)
        load = expert_load(r.indices[labels >= 0], r.num_experts)
        favourites = expert_ablation.favourites_of(found.share, found.overall)
        busiest, others = expert_ablation.chosen_for_ablation(load, spec.draws, rng)
        experts = sorted({busiest, *others, *favourites})
        for form in FORMS:
            if form == "masked" and r.num_experts - 1 < r.experts_per_token:
                continue
            changes = expert_ablation.layer_changes(model, tokens, layer, experts, form, whole, spec.batch_size)
            rows += expert_ablation.ablation_rows(layer, form, changes, busiest, others, favourites, domains, first)
        everyone = expert_ablation.all_changes(model, tokens, layer, whole, spec.batch_size)
        rows += [
            {"measure": CHANGE, "layer": layer, "condition": "all, zeroed", "sample": first + i, "value": v}
            for i, v in enumerate(everyone.tolist())
        ]
    return rows


# -- the report ----------------------------------------------------------------------------------------------


def tables(spec: RouterSpec, rows: pd.DataFrame) -> Sequence[tuple[str, pd.DataFrame]]:
    return [
        ("Balance of each layer against chance; 95 % intervals over prompts", balance_table(rows)),
        ("What choices depend on: share of the expert's entropy", dependence_lines(rows)),
        ("Experts spread over devices: stragglers and drops", parallel_lines(rows)),
    ]


def figures(spec: RouterSpec, rows: pd.DataFrame) -> list[go.Figure]:
    made = []
    for model, own in rows[(rows.seed == spec.seeds[0]) & (rows.part == "routes")].groupby("model", sort=False):
        loads, shares = own[own.measure == "load"], own[own.measure == "share of domain"]
        by_layer = {int(i): part.sort_values("expert")["value"].to_numpy() for i, part in loads.groupby("layer")}
        fig = expert_loads(by_layer, int(loads.n.iloc[0]))
        made.append(fig.update_layout(title_text=f"Load per expert and layer, {model}"))
        grids = {
            int(i): part.pivot_table("value", "domain", "expert", sort=False).to_numpy()
            for i, part in shares.groupby("layer")
        }
        names = list(dict.fromkeys(shares.domain))
        chance = grids[min(grids)][0].sum() / grids[min(grids)].shape[1]
        made.append(domain_shares(f"Experts that domains choose, {model}", grids, names, chance))
    return [*made, *_ablation_figures(rows), *_balancing_figures(rows)]


def _ablation_figures(rows: pd.DataFrame) -> list[go.Figure]:
    made = []
    for measured, title, unit in (
        (CHANGE, "Loss without experts", "change of loss (nats per token)"),
        (
            SPECIFIC,
            "Loss without the domain's favourite, less that without other domains' favourites",
            "nats per token",
        ),
    ):
        summary = summarize(rows[rows.layer.notna()], [measured], BY)
        kept = summary[~summary.condition.str.contains("less random") & (summary.condition != "all, zeroed")]
        panels = [
            (recipe, [Dot(f"layer {int(r.layer)}", r.condition, r["mean"], r.low, r.high) for _, r in own.iterrows()])
            for recipe, own in kept.groupby("recipe", sort=False)
        ]
        if panels:
            made.append(dots(title, "means and 95 % intervals over held-out prompts", panels, unit))
    return made


def _balancing_figures(rows: pd.DataFrame) -> list[go.Figure]:
    summary = summarize(rows, [TRAINED_CV, TRAINED_VIOLATION, TRAINED_LOSS], ("condition",))
    if summary.empty:
        return []
    panels = [
        (name, [Dot(r.condition, "", r["mean"], r.low, r.high) for _, r in own.iterrows() if "less" not in r.condition])
        for name, own in summary.groupby("measure", sort=False)
    ]
    return [dots("Small models trained with the balancing loss and without", "means over trainings", panels, "")]


study = Study(
    name="router_load",
    version=1,
    spec=RouterSpec,
    question=__doc__,
    method="Equally many prompts of each domain (held-out documents of the packaged models' language, or windows of "
    "text files) are read, and every MoE layer's choices kept. Load f_e: share of all tokens x slots. CV: standard "
    "deviation over mean. MaxVio: max f_e X - 1. Retained mass: sum of the kept probabilities, which Jamba does not "
    "renormalise. Balance loss: X sum f_e P_e, of each layer (1 when uniform). Dependence: I(expert; label) / "
    "H(expert), corrected after Miller and Madow. Stragglers: the busiest device's load times devices over the whole. "
    "Drops: choices beyond ceil(cf k T / X) tokens of an expert in a window of T.\n\n"
    "Experts are taken away one at a time, masked (their logits become -inf, so that tokens are routed again) or "
    "zeroed (routes stay, what they add is gone). The busiest expert of a layer, and the one that a domain chooses "
    "most beyond the others (its favourite), are found on one half of the prompts, and taken away on the other.\n\n"
    "Effect of the balancing loss: pairs of small models (four layers of width 32, as many experts) are trained here "
    "from equal weights on equal batches with and without it, and their loads taken on batches they have not seen.",
    controls="Balance: tokens that choose k different experts evenly at random, and the multinomial. Dependence: "
    "labels dealt out anew among tokens, domains among prompts. Stragglers and drops: random choices in windows of "
    "the same size. Busiest expert: random other experts of its layer, taken away in the same way. Favourites: what "
    "taking the other domains' favourites away does to the same prompts. All zeroed: everything that the layer's "
    "experts add, which is what there is to be lost. Over layers p-values are corrected after Holm.",
    measure=measure,
    headline=(RETAINED, ENTROPY, MARGIN, CHANGE, SPECIFIC, TRAINED_CV, TRAINED_VIOLATION, TRAINED_LOSS),
    by=BY,
    figures=figures,
    reading=reading,
    tables=tables,
    cells=cells,
    check=check,
)
