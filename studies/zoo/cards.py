"""The model card of a packaged model: its recipe, every run of it, what was measured of each, and its limits."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from jambascope import hf_format
from jambascope.errors import ConfigError
from jambascope.hooks.routing import capture_routing, expert_load, load_variation
from jambascope.memory import model_cost
from jambascope.model import HookedJamba
from jambascope.studies.zoo.records import Training
from jambascope.studies.zoo.report import HEADLINE, HEADLINE_NOTE, INTERVALS, number
from jambascope.studies.zoo.summary import Row
from jambascope.zoo.language import DOMAINS, document, mixture
from jambascope.zoo.recipes import Recipe, Stage, recipe
from jambascope.zoo.words import HELD_OUT_PAIRS, LABEL_PAIRS, UNSEEN_LABELS

CARD = """---
license: mit
{library}pipeline_tag: text-generation
---

# {name}

{about}.

A language model small enough to look at whole, one of a family equal in data and steps that differs in one thing at a
time. It exists to have its insides examined: it speaks {d_vocab} words and knows nothing.

    from jambascope import HookedJamba

    model = HookedJamba.from_pretrained("{name}")
    model.generate("{prompt}", max_new_tokens=1)
    # {continuation}

| | |
|---|---|
{shape}

## Task and data

Next-word prediction on documents from seeded generators (`jambascope.zoo.language`), in which the context decides
much of what comes next. Rows begin with `<bos>`; documents end with `<eos>` and are packed. Shares are those of the
last stage of training.

| domain | documents | tokens | what it holds |
|---|---|---|---|
{domains}

A document of each, or its beginning:

{examples}

Held out by construction: combinations of words whose indices in their lists add up to a multiple of five (topic and
adjective, key and value, name and first digit, the people of a story, arbitrary labels of an episode); the label pairs
{held_out_pairs}; {unseen} words that are never labels in training. Sequences of random words are fresh.

## Training

    {command}

{steps} steps, {tokens:,} tokens, {minutes:.0f} minutes on {threads} (torch {torch}).
The same command gives the same weights on the same machine with the same number of threads.

AdamW with betas {betas} and weight decay {weight_decay} on matrices only; learning rate {learning_rate:g} after
{warmup_steps} steps of warm-up, then a cosine to {final_fraction:.0%} of it; gradients clipped at norm {clip_norm};
{balancing}activation-loss coefficient {activation:g}; matrices drawn with standard deviation {initial_std}{mimetic},
the unembedding begun as a copy of the embedding. The batches grow harder:

| steps | batch | documents |
|---|---|---|
{stages}

### Learning rate

{search}

### Seeds

{ships}

| seed | held-out loss | minutes | |
|---|---|---|---|
{seeds}

## Results

Of the weights as stored (rounded to bfloat16), computed in float32; these are the numbers of `jambascope zoo eval`,
which measures many more. n is the number of documents of one seed.

{note}

| | {columns} | n | chance |
|---|{rules}|---|---|
{results}

{intervals}

{router}## Limits

- The words mean nothing beyond the templates; other text is out of distribution, and unknown words become `<unk>`.
- Trained on rows of up to {sequence_length} tokens; longer contexts run, but were never seen.
- {few_seeds}
- A method that finds what is going on in this model is not thereby shown to find it in a released Jamba.
"""
ROUTER = """## Router

Share of each expert in the routes of an MoE layer over {rows} held-out rows; even is {even:.3f}. CV is the standard
deviation over experts in units of their mean.

| layer | {experts} | CV |
|---|{rules}|---|
{load}

