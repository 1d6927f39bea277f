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
# # Where is this computed? A first activation-patching study
#
# Our model reads a small table and looks something up in it:
#
# > map : ice monkey , tunnel jar , quickly crown , squirrel falcon ; tunnel -> **jar**
#
# Somewhere between the tokens of the table and the prediction at the end, *jar* travels from its place to the arrow,
# and something decides that it is *jar* and not *crown*. **Activation patching** finds the way: run a *clean* prompt
# and a *corrupted* one that differs in what we ask about, put one activation of the clean run into the corrupted run,
# and see how much of the clean answer comes back.
#
# In a hybrid model the candidates are more than in a Transformer: Mamba layers move information too, through their
# convolution (the last few tokens) and through their state (everything before). So:
#
# 1. By what way does the *value* get from the table to the end?
# 2. Which component carries it: attention or Mamba, which heads?
# 3. How does the value's place know its *key*?
#
# We build the loop by hand first and then let `patch_sweep` run it.

# %%
import time

import numpy as np
import torch
from IPython.display import Markdown

from jambascope import HookedJamba
from jambascope.hooks import run
from jambascope.hooks.interventions import Patch
from jambascope.hooks.sweep import Node, logit_difference, patch_sweep, probability
from jambascope.studies.figures.estimates import Estimate, estimates
from jambascope.studies.figures.patching import effect_map
from jambascope.studies.figures.theme import in_notebook

in_notebook()
model = HookedJamba.from_pretrained("jamba-micro")
config = model.config
layers = list(range(config.n_layers))
Markdown(
    f"Attention in layer {', '.join(map(str, config.attention_layers))}, Mamba in layers "
    f"{', '.join(map(str, config.ssm_layers))}."
)

# %% [markdown]
# ## Prompts, and a number to watch
#
# The corruption decides what is being asked. We exchange two *values* and leave everything else as it is, so that the
# right answer changes and nothing unusual enters the model (noise would). Both prompts have the same length: a
# position means the same in both.
#
# One pair proves little; we take several, with other words and the same form.

# %%
from jambascope.zoo.documents import recall

PAIRS, ENTRIES = 16, 4
ASKED, OTHER = 1, 2  # entries of the table: the one asked for, and the one it is exchanged with
KEY, VALUE = 3, 4  # positions of an entry's words, of the first one; entries are three tokens apart, <bos> is at 0
rng = np.random.default_rng(0)
tables = [recall(rng, "held_out", entries=ENTRIES, questions=0).words for _ in range(PAIRS)]


def exchanged(table, word: int) -> list[str]:
    """The table with the keys (``word`` = KEY) or values (VALUE) of the two entries exchanged."""
    i, j = (word - 1 + 3 * entry for entry in (ASKED, OTHER))
    table = list(table)
    table[i], table[j] = table[j], table[i]
    return table


question = [[";", table[KEY - 1 + 3 * ASKED], "->"] for table in tables]
clean = [" ".join([*table, *q]) for table, q in zip(tables, question, strict=True)]
corrupted = [" ".join([*exchanged(table, VALUE), *q]) for table, q in zip(tables, question, strict=True)]
right, wrong = ([table[VALUE - 1 + 3 * entry] for table in tables] for entry in (ASKED, OTHER))
words = model.to_str_tokens(clean[0])
end = len(words) - 1
Markdown(f"clean: {clean[0]} **{right[0]}**\n\ncorrupted: {corrupted[0]} **{wrong[0]}**")

# %% [markdown]
# The metric: the logit of the clean answer minus that of the corrupted one, at the last position. Logit differences
# are linear in what layers add to the stream, which probabilities are not. Is there anything to explain? Clean runs
# should be far above zero, corrupted ones far below.

# %%
ids = torch.tensor([[model.to_single_token(word) for word in answers] for answers in (right, wrong)])


def difference(logits: torch.Tensor, pair=slice(None)) -> torch.Tensor:
    return (logits[:, -1].gather(1, ids[0, pair, None]) - logits[:, -1].gather(1, ids[1, pair, None]))[:, 0]


with torch.no_grad():
    of_clean, of_corrupted = difference(model(clean)), difference(model(corrupted))
usable = (of_clean > 0) & (of_corrupted < 0)
assert usable.all(), "patch only pairs that the model gets right both ways"
Markdown(
    f"Logit difference, mean of {PAIRS} pairs: clean {of_clean.mean():+.1f}, corrupted {of_corrupted.mean():+.1f}. "
    f"Both answers right in {int(usable.sum())} of {PAIRS} pairs."
)

