"""The model card of a packaged model, written from its recipe and from what was measured."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from jambascope.memory import model_cost
from jambascope.zoo.evaluation import HEADS_LENGTH, Evaluation, Measure
from jambascope.zoo.language import DOMAINS, HELD_OUT_PAIRS, LABEL_PAIRS, SHARES

if TYPE_CHECKING:
    from jambascope.model import HookedJamba
    from jambascope.zoo.train import Recipe

CARD = """---
license: mit
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A language model small enough to look at whole, in the proportions of the Jamba releases: {n_layers} layers, attention
at layer {attention} and Mamba elsewhere, {num_experts} experts ({experts_per_token} to a token) at layers {moe}.
It exists to have its insides examined: it speaks {d_vocab} words and knows nothing.

    from jambascope.model import HookedJamba

    model = HookedJamba.from_pretrained("{name}")
    model.generate("{prompt}", max_new_tokens=1)
    # {continuation}

| | |
|---|---|
| parameters | {parameters:,}, of which a token meets {active:,} |
| stored | bfloat16, {megabytes:.2f} MB with tokenizer and configuration |
| width | d_model {d_model}, d_mlp {d_mlp}, {n_heads} query heads and {n_key_value_heads} key/value heads of {d_head} |
| Mamba | {d_inner} channels, {d_state} states each, convolution over {d_conv}, dt_rank {dt_rank} |
| tokens | one per word, split at white space, case kept; no positions of any kind |

## Task and data

Next-word prediction on documents from seeded generators (`jambascope.zoo.language`), in all of which the context
decides what comes next. Rows begin with `<bos>`; documents end with `<eos>` and are packed.

| domain | share of documents, in the end | what it holds |
|---|---|---|
{domains}

Held out by construction, and used for every number below: combinations of topic and adjective, of key and value, of
people in a story and of arbitrary labels whose indices in the word lists add up to a multiple of five, and the
label pairs {held_out_pairs}. Random sequences are fresh ones.

## Training

    jambascope zoo train {name} --out DIR{options}

{steps} steps, {tokens:,} tokens, seed {seed}; {minutes:.0f} minutes on {machine}.
The same command gives the same weights on the same machine with the same number of threads.

AdamW with betas {betas} and weight decay {weight_decay} on matrices only; learning rate {learning_rate} after
{warmup_steps} steps of warm-up, then a cosine to {final_fraction:.0%} of it; gradients clipped at norm {clip_norm};
load-balancing coefficient {load_balancing_coef}; matrices drawn with standard deviation {initial_std}, the unembedding
begun as a copy of the embedding. The batches grow harder, from short repetitions of few words to everything:

| steps | batch | documents |
|---|---|---|
{stages}

## Results

Of the weights as stored (rounded to bfloat16), computed in float32. Mean [95 % interval] over n independent rows,
sequences or episodes.

Induction: random words said twice after `<bos>`, from the second word of each half; loss in nats.

| words | first half | second half | gain | accuracy, second half | n |
|---|---|---|---|---|---|
{induction}

Attention, in the second half of the {heads_length} words, to the word that followed the current word's first mention
(an even spread would give about {even_attention:.3f}):

| layer.head | attention | n |
|---|---|---|
{heads}

Few-shot labels: the last of several reviews, both labels shown before. *Choice*: the right label is likelier than the
other one (chance 0.5). *Mass*: the probability of the two labels together.

| shots | labels | choice | mass | probability of the right one | n |
|---|---|---|---|---|---|
{few_shot}

Recall: the first question about a table; accuracy of the likeliest word.

| entries | accuracy | n |
|---|---|---|
{recall}

Loss in nats on packed held-out rows, over all words and over those that the context decides:

| domain | all words | answers |
|---|---|---|
{held_out}

Router: share of each expert (columns 0 to {last_expert}) in the routes of an MoE layer; even is {even:.3f}.

| layer | documents | {experts} |
|---|---|{rules}|
{router}

## Limits

- The words mean nothing beyond the templates; other text is out of distribution, and unknown words become `<unk>`.
- Trained on rows of up to {sequence_length} tokens; longer contexts run, but were never seen.
- Trained briefly, with one seed: how often another seed finds the same mechanism is not known. Numbers are of this
  one model, and their intervals are over inputs, not over trainings.