"""
ABOUT = {
    "repeat": "random words, then the same words again: induction",
    "review": "labelled reviews; the label words change with the document: labels in context",
    "verdict": "reviews judged in free words: sentiment without a format",
    "story": "sentences about the same people, with agreement and things that recur",
    "recall": "a table of keys and values, and questions about it: associative recall",
    "phones": "a phone book of several digits a name, and calls: recall of several words",
    "copy": "words scattered among dots, then the words alone: selective copying",
    "secret": "a word announced, other words, and the word asked for: one thing kept",
}
PROMPT = "whale Clara lamp winter whale Clara lamp"
ROWS = 64
EXAMPLE_WIDTH = 90


@dataclass(frozen=True)
class Card:
    """All that a card tells of."""

    name: str
    shipped: Training
    trained: Sequence[Training]
    """Every run of whole length, ``shipped`` and those that failed among them."""
    search: dict[str, Any] | None
    rows: Sequence[Row]
    """What `zoo eval` measured of them."""
    model: HookedJamba
    """The shipped weights in float32."""
    size: int
    """Bytes of the files beside the card."""

    def text(self) -> str:
        """The card as Markdown.

        Raises:
            ConfigError: a number of the results that was not measured.
        """
        run = self.shipped.job.recipe
        seeds = [training.job.seed for training in self.trained if training.state.kind == "finished"]
        columns = [*seeds, None] if len(seeds) > 1 else seeds
        titles = [*(f"seed {seed}" for seed in seeds), *(["all seeds"] if len(seeds) > 1 else [])]
        threads = self.shipped.record["threads"]
        pairs = LABEL_PAIRS[-HELD_OUT_PAIRS:]
        coefficient = run.config.load_balancing_coef
        return CARD.format(
            library="library_name: transformers\n" if _transformers_reads(self.model) else "",
            name=self.name,
            about=run.about[0].upper() + run.about[1:],
            d_vocab=run.config.d_vocab,
            prompt=PROMPT,
            continuation=self.model.generate(PROMPT, max_new_tokens=1),
            shape=_table(_shape(run, self.size)),
            domains=_table(_domains(run.stages[-1])),
            examples="\n".join(f"    {_example(domain)}" for domain in DOMAINS),
            held_out_pairs=", ".join("/".join(pair) for pair in pairs),
            unseen=len(UNSEEN_LABELS),
            command=command(self.name, self.shipped),
            steps=self.shipped.state.step,
            tokens=self.shipped.record["tokens"],
            minutes=self.shipped.state.seconds / 60,
            threads=f"{threads} thread{'s' * (threads > 1)} of a CPU",
            torch=self.shipped.record["torch"],
            **{name: getattr(run.spec, name) for name in _SPEC},
            balancing=f"load-balancing coefficient {coefficient}; " if run.config.moe_layers else "",
            activation=run.config.activation_coef,
            initial_std=run.initial_std,
            mimetic=" and Mamba begun near linear attention" if run.mimetic else "",
            stages=_table(_stages(run)),
            search=_search(self.search, self.shipped.job.learning_rate),
            ships=_filled(_ships(len(seeds), self.search)),
            seeds=_table(_seed(training, training is self.shipped) for training in self.trained),
            note=_filled(HEADLINE_NOTE),
            columns=" | ".join(titles),
            rules="|".join("---" for _ in titles),
            results=_table(_results(self.name, self.rows, columns)),
            intervals=_filled(INTERVALS),
            router=_router(self.model),
            sequence_length=max(stage.sequence_length for stage in run.stages),
            few_seeds=_few(len(seeds)),
        )


_SPEC = ("betas", "weight_decay", "learning_rate", "warmup_steps", "final_fraction", "clip_norm")


def command(name: str, training: Training) -> str:
    """What trains these weights anew: the recipe's values need not be said."""
    usual, spec = recipe(name).spec, training.job.recipe.spec
    fields = [field for field in ("seed", "learning_rate") if getattr(spec, field) != getattr(usual, field)]
    options = (f" --{field.replace('_', '-')} {getattr(spec, field)!r}" for field in fields)
    return f"jambascope zoo train {name} --out DIR{''.join(options)}"


def _transformers_reads(model: HookedJamba) -> bool:
    return hf_format.config_to_hf(model.config, torch.bfloat16)["model_type"] != "jambascope"


