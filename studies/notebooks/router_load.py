# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Who does the work? Router load of a mixture-of-experts model
#
# In every second layer of a Jamba the MLP is a *mixture of experts*: several small MLPs and a router, a linear map
# that gives each token a probability for each expert. The token goes through the few experts of highest probability
# (here two), and what they return is added up, weighted with these probabilities.
#
# That saves compute only if the experts share the work, and it invites a question that a dense MLP does not:
#
# 1. Does every expert get work, and is the load more uneven than chance would make it?
# 2. How sure is the router of a choice?
# 3. What is the choice made by: the token, its position, or the kind of text?
# 4. What would an uneven load cost on several devices?
# 5. Is an expert that a kind of text uses much also needed by it?
#
# `jamba-micro` ships with the package. Put a checkpoint directory in its place to ask the same of your own model; the
# documents below are in the packaged models' language, so bring your own prompts, too.

# %%
import math

import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown

from jambascope import HookedJamba
from jambascope.hooks import run
from jambascope.hooks.interventions import AblateExperts, freeze_routes, hooks
from jambascope.hooks.routing import capture_routing, kept_weights, margin, retained_mass, summarize
from jambascope.hooks.routing_chance import against_chance, load_table
from jambascope.studies.figures import routing as routing_figures
from jambascope.studies.figures.estimates import Estimate, estimates
from jambascope.studies.figures.theme import in_notebook

in_notebook()
model = HookedJamba.from_pretrained("jamba-micro")
config = model.config
Markdown(
    f"MoE layers: {', '.join(map(str, config.moe_layers))}. Each has {config.num_experts} experts, of which a token "
    f"takes {config.experts_per_token}. An even load would be {1 / config.num_experts:.1%} for each."
)

# %% [markdown]
# ## The text
#
# Documents that the model has not been trained on, as many of each of its eight kinds: load is a property of a model
# *and* a text, and the kinds are what we will compare.

# %%
from jambascope.zoo.language import DOMAINS, document

PER_DOMAIN = 12
rng = np.random.default_rng(0)
documents = [document(domain, rng, "held_out") for domain in DOMAINS for _ in range(PER_DOMAIN)]
prompts = [" ".join(doc.words) for doc in documents]
pd.DataFrame({"kind": list(DOMAINS), "a document begins": [p[:48] for p in prompts[::PER_DOMAIN]]})

# %% [markdown]
# ## 1. Does every expert get work?
#
# The *load* of an expert is its share of all choices, f = n / (k T): T tokens choose k experts each.
# `capture_routing` runs the prompts and returns, for each MoE layer, the probabilities and the choices.

# %%
routes = capture_routing(model, prompts)
summaries = {layer: summarize(routing) for layer, routing in routes.items()}
loads = {layer: summary.load.numpy() for layer, summary in summaries.items()}
for load in loads.values():
    assert math.isclose(load.sum(), 1) and (load >= 0).all()

tokens = len(routes[config.moe_layers[0]])
routing_figures.expert_loads(loads, choices=tokens * config.experts_per_token)

# %% [markdown]
# Uneven, but by how much more than chance? Tokens that choose two different experts blindly do not load them equally
# either. The coefficient of variation (CV: standard deviation over mean) of such a load is sqrt((X - k) / (k T)) for
# X experts, so it shrinks with the number of tokens. The grey bars are its middle 95 % in simulations; the whiskers
# are 95 % intervals from resampling whole prompts, since the tokens of a prompt resemble each other.

# %%
table = pd.DataFrame(load_table(routes))
cv = table[table.measure == "variation"]
points = [
    Estimate(f"{r.layer}", "CV of load", r.value, r.low, r.high, (r.chance_low, r.chance_high)) for r in cv.itertuples()
]
estimates(
    "How uneven is the load?", "0 is balanced; grey: blind choices of as many tokens", points, "MoE layer", "CV of load"
)

# %%
worst = max(summaries, key=lambda layer: summaries[layer].variation)
dead = sum(summary.dead_experts for summary in summaries.values())
beyond = int((cv.value > cv.chance_high).sum())
Markdown(
    f"On {tokens:,} tokens the CV lies between {cv.value.min():.2f} and {cv.value.max():.2f}; chance gives "
    f"{cv.chance.mean():.3f}. {beyond} of {len(cv)} layers are more uneven than chance. The busiest expert of layer "
    f"{worst} has {1 + summaries[worst].max_violation:.1f} times its even share. Experts that no token chose: {dead}."
)

# %% [markdown]
# ## 2. How sure is the router?
#
# Two layers can be equally balanced while one router is certain of every token and the other tosses a coin. Follow
# one prompt through one layer, token by token. Jamba does not rescale the kept probabilities to sum to one, so the
# *retained mass*, their sum, is also the factor by which an undecided router shrinks the whole layer's output.