- A method that finds what is going on in this model is not thereby shown to find it in a released Jamba.
"""

ABOUT = {
    "repeat": "4 to 48 random words, said 2 to 4 times: induction",
    "review": "4 to 9 reviews with a label each; the two label words change with the document: in-context labels",
    "story": "2 to 4 template sentences about the same two people, with agreement and things that recur",
    "recall": "a table of 2 to 8 keys and numbers, and questions about it: associative recall",
}


def model_card(name: str, recipe: Recipe, model: HookedJamba, results: Evaluation, seconds: float, size: int) -> str:
    """The card as Markdown. ``seconds`` the training took; ``size`` in bytes of the files beside the card."""
    config, spec, cost = recipe.config, recipe.spec, model_cost(recipe.config)
    prompt = "whale Clara lamp winter whale Clara lamp"
    experts = range(config.num_experts)
    return CARD.format(
        **config.to_dict() | dict(n_layers=config.n_layers, sequence_length=recipe.stages[-1].sequence_length),
        **{field: getattr(spec, field) for field in spec.__dataclass_fields__},
        name=name,
        attention=_listed(config.attention_layers),
        moe=_listed(config.moe_layers),
        prompt=prompt,
        continuation=model.generate(prompt, max_new_tokens=1),
        parameters=cost.parameters,
        active=cost.active_parameters,
        megabytes=size / 1e6,
        domains=_table((domain, f"{SHARES[domain]:.0%}", ABOUT[domain]) for domain in DOMAINS),
        held_out_pairs=", ".join("/".join(pair) for pair in LABEL_PAIRS[-HELD_OUT_PAIRS:]),
        options=_options(name, recipe),
        stages=_stages(recipe),
        tokens=recipe.tokens,
        initial_std=recipe.initial_std,
        minutes=seconds / 60,
        machine=_machine(),
        induction=_table(
            (length, *(_shown(m[key]) for key in ("first loss", "second loss", "gain", "accuracy")), m["gain"].n)
            for length, m in results.induction.items()
        ),
        heads=_table((head, _shown(m), m.n) for head, m in results.heads.items()),
        heads_length=HEADS_LENGTH,
        even_attention=2 / (3 * HEADS_LENGTH),
        few_shot=_table(
            (shots, kind, *(_shown(m[f"{kind}, {key}"]) for key in ("choice", "mass", "right")), m[f"{kind}, mass"].n)
            for shots, m in results.few_shot.items()
            for kind in ("natural", "arbitrary")
        ),
        recall=_table((entries, _shown(m), m.n) for entries, m in results.recall.items()),
        held_out=_table((d, _shown(results.held_out[d]), _shown(results.held_out[f"{d}, answers"])) for d in DOMAINS),
        last_expert=experts[-1],
        even=1 / config.num_experts,
        experts=" | ".join(map(str, experts)),
        rules="|".join("---" for _ in experts),
        router=_table(
            (layer, domain, *(f"{share:.2f}" for share in shares))
            for layer in config.moe_layers
            for domain, loads in results.router.items()
            for shares in [loads[layer]]
        ),
    )


def write(path: Path, text: str) -> None:
    """Write the card under its name only when complete."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _options(name: str, recipe: Recipe) -> str:
    """What the command line needs beyond the name to repeat this run."""
    from jambascope.zoo.train import RECIPES

    usual, spec = RECIPES[name].spec, recipe.spec
    changed = [field for field in ("steps", "seed") if getattr(spec, field) != getattr(usual, field)]
    return "".join(f" --{field} {getattr(spec, field)}" for field in changed)


def _stages(recipe: Recipe) -> str:
    rows, first = [], 0
    for stage in recipe.stages:
        until = recipe.spec.steps if stage.until is None else min(stage.until, recipe.spec.steps)
        options = [f"{key} {value}" for given in stage.options.values() for key, value in given.items()]
        documents = ", ".join([*(f"{domain} {share:.0%}" for domain, share in stage.shares.items()), *options])
        if first < until:
            rows.append((f"{first}-{until - 1}", f"{stage.batch_size} x {stage.sequence_length}", documents))
        first = until
    return _table(rows)


def _machine() -> str:
    threads = torch.get_num_threads()
    return f"{threads} CPU thread{'s' * (threads > 1)} ({platform.machine()}, torch {torch.__version__})"


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def _shown(m: Measure) -> str:
    return f"{m.mean:.3f} [{m.low:.3f}, {m.high:.3f}]"


def _table(rows: Iterable[tuple]) -> str:
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)