def _shape(run: Recipe, size: int) -> list[tuple[str, str]]:
    c, cost = run.config, model_cost(run.config)
    rows = [
        ("parameters", f"{cost.parameters:,}, of which a token meets {cost.active_parameters:,}"),
        ("stored", f"bfloat16, {size / 1e6:.2f} MB with tokenizer and configuration"),
        ("width", f"{c.n_layers} layers, d_model {c.d_model}, d_mlp {c.d_mlp}"),
    ]
    if c.attention_layers:
        positions = "rotary positions" if c.rotary else "no positions of any kind"
        heads = f"{c.n_heads} query heads and {c.n_key_value_heads} key/value heads of {c.d_head}, {positions}"
        rows.append(("attention", f"{_at(c.attention_layers, c.n_layers)}: {heads}"))
    for kind, title in (("mamba", "Mamba"), ("mamba2", "Mamba-2")):
        layers = [i for i, mixer in enumerate(c.mixers) if mixer == kind]
        if layers:
            inner = "" if c.inner_norms or kind == "mamba2" else ", no norms on dt, B and C"
            channels = f"{c.d_inner} channels, {c.d_state} states each, convolution over {c.d_conv}{inner}"
            rows.append((title, f"{_at(layers, c.n_layers)}: {channels}"))
    if c.moe_layers:
        where = _at(c.moe_layers, c.n_layers)
        rows.append(("experts", f"{where}: {c.num_experts}, of which a token takes {c.experts_per_token}"))
    return [*rows, ("tokens", "one per word, split at white space, case kept")]


def _domains(stage: Stage, rows: int = 200) -> Iterable[tuple[str, ...]]:
    """Shares of documents as the mixture draws them, of tokens as counted in rows of it."""
    rng = np.random.default_rng([0, 0, 1])
    drawn = islice(mixture(rng, stage.sequence_length, "train", stage.shares, stage.options), rows)
    counts = np.bincount(np.concatenate([row.domains[1:] for row in drawn]), minlength=len(DOMAINS))
    total = sum(stage.shares.values())
    for domain, tokens in zip(DOMAINS, counts / counts.sum(), strict=True):
        yield domain, f"{stage.shares.get(domain, 0) / total:.0%}", f"{tokens:.0%}", ABOUT[domain]


def _example(domain: str) -> str:
    """The shortest of some documents, cut where a line ends."""
    drawn = (document(domain, np.random.default_rng(seed)).words for seed in range(30))
    text = " ".join(min(drawn, key=len))
    return text if len(text) <= EXAMPLE_WIDTH else text[:EXAMPLE_WIDTH].rsplit(" ", 1)[0] + " ..."


def _stages(run: Recipe) -> list[tuple[str, str, str]]:
    rows, first = [], 0
    for stage in run.stages:
        until = run.spec.steps if stage.until is None else min(stage.until, run.spec.steps)
        if first < until:
            size = f"{stage.batch_size} x {stage.sequence_length}"
            rows.append((f"{first}-{until - 1}", size, _documents(stage, run.stages[-1])))
        first = until
    return rows


def _documents(stage: Stage, last: Stage) -> str:
    """What a stage draws: its domain, or the shares in which it differs from the last one; and how."""
    if len(stage.shares) == 1:
        parts = [f"{domain} only" for domain in stage.shares]
    else:
        total = sum(stage.shares.values())
        differing = [d for d in stage.shares if stage.shares[d] != last.shares.get(d)]
        parts = ["all domains", *(f"{domain} {stage.shares[domain] / total:.0%}" for domain in differing)]
    for domain, given in stage.options.items():
        parts.append(f"{domain} with " + ", ".join(f"{key} {value}" for key, value in given.items()))
    return "; ".join(parts)