# %% [markdown]
# ## The loop, by hand
#
# For the first pair: keep the clean residual stream, then for every layer and position run the corrupted prompt with
# that one vector replaced. The *effect* is (patched - corrupted) / (clean - corrupted): 0 is nothing, 1 is all of it.

# %%
_, cache = model.run_with_cache(clean[0], names_filter=[f"blocks.{layer}.hook_resid_pre" for layer in layers])
first, start = slice(0, 1), time.perf_counter()
by_hand = np.zeros((len(layers), len(words)))
for layer in layers:
    for position in range(len(words)):

        def put_in(stream, hook, position=position):  # [batch, position, d_model]
            stream[:, position] = cache[hook.name][:, position]
            return stream

        with torch.no_grad():
            logits = model.run_with_hooks(corrupted[0], fwd_hooks=[(f"blocks.{layer}.hook_resid_pre", put_in)])
        by_hand[layer, position] = difference(logits, first)
loop_seconds = time.perf_counter() - start
by_hand = (by_hand - float(of_corrupted[0])) / float(of_clean[0] - of_corrupted[0])
effect_map("Residual stream, one pair", "1: the clean answer is back; 0: nothing changed", by_hand, layers, words)

# %% [markdown]
# ## The same, for all pairs at once
#
# Nothing below a patched layer or left of a patched position can change, so most of those runs repeat what is known.
# `patch_sweep` leaves that out, computes cells together, and takes many pairs.

# %%
metric = logit_difference(right, wrong)
start = time.perf_counter()
alone = patch_sweep(model, clean[0], corrupted[0], logit_difference(right[0], wrong[0]), "resid_pre", progress=False)
sweep_seconds = time.perf_counter() - start
assert np.allclose(alone.effects()["resid_pre"].values[0, 0], by_hand, atol=1e-3)

found = patch_sweep(model, clean, corrupted, metric, ["resid_pre", "mixer_out", "mlp_out"], progress=False)
stream = found.effects()["resid_pre"].sel(metric="logit_difference")  # [pair, layer, position]
effect_map("Residual stream", f"clean into corrupted, mean of {PAIRS} pairs", stream.mean("pair").values, layers, words)

# %%
value = VALUE + 3 * ASKED
assert (stream.sel(position=slice(0, value - 1)) == 0).all()  # up to there the prompts are the same
leaves = max(layer for layer in layers if float(stream.sel(layer=layer, position=value).mean()) > 0.5)
arrives = min(layer for layer in layers if float(stream.sel(layer=layer, position=end).mean()) > 0.5)
Markdown(
    f"Equal to the loop, in {sweep_seconds:.2f} s instead of {loop_seconds:.2f} s for a pair.\n\n"
    f"Until it enters layer {leaves} the answer stands at the value's own position ({value}); from layer {arrives} on "
    f"it stands at the end ({end}). So layer {leaves}, which is {config.mixers[leaves]}, moves it, over {end - value} "
    "tokens."
)

# %% [markdown]
# ## Are the zeros and ones what they should be?
#
# Three controls before we believe a picture.
#
# - *Nothing patched*: the corrupted run patched with its own activation must give 0.
# - *Everything patched*: the whole stream at layer 0 must give 1.
# - *A stranger's activation*: patch in the stream of **another** table's value. If that too brings the answer back,
#   the effect is that of disturbing the cell, not of what it holds.

# %%
point = f"blocks.{leaves}.hook_resid_pre"
_, itself = model.run_with_cache(corrupted, names_filter=[point])
with torch.no_grad():
    again = run(model, corrupted, Patch.from_cache(model, itself, "resid_pre", leaves, positions=value)).logits
nothing = (difference(again) - of_corrupted) / (of_clean - of_corrupted)
everything = patch_sweep(model, clean, corrupted, metric, "resid_pre", layers=[0], positions="all", progress=False)
everything = everything.effects()["resid_pre"].sel(metric="logit_difference", layer=0)
assert nothing.abs().max() < 1e-3 and np.allclose(everything, 1, atol=1e-3)
Markdown(
    f"Nothing: at most {nothing.abs().max():.1e} from 0. "
    f"Everything: at most {float(abs(everything - 1).max()):.1e} from 1."
)

# %% [markdown]
# For the stranger we watch a second number, the probability of the right answer. The runs that are patched into are
# the same as before, so the effect of both can be given as a share of clean less corrupted.

# %%
metrics = [metric, probability(right)]
cell = dict(nodes="resid_pre", layers=[leaves], positions=[value], progress=False)
own = patch_sweep(model, clean, corrupted, metrics, **cell)
strangers = clean[1:] + clean[:1]  # other keys and values at the same positions
stranger = patch_sweep(model, strangers, corrupted, metrics, **cell)
gap = own.clean - own.corrupted
found_by = {}
for name, swept in (("its own", own), ("another", stranger)):
    effect = (swept.values["resid_pre"].sel(layer=leaves, position=value) - own.corrupted) / gap
    for measure in ("logit_difference", "probability"):
        samples = torch.as_tensor(effect.sel(metric=measure).values)
        found_by[measure, name] = Estimate.of(measure.replace("_", " "), name, samples)