# %%
prompt = prompts[list(DOMAINS).index("phones") * PER_DOMAIN]
one = capture_routing(model, prompt)
words = model.to_str_tokens(prompt)
last = config.moe_layers[-1]
routing_figures.token_routes(kept_weights(one[last]).numpy(), words, last)

# %%
mass, lead = retained_mass(one[last].probabilities, one[last].indices), margin(one[last].probabilities)
routing_figures.certainty(mass.numpy(), lead.numpy(), words, last, position=len(words) - 1)

# %%
chosen = table[table.measure == "retained_mass"]
even = config.experts_per_token / config.num_experts
assert (chosen.value > even).all() and (chosen.value <= 1).all()
said = ", ".join(f"{r.value:.2f} [{r.low:.2f}, {r.high:.2f}] in layer {r.layer}" for r in chosen.itertuples())
Markdown(
    f"Over all documents the kept experts hold {said}; a router that knows nothing would keep {even:.2f}. "
    f"Most certain on average: layer {chosen.layer[chosen.value.idxmax()]}; "
    f"least: layer {chosen.layer[chosen.value.idxmin()]}."
)

# %% [markdown]
# ## 3. What is the choice made by?
#
# The mutual information of the chosen expert with the token's identity, with its position, and with the kind of
# document says what the route can be told from, as a share of the expert's entropy. Frequencies of rare tokens alone
# carry spurious information: it is corrected for, and the grey lines show what is left of it when labels are dealt
# out at random. Since two experts are taken and the slot is left open, not even a route that the label fixes gives 1;
# the ceiling is 1 - ln k / H.

# %%
from jambascope.hooks.routing_dependence import dependence, domain_specialization, position_bins

kind = torch.arange(len(documents)) // PER_DOMAIN
points, found = [], {}
for layer, routing in routes.items():
    labels = {"token": (routing.token_ids, "tokens"), "position": (position_bins(routing.positions), "tokens")}
    labels["kind of document"] = (kind[routing.prompts], "prompts")
    for name, (values, unit) in labels.items():
        d = found[layer, name] = dependence(routing, values, shuffles=50, unit=unit)
        points.append(Estimate(f"{layer}", name, *d.fraction, chance=(d.shuffled.low, d.shuffled.high)))
estimates(
    "What the route can be told from",
    "share of the expert's entropy; grey: shuffled labels",
    points,
    "MoE layer",
    "I / H",
)

# %%
ceiling = {layer: 1 - math.log(config.experts_per_token) / found[layer, "token"].entropy for layer in routes}
lines = []
for layer in routes:
    token, place, domain = (found[layer, name].fraction.value for name in ("token", "position", "kind of document"))
    assert token <= ceiling[layer]
    lines.append(
        f"- layer {layer}: token {token:.2f} of at most {ceiling[layer]:.2f}, kind {domain:.2f}, position {place:.2f}"
    )
first, final = config.moe_layers[0], config.moe_layers[-1]
trend = found[final, "token"].fraction.value - found[first, "token"].fraction.value
Markdown(
    "\n".join(lines)
    + f"\n\nFrom the first to the last MoE layer the token's part {'falls' if trend < 0 else 'grows'} by "
    f"{abs(trend):.2f}: deeper routers choose {'less' if trend < 0 else 'more'} by the word itself."
)

# %% [markdown]
# Which kinds go where? Rows sum to k. A kind's tokens are not a fair sample of tokens, so part of this *is* the
# token: phone books are full of digits.

# %%
special = domain_specialization(routes[final], kind[routes[final].prompts])
assert torch.allclose(special.share.sum(1), torch.tensor(float(config.experts_per_token), dtype=torch.float64))
routing_figures.specialization(special.share.numpy(), list(DOMAINS), special.chance, final)

# %%
row, expert = divmod(int(special.share.argmax()), config.num_experts)
favourite = list(DOMAINS)[row]
Markdown(
    f"The strongest preference in layer {final}: {special.share[row, expert]:.0%} "
    f"[{special.low[row, expert]:.0%}, {special.high[row, expert]:.0%}] of the tokens of *{favourite}* use expert "
    f"{expert}; of all tokens {special.overall[expert]:.0%} do, and an even choice would be {special.chance:.0%}."
)

# %% [markdown]
# ## 4. What would it cost on several devices?
#
# With the experts spread over devices, a step takes as long as its busiest device: the *straggler factor* is its load
# over the mean. A system that instead gives each expert a fixed capacity drops the tokens that come too late. The
# prompts are shuffled first: windows of a single kind of text would make it worse than in mixed traffic.

# %%
from jambascope.hooks.expert_parallel import parallel_table

DEVICES, WINDOW = 4, 512
order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0)).tolist()
mixed = capture_routing(model, [prompts[i] for i in order])
parallel = pd.DataFrame(parallel_table(mixed, DEVICES, window=WINDOW, capacity_factors=(1.0, 1.25, 2.0), draws=300))
stragglers = parallel[parallel.measure.str.startswith("straggler")]
assert stragglers.value.between(1, DEVICES).all()
dropped = parallel[parallel.measure.str.startswith("dropped")]
points = []
for r in dropped.itertuples():
    value, low, high, *chance = (100 * v for v in (r.value, r.low, r.high, r.chance_low, r.chance_high))
    points.append(Estimate(f"{r.layer}", r.measure.split(", ")[1], value, low, high, tuple(chance)))