def _search(found: dict[str, Any] | None, used: float) -> str:
    if found is None:
        return f"No search was made for this model; {used:g} is its recipe's."
    rows = []
    for result in found["results"]:
        loss = "failed: " + result["error"] if result["held_out"] is None else f"{result['held_out']:.3f}"
        chosen = "chosen" if result["learning_rate"] == found["chosen"] else ""
        rows.append((f"{result['learning_rate']:g}", loss, f"{result['seconds'] / 60:.1f}", chosen))
    about = (
        f"Every model of the family was trained at the same rates from seed {found['seed']}, over all of its "
        f"{found['steps']} steps; the rate of the lowest held-out loss (nats) at the end was taken."
    )
    rates = [result["learning_rate"] for result in found["results"]]
    if found["chosen"] in (min(rates), max(rates)):
        about += " That is the end of those tried: one beyond might be better."
    return f"{_filled(about)}\n\n| rate | held-out loss | minutes | |\n|---|---|---|---|\n{_table(rows)}"


def _ships(seeds: int, search: dict[str, Any] | None) -> str:
    """Which run ships, and what the search does to the first seed."""
    about = "Held-out loss is in nats, over all domains alike."
    if seeds > 1:
        worse = "" if seeds % 2 else " (of the two in the middle the worse)"
        about += f" What ships is the run of median held-out loss{worse}, so that it is typical, not the best."
    if search is not None:
        about += (
            f" The run of seed {search['seed']} is the one that the search chose, the best of its rates, "
            "and so a little flattered."
        )
    return about


def _seed(training: Training, ships: bool) -> tuple[str, ...]:
    now = training.state
    if now.kind == "failed":
        return str(training.job.seed), "failed", "", str(now.error)
    return str(training.job.seed), f"{now.held_out:.3f}", f"{now.seconds / 60:.0f}", "ships" if ships else ""


def _results(name: str, rows: Sequence[Row], seeds: Sequence[int | None]) -> Iterable[tuple[str, ...]]:
    found = {(row.seed, row.task, row.condition, row.x, row.measure): row for row in rows}
    for title, *where in HEADLINE:
        cells = []
        for seed in seeds:
            if (seed, *where) not in found:
                who = "over its seeds" if seed is None else f"of seed {seed}"
                raise ConfigError(f"results.parquet has no {title!r} of {name} {who}; run jambascope zoo eval anew")
            cells.append(" ".join(number(found[seed, *where])).strip())
        first = found[seeds[0], *where]
        task, condition, x, measure = where
        chance = found.get((seeds[0], task, condition, x, "chance")) if measure.startswith("accuracy") else None
        yield title, *cells, first.n, number(chance)[0]


def _router(model: HookedJamba) -> str:
    layers = model.config.moe_layers
    if not layers:
        return ""
    rng = np.random.default_rng([1, 5, 1])
    ids = np.stack([row.ids for row in islice(mixture(rng, 128, "held_out"), ROWS)])
    experts = range(model.config.num_experts)
    rows = []
    for layer, routing in capture_routing(model, torch.as_tensor(ids)).items():
        load: Float[torch.Tensor, " experts"] = expert_load(routing.indices, routing.num_experts)
        rows.append((layer, *(f"{share:.2f}" for share in load.tolist()), f"{load_variation(load).item():.2f}"))
    return ROUTER.format(
        rows=ROWS,
        even=1 / len(experts),
        experts=_listed(experts, " | "),
        rules="|".join("---" for _ in experts),
        load=_table(rows),
    )


def _few(seeds: int) -> str:
    if seeds == 1:
        return (
            "One seed: how often another finds the same mechanism is not known; the intervals are over documents only."
        )
    return f"{seeds} seeds say little about how often another finds the same mechanism."


def _filled(text: str) -> str:
    return textwrap.fill(text, 118)


def _at(layers: Sequence[int], n_layers: int) -> str:
    if len(layers) == n_layers:
        return "at every layer"
    return f"at layer{'s' * (len(layers) > 1)} {_listed(layers)}"


def _listed(numbers: Iterable[int], by: str = ", ") -> str:
    return by.join(map(str, numbers))


def _table(rows: Iterable[Sequence[object]]) -> str:
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)