estimates(
    f"The value's stream in layer {leaves}, and a stranger's",
    f"95 % intervals over {PAIRS} pairs; 1: as in the clean run", list(found_by.values()), "metric", "effect",
)  # fmt: skip

# %%
Markdown(
    f"Logit difference: its own stream {found_by['logit_difference', 'its own']}, a stranger's "
    f"{found_by['logit_difference', 'another']}.\n\n"
    f"Probability of the right answer: its own {found_by['probability', 'its own']}, a stranger's "
    f"{found_by['probability', 'another']}; a guess among the {ENTRIES - 1} values left in the table would give "
    f"{1 / (ENTRIES - 1):.2f}."
)

# %% [markdown]
# A stranger's stream *removes* the corrupted answer, and a logit difference counts that too: part of every effect is
# not "the answer is back" but "the other one is gone". (The clean answer is still in the corrupted table, at another
# key, so a guess can find it.) Only a second metric or a control such as this tells them apart.
#
# ## 2. Which component?
#
# The stream at a place holds all that was ever added there. Patch what single layers *add* instead: the mixer
# (attention or Mamba) and the MLP. Effects of components need not add up to 1: later layers react to them.

# %%
mixers = found.effects()["mixer_out"].sel(metric="logit_difference").mean("pair").values
# mixer_out is what Mamba layers add; what attention adds is attn_out
attention = patch_sweep(model, clean, corrupted, metric, ["attn_out", "z"], progress=False)
added = attention.effects()["attn_out"].sel(metric="logit_difference")
mixers[config.attention_layers, :] = added.mean("pair").values[config.attention_layers, :]
effect_map("What attention and Mamba add", f"clean into corrupted, mean of {PAIRS} pairs", mixers, layers, words)

# %%
mlps = found.effects()["mlp_out"].sel(metric="logit_difference").mean("pair").values
effect_map("What MLPs and experts add", f"clean into corrupted, mean of {PAIRS} pairs", mlps, layers, words)

# %%


def largest(what: str, effects: np.ndarray, among: tuple[int, ...]) -> str:
    i, position = np.unravel_index(int(np.abs(effects[list(among)]).argmax()), (len(among), len(words)))
    where = f"layer {among[i]} at “{words[position]}” ({position})"
    return f"{what}: {effects[among[i], position]:.2f}, in {where}"


Markdown(
    "Largest effect of\n\n"
    f"- {largest('an attention layer', mixers, config.attention_layers)}\n"
    f"- {largest('a Mamba layer', mixers, config.ssm_layers)}\n"
    f"- {largest('an MLP', mlps, tuple(layers))}"
)

# %% [markdown]
# One head or all? Choosing the best of several heads flatters it, so choose on half of the pairs and read the number
# off the other half.

# %%


def shown(values: torch.Tensor) -> str:
    return str(Estimate.of("", "", values))