estimates(
    "Choices that find their expert full",
    f"windows of {WINDOW} tokens; grey: blind choices",
    points,
    "MoE layer",
    "dropped (% of choices)",
)

# %%
Markdown(
    f"On {DEVICES} devices a step takes {stragglers.value.min():.2f} to {stragglers.value.max():.2f} times as long as "
    f"with an even load (blind choices: {stragglers.chance.mean():.2f}). Without slack (capacity factor 1) "
    f"{dropped[dropped.measure.str.endswith(' 1')].value.mean():.0%} of the choices are dropped, with twice the room "
    f"{dropped[dropped.measure.str.endswith(' 2')].value.mean():.1%}."
)

# %% [markdown]
# ## 5. Used, but needed?
#
# So far we only looked. To learn whether a preference matters, take the expert away: with `form="masked"` its logit
# becomes -inf and its tokens are routed again, so that what is measured is not just a missing addend. The loss is
# that of the words which the context determines (the digits of a phone number, the label of a review).
#
# First a control of the method: tokens that are forced onto the very routes that they take anyway must predict the
# same.

# %%
untouched, forced = run(model, prompt).logits, run(model, prompt, freeze_routes(model, prompt)).logits
assert torch.allclose(untouched, forced, atol=1e-4)
Markdown(f"Largest change of a logit on the forced route: {(untouched - forced).abs().max():.1e}.")

# %%
from jambascope.zoo.scoring import answer_scores

EACH = 4  # documents of a kind: its shortest, to be quick
by_kind = [documents[i : i + PER_DOMAIN] for i in range(0, len(documents), PER_DOMAIN)]
asked = [doc for own in by_kind for doc in sorted(own, key=lambda doc: len(doc.words))[:EACH]]
of = torch.arange(len(asked)) // EACH


def losses() -> torch.Tensor:
    """Mean loss on the answers of each kind of document, nats."""
    each = answer_scores(model, asked).losses.nanmean(1)
    return torch.stack([each[of == d].nanmean() for d in range(len(DOMAINS))])


with torch.no_grad():
    whole = losses()
    need = {}
    for layer in config.moe_layers:
        without = []
        for expert in range(config.num_experts):
            with model.hooks(hooks(model, AblateExperts(layer, experts=[expert], form="masked"))):
                without.append(losses() - whole)
        need[layer] = torch.stack(without, 1)  # [kind, expert]
use = {layer: domain_specialization(routing, kind[routing.prompts]).share for layer, routing in routes.items()}
routing_figures.use_and_need(
    {layer: share.numpy() for layer, share in use.items()},
    {layer: n.numpy() for layer, n in need.items()},
    list(DOMAINS),
)

# %% [markdown]
# Does use predict need? Within each kind of document and layer, rank the experts by use and by need, and correlate
# the ranks. For chance, experts are exchanged at random before the ranks are compared.

# %%


def ranks(values: torch.Tensor) -> torch.Tensor:
    ranked = values.argsort(-1).argsort(-1).double()
    return (ranked - ranked.mean(-1, keepdim=True)) / ranked.std(-1, keepdim=True, correction=0)


used, needed = ranks(torch.stack(list(use.values()))), ranks(torch.stack(list(need.values())))  # [layer, kind, expert]
observed = float((used * needed).mean())
generator = torch.Generator().manual_seed(0)
blind = torch.stack(
    [(used * needed.gather(-1, torch.rand(used.shape, generator=generator).argsort(-1))).mean() for _ in range(1000)]
)
chance = against_chance(observed, blind)
stacked = torch.stack(list(need.values()))
assert stacked.isfinite().all() and abs(observed) <= 1
layer, row, expert = np.unravel_index(int(stacked.argmax()), stacked.shape)
Markdown(
    f"Mean rank correlation {observed:.2f}; chance [{chance.low:.2f}, {chance.high:.2f}], p = {chance.p_value:.3f}; "
    f"the same order would be 1.\n\nThe largest loss: *{list(DOMAINS)[row]}* without expert {expert} of layer "
    f"{config.moe_layers[layer]}, {stacked.max():+.2f} nats; {use[config.moe_layers[layer]][row, expert]:.0%} of its "
    f"tokens had used it. The median change over all kinds and experts is {stacked.median():+.3f} nats: that is what a "
    "typical expert is worth to a kind of text when its tokens can go elsewhere."
)

# %% [markdown]
# ## What to take along
#
# A load without its chance level says little, and a preference without an ablation says only where tokens went. To go
# on: `hooks.routing_sets` (which experts are chosen together), `jambascope study list` for the study over several
# models and seeds, and `jambascope dashboard` to look at single prompts.
