"""Experts taken away one by one, and models trained with a balancing loss and without: rows of ``router_load``."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int

from jambascope import training
from jambascope.config import JambaConfig
from jambascope.hooks import run
from jambascope.hooks.interventions import AblateExperts, Intervention, ZeroAblation
from jambascope.hooks.routing import capture_routing, expert_load, load_variation, max_violation
from jambascope.losses import token_losses
from jambascope.model import HookedJamba
from jambascope.training import TrainingSpec
from jambascope.zoo.recipes import JAMBA, Recipe, Stage
from jambascope.zoo.train import batches, new_model

Form = Literal["masked", "zeroed"]
FORMS: tuple[Form, ...] = ("masked", "zeroed")
CHANGE, SPECIFIC = "change of loss", "own favourite less other domains'"
TRAINED_CV, TRAINED_VIOLATION, TRAINED_LOSS = "load CV, trained here", "MaxVio, trained here", "loss, trained here"


@torch.no_grad()
def prompt_losses(
    model: HookedJamba, tokens: Int[torch.Tensor, "prompts pos"], without: Iterable[Intervention] = (), batch: int = 16
) -> Float[torch.Tensor, " prompts"]:
    """Mean loss of each prompt in nats per token, under interventions."""
    parts = tokens.to(model.device).split(batch)
    return torch.cat([token_losses(run(model, part, without).logits, part).double().mean(1).cpu() for part in parts])


def layer_changes(
    model: HookedJamba,
    tokens: Int[torch.Tensor, "prompts pos"],
    layer: int,
    experts: Sequence[int],
    form: Form,
    whole: Float[torch.Tensor, " prompts"],
    batch: int = 16,
) -> dict[int, Float[torch.Tensor, " prompts"]]:
    """Expert -> the change of every prompt's loss without it."""
    return {
        e: prompt_losses(model, tokens, [AblateExperts(layer, experts=(e,), form=form)], batch) - whole for e in experts
    }


def all_changes(
    model: HookedJamba,
    tokens: Int[torch.Tensor, "prompts pos"],
    layer: int,
    whole: Float[torch.Tensor, " prompts"],
    batch: int = 16,
) -> Float[torch.Tensor, " prompts"]:
    """The change of every prompt's loss without anything that the layer's experts add."""
    return prompt_losses(model, tokens, [ZeroAblation("mlp_out", layer)], batch) - whole


def chosen_for_ablation(
    load: Float[torch.Tensor, " experts"], draws: int, rng: np.random.Generator
) -> tuple[int, list[int]]:
    """The busiest expert, and as many random others as ``draws`` (all where there are no more)."""
    busiest = int(load.argmax())
    others = [e for e in range(len(load)) if e != busiest]
    return busiest, sorted(rng.permutation(others)[:draws].tolist())


def favourites_of(share: Float[torch.Tensor, "domains experts"], overall: Float[torch.Tensor, " experts"]) -> list[int]:
    """Of each domain the expert that it chooses most beyond what all tokens do."""
    return (share - overall).argmax(1).tolist()


def ablation_rows(
    layer: int,
    form: Form,
    changes: dict[int, Float[torch.Tensor, " prompts"]],
    busiest: int,
    others: Sequence[int],
    favourites: Sequence[int],
    domains: Int[torch.Tensor, " prompts"],
    first_sample: int,
) -> list[dict[str, Any]]:
    """Of every prompt the change without the busiest expert and without random ones (averaged), and how far apart they
    are; and the change without the expert that its own domain favours, less that without other domains' favourites."""
    random = torch.stack([changes[e] for e in others]).mean(0)
    values = {"busiest": changes[busiest], "random": random, "busiest less random": changes[busiest] - random}
    rows = [
        {"measure": CHANGE, "layer": layer, "condition": f"{name}, {form}", "sample": first_sample + i, "value": value}
        for name, own in values.items()
        for i, value in enumerate(own.tolist())
    ]
    for i, domain in enumerate(domains.tolist()):
        own = favourites[domain]
        rest = [e for e in favourites if e != own]
        if rest:
            value = changes[own][i] - sum(changes[e][i] for e in rest) / len(rest)
            where = {"layer": layer, "condition": form, "sample": first_sample + i}
            rows.append({"measure": SPECIFIC, **where, "value": value.item()})
    return rows


# -- the balancing loss --------------------------------------------------------------------------------------


def small_recipe(config: JambaConfig, coefficient: float, steps: int, seed: int) -> Recipe:
    """Four small layers with as many experts and slots as ``config``, on the language's mixture."""
    small = JambaConfig.jamba(
        n_layers=4, d_model=32, attn_layer_period=4, attn_layer_offset=2, d_vocab=JAMBA.d_vocab, n_heads=2,
        n_key_value_heads=1, d_head=16, d_mlp=32, num_experts=config.num_experts,
        experts_per_token=config.experts_per_token, d_state=8, n_ctx=128, bos_token_id=JAMBA.bos_token_id,
        eos_token_ids=JAMBA.eos_token_ids, pad_token_id=JAMBA.pad_token_id, load_balancing_coef=coefficient,
    )  # fmt: skip
    spec = TrainingSpec(
        steps=steps, seed=seed, learning_rate=3e-3, warmup_steps=min(20, steps), evaluate_every=steps,
        checkpoint_every=steps,
    )  # fmt: skip
    stages = (Stage(until=None, batch_size=16, sequence_length=64),)
    return Recipe(about="small", config=small, spec=spec, stages=stages)


def balancing_rows(
    config: JambaConfig, coefficient: float, steps: int, trainings: int, seed: int
) -> list[dict[str, Any]]:
    """The balance of small models trained here with the balancing loss and without, in pairs of equal first weights and
    batches; a pair is a sample. MoE layers averaged."""
    rows = []
    for i in range(trainings):
        found = {}
        for c in (0.0, coefficient):
            recipe = small_recipe(config, c, steps, 1000 * seed + i)
            model = new_model(recipe)
            with tempfile.TemporaryDirectory() as directory:
                log = training.fit(model, recipe.spec, batches(recipe), directory)
            # Batches of steps that training did not come to.
            make = batches(recipe)
            routes = capture_routing(model, torch.cat([make(steps + j) for j in range(4)]))
            loads = torch.stack([expert_load(r.indices, r.num_experts) for r in routes.values()])
            found[c] = {
                TRAINED_CV: float(load_variation(loads).mean()),
                TRAINED_VIOLATION: float(max_violation(loads).mean()),
                TRAINED_LOSS: sum(row["lm"] for row in log[-10:]) / len(log[-10:]),
            }
        for measure, without in found[0.0].items():
            values = {"coefficient 0": without, f"coefficient {coefficient:g}": found[coefficient][measure]}
            values["with less without"] = found[coefficient][measure] - without
            rows += [{"measure": measure, "condition": c, "sample": i, "value": v} for c, v in values.items()]
    return rows