home = config.attention_layers[0]
heads = torch.as_tensor(
    attention.effects()["z"].sel(metric="logit_difference", layer=home, position=end).values
)  # [pair, head]
finding, confirming = heads[: PAIRS // 2], heads[PAIRS // 2 :]
points = []
for head in range(config.n_heads):
    for half, values in (("finding half", finding), ("confirming half", confirming)):
        points.append(Estimate.of(f"{head}", half, values[:, head]))
estimates(
    f"Heads of layer {home} at the end", "clean into corrupted; 95 % intervals over pairs", points, "head (index)",
    "effect",
)  # fmt: skip

# %%
best = int(finding.mean(0).argmax())
others = [head for head in range(config.n_heads) if head != best]
Markdown(
    f"Best on the finding half: head {best}. On the confirming half it restores {shown(confirming[:, best])}, the "
    f"other heads {shown(confirming[:, others].mean(1))} each; all heads together (attn_out) "
    f"{shown(torch.as_tensor(added.sel(layer=home, position=end).values))}. The heads' effects sum to "
    f"{heads.sum(1).mean():.2f}."
)

# %% [markdown]
# ## Needed, not only enough
#
# Clean into corrupted (*denoising*) asks what is **enough** to bring the answer back. The reverse, corrupted into
# clean (*noising*), asks what is **needed**. With a single route both agree. Where copies exist each is enough and
# none is needed; where several parts are needed together none is enough.

# %%
noised = patch_sweep(model, clean, corrupted, metric, ["resid_pre", "z"], direction="noise", progress=False)
needed = torch.as_tensor(noised.effects()["z"].sel(metric="logit_difference", layer=home, position=end).values)
points = []
for name, values in (("enough (denoise)", heads), ("needed (noise)", needed)):
    for head in range(config.n_heads):
        points.append(Estimate.of(f"{head}", name, values[:, head]))
estimates(f"Heads of layer {home} at the end", "95 % intervals over all pairs", points, "head (index)", "effect")

# %%
back = torch.as_tensor(
    noised.effects()["resid_pre"].sel(metric="logit_difference", layer=leaves, position=value).values
)
forth = torch.as_tensor(stream.sel(layer=leaves, position=value).values)
Markdown(
    f"The value's stream in layer {leaves}: enough {shown(forth)}, needed {shown(back)}. No head is "
    f"worth more than {max(heads.mean(0).max(), needed.mean(0).max()):.2f} in either direction."
)

# %% [markdown]
# ## 3. How does the value know its key?
#
# The question names *tunnel*, yet what is fetched stands one token later. In a Transformer a "previous-token
# head" of an earlier layer writes the key beside the value. Here the layers before are Mamba layers. Corrupt the
# *keys* instead, exchange the two in the table, and follow them. Both changed places belong together, so patch them
# as one cell: a tuple of positions.

# %%
rekeyed = [" ".join([*exchanged(table, KEY), *q]) for table, q in zip(tables, question, strict=True)]
places = {
    "keys": tuple(KEY + 3 * e for e in (ASKED, OTHER)),
    "values": tuple(VALUE + 3 * e for e in (ASKED, OTHER)),
    "commas": tuple(VALUE + 1 + 3 * e for e in (ASKED, OTHER)),
    "question": (end - 1,),
    "end": (end,),
}
nodes = ["resid_pre", "ssm_state", Node("ssm_state", conv=True)]
keyed = patch_sweep(model, clean, rekeyed, metric, nodes, positions=places.values(), progress=False)
effects = {name: e.sel(metric="logit_difference") for name, e in keyed.effects().items()}
effect_map(
    "Residual stream, keys exchanged", f"clean into corrupted, mean of {PAIRS} pairs",
    effects["resid_pre"].mean("pair").values, layers, list(places), position_title="patched positions", numbered=False,
)  # fmt: skip

# %%
at_keys, at_values = (effects["resid_pre"].mean("pair").values[:, i] for i in (0, 1))
moved = np.minimum(-np.diff(at_keys), np.diff(at_values))  # what leaves the keys and arrives at the values
steps = [layer for layer in layers[:-1] if moved[layer] > 0.1]
Markdown(
    "Effect of the stream at the keys, and at the values, where it enters each layer:\n\n"
    + "\n".join(
        f"- layer {layer} ({config.mixers[layer]}): {at_keys[layer]:.2f} and {at_values[layer]:.2f}"
        for layer in layers[: leaves + 1]
    )
    + f"\n\nThe key moves one token on, to its value, in layers {', '.join(map(str, steps)) or 'none'}."
)

# %% [markdown]
# With what, the state or the convolution? Patch a Mamba layer's memory after the keys: its state alone, or together
# with the convolution's last inputs. The memory after a token is all by which a Mamba layer hands something on.

# %%
handed = {"state alone": "ssm_state", "state and convolution": "ssm_state with conv"}
points = []
for layer in (layer for layer in config.ssm_layers if layer < leaves):
    for name, node in handed.items():
        values = torch.as_tensor(effects[node].values[:, layer, 0])  # after the keys
        points.append(Estimate.of(f"{layer}", name, values))
estimates(
    "What a Mamba layer hands on after the keys", f"clean into corrupted; 95 % intervals over {PAIRS} pairs", points,
    "Mamba layer", "effect",
)  # fmt: skip

# %%
alone_sum, both_sum = (sum(p.value for p in points if p.series == name) for name in handed)
Markdown(
    f"Summed over these layers: states alone {alone_sum:.2f}, with the convolution {both_sum:.2f}. The convolution "
    f"spans {config.d_conv} tokens, enough for a step of one."
)

# %% [markdown]
# ## What to take along
#
# Each step was a question with an answer that could have been otherwise: which place, which layer, which component,
# which memory. What makes it evidence are the controls (no-op, full patch, stranger), several pairs with intervals,
# and heads confirmed on pairs that did not choose them.
#
# Not shown: that *other* models do the same (repeat it over training seeds), or other tasks. To go on: `path_patch`
# for the way from one component to another, `knock_out_sweep` for single edges, `screen` for a first look by
# gradients, and `jambascope study list` for the same questions as studies with reports.
