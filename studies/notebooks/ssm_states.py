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
# # What is in the state? The memory of Mamba layers on one prompt
#
# Attention keeps every key and value and looks them up. A Mamba layer keeps one *state* of fixed size, a matrix h of
# E channels by N numbers, and overwrites it at every token:
#
#     h_t[e, n] = exp(Δ_t[e] A[e, n]) h_{t-1}[e, n]  +  Δ_t[e] B_t[n] x_t[e]
#     y_t[e]    = sum over n of C_t[n] h_t[e, n]  +  D[e] x_t[e]
#
# A < 0 is learned and fixed. The step size Δ, the write B and the read C depend on the token: a large Δ forgets the
# past and writes the token down, a small one passes it by. Before that, a causal convolution over four tokens makes
# x, so a layer also remembers its last three inputs word for word.
#
# Our prompt announces a word and asks for it again after twenty others. Four questions:
#
# 1. How large is the state, and how long does what is written stay?
# 2. Where does a layer look, put in terms of attention?
# 3. Can the announced word be read off the state?
# 4. Does the answer depend on it? (That a thing is there does not mean that it is used.)

# %%
import numpy as np
import torch
from IPython.display import Markdown

from jambascope import HookedJamba
from jambascope.hooks import run
from jambascope.hooks.interventions import KnockOutEdges, PinState
from jambascope.hooks.ssm import (
    capture_states,
    channel_groups,
    channel_half_life,
    group_retention,
    half_life,
    state_norms,
)  # fmt: skip
from jambascope.studies.figures import attention as attention_figures
from jambascope.studies.figures import ssm as ssm_figures
from jambascope.studies.figures.estimates import Estimate, estimates
from jambascope.studies.figures.patching import effect_map
from jambascope.studies.figures.theme import in_notebook

in_notebook()
model = HookedJamba.from_pretrained("jamba-micro")
config = model.config
Markdown(
    f"Mamba layers: {', '.join(map(str, config.mamba_layers))}; "
    f"attention: {', '.join(map(str, config.attention_layers))}. "
    f"A state has {config.d_inner} channels x {config.d_state} numbers, whatever the length of the prompt."
)

# %% [markdown]
# ## The prompts
#
# One to look at, and others like it to measure with: the same form, other words.

# %%
from jambascope.zoo.documents import KEYS, NOISE

BEFORE, BETWEEN, PROMPTS = 3, 20, 24
SECRETS = KEYS[32:]
rng = np.random.default_rng(0)


def ask(secret: str) -> str:
    noise = list(rng.choice(NOISE, BEFORE + BETWEEN))
    return " ".join([*noise[:BEFORE], "secret", secret, *noise[BEFORE:], "secret"])


secrets = [str(word) for word in rng.choice(SECRETS, PROMPTS)]
prompts = [ask(secret) for secret in secrets]
prompt, tokens = prompts[0], model.to_tokens(prompts[0])
words = model.to_str_tokens(prompt)
said = BEFORE + 2  # position of the announced word; <bos> is at 0
last = len(words) - 1
assert words[said] == secrets[0] and words[last] == "secret"

answer_ids = torch.tensor([model.to_single_token(secret) for secret in secrets])


@torch.no_grad()
def log_p(interventions=()) -> torch.Tensor:
    """Log probability of each prompt's announced word at its end, nats."""
    logits = run(model, prompts, interventions).logits[:, -1]
    return logits.log_softmax(-1).gather(1, answer_ids[:, None])[:, 0]


base = log_p()
Markdown(
    f"> {prompt} ...\n\nThe model gives the announced word probability {base[0].exp():.3f} here, and "
    f"{base.exp().mean():.3f} on average over {PROMPTS} prompts; a guess among all {config.d_vocab} words would give "
    f"{1 / config.d_vocab:.4f}."
)

# %% [markdown]
# ## The recurrence, by hand
#
# Nothing is hidden: the cache holds dt (the Δ above), B, C and x, and the states if they are asked for by name. Step
# through time ourselves and compare.

# %%
LAYER = 3
point = f"blocks.{LAYER}.mixer.hook_"
_, cache = model.run_with_cache(prompt, names_filter=[point + name for name in ("dt", "B", "C", "x", "y", "ssm_state")])
dt, B, C, x = (cache[point + name][0] for name in ("dt", "B", "C", "x"))
mixer = model.blocks[LAYER].mixer
A = -torch.exp(mixer.A_log)  # [channel, state]

h = torch.zeros(config.d_inner, config.d_state)
states, reads = [], []
for t in range(len(words)):
    h = torch.exp(dt[t, :, None] * A) * h + dt[t, :, None] * B[t] * x[t, :, None]
    states.append(h)
    reads.append(h @ C[t] + mixer.D * x[t])
by_hand = torch.stack(states, 1).detach()  # [channel, position, state]
of_states = (by_hand - cache["ssm_state", LAYER][0]).abs().max() / by_hand.abs().max()
of_reads = (torch.stack(reads) - cache[point + "y"][0]).abs().max() / cache[point + "y"].abs().max()
assert of_states < 1e-4 and of_reads < 1e-4
Markdown(
    f"Largest difference, relative to the largest value: states {of_states:.1e}, what is read from them {of_reads:.1e}."
)

# %% [markdown]
# ## 1. How large, and for how long?
#
# The root mean square of each layer's state after each token. A state that only grew would be hoarding; one that
# follows the last token would be forgetting.

# %%
norms = state_norms(model, tokens)
ssm_figures.layer_norms({layer: norm.numpy() for layer, norm in norms.items()}, words, LAYER, said)

# %% [markdown]
# How long does an entry stay? At the prompt's mean step size it halves in ln 2 / (|A| mean Δ) tokens. Mamba is
# *initialised* to a wide range of half-lives, so a wide range is no finding: compare with a model of the same shape
# that has not been trained.

# %%
from jambascope.model import initialize

torch.manual_seed(0)
untrained = HookedJamba(config)
initialize(untrained, std=0.05)
points, median, lasting = [], {}, []
for which, one in (("trained", model), ("untrained", untrained)):
    for layer in config.mamba_layers:
        layer_states = capture_states(one, tokens, layer, positions=[last])
        lives = half_life(layer_states.A, layer_states.dt).flatten()
        low, median[which, layer], high = torch.quantile(lives, torch.tensor([0.05, 0.5, 0.95])).tolist()
        points.append(Estimate(f"{layer}", which, median[which, layer], low, high))
        if which == "trained":
            lasting.append(float((lives >= last - said).double().mean()))
estimates(
    "How long entries of the state last", "median and middle 90 % of a layer's entries", points, "Mamba layer",
    "half-life (tokens)", log=True,
)  # fmt: skip

# %%
ratio = [median["trained", layer] / median["untrained", layer] for layer in config.mamba_layers]
Markdown(
    f"Medians of the trained layers lie between {min(median['trained', i] for i in config.mamba_layers):.1f} and "
    f"{max(median['trained', i] for i in config.mamba_layers):.1f} tokens, {min(ratio):.2f} to {max(ratio):.2f} times "
    f"those of the untrained model. The question is asked {last - said} tokens after the word: {min(lasting):.0%} to "
    f"{max(lasting):.0%} of a layer's entries last at least that long."
)

# %% [markdown]
# Half-lives are means over the prompt. Exactly: what part of the state after each token is left at the end, in groups
# of channels sorted by half-life?

# %%
layer_states = capture_states(model, tokens, LAYER)
lives = half_life(layer_states.A, layer_states.dt)
groups = channel_groups(lives, groups=4)
kept = group_retention(layer_states.A, layer_states.dt, last, groups)
assert torch.allclose(kept[:, last], torch.ones(4)) and bool((kept.diff(dim=1) >= -1e-6).all())
spans = [tuple(channel_half_life(lives)[members][[0, -1]].tolist()) for members in groups]
ssm_figures.group_lines(
    kept.numpy(), spans, words, title=f"What is left at the end, layer {LAYER}",
    subtitle="share of the state after each token that remains after the last; mean of a group of channels",
    unit="share left", position=said,
)  # fmt: skip

# %%
Markdown(
    f"Of what stood in layer {LAYER} after the announced word, {kept[-1, said]:.0%} is left at the end in the slowest "
    f"quarter of the channels, {kept[0, said]:.1%} in the fastest."
)

# %% [markdown]
# ## 2. Where does a layer look?
#
# Unrolled, a Mamba layer multiplies by a causal matrix, like attention: alpha[i, j] says with what weight token i
# reads what token j wrote. These rows are exact, but signed and one per channel; for a picture take magnitudes,
# average over channels and scale rows to one. The attention layer is shown as the mean over its heads.

# %%
from jambascope.hooks.hidden_attention import attention_map
from jambascope.hooks.mixer_terms import capture_terms

terms = capture_terms(model, tokens)
_, pattern = model.run_with_cache(prompt, names_filter=lambda name: name.endswith("hook_pattern"))
rows, kinds = {}, dict(enumerate(config.mixers))
for layer, mixer_kind in kinds.items():
    mamba = mixer_kind == "mamba"
    row = attention_map(terms[layer], [last])[0, 0] if mamba else pattern["pattern", layer][0, :, last].mean(0)
    assert abs(float(row.sum()) - 1) < 1e-4
    rows[layer] = row.numpy()
attention_figures.looks_by_layer(rows, kinds, words, last)

# %%
even = 1 / len(words)
on_word = {layer: float(row[said]) for layer, row in rows.items()}
best = max(on_word, key=on_word.get)
mamba_best = max((layer for layer in config.mamba_layers), key=on_word.get)
Markdown(
    f"The word to be said again stands at position {said}. Layer {best} ({config.mixers[best]}) gives it "
    f"{on_word[best]:.0%} of its weight. The Mamba layer that looks there most, layer {mamba_best}, gives "
    f"{on_word[mamba_best]:.1%}; even would be {even:.1%}."
)

# %% [markdown]
# ## 3. Can the word be read off the state?
#
# Fit a linear probe: from the state after the *last* word before the question, tell which of four words was
# announced. Two things could fool us. A probe with thousands of inputs can fit anything, so it is scored on prompts
# that it has not seen; and beside it stands a control, the same probe for shuffled labels.

# %%
from jambascope.hooks.probes import collect, probe

candidates, samples = SECRETS[:4], 160
labels = torch.as_tensor(rng.integers(len(candidates), size=samples))
asked = model.to_tokens([ask(candidates[k]) for k in labels])
names = [f"blocks.{layer}.mixer.hook_ssm_state" for layer in config.mamba_layers]
held = collect(model, asked, names, positions=[last - 1])
features = torch.stack([held[name].flatten(1) for name in names], 1)  # [prompt, layer, channel x state]
scores = probe(features, labels, method="ridge", controls=5)
points = []
for i, layer in enumerate(config.mamba_layers):
    score, low, high = (float(v[i]) for v in (scores.score, scores.low, scores.high))
    points.append(Estimate(f"{layer}", "probe", score, low, high, (scores.chance, scores.chance)))
    points.append(Estimate(f"{layer}", "shuffled labels", float(scores.control[i])))
estimates(
    "Which word was announced?", f"linear probes of the state {BETWEEN} words later; grey: commonest word", points,
    "Mamba layer", "accuracy on unseen prompts",
)  # fmt: skip

# %%
best_layer = config.mamba_layers[int(scores.score.argmax())]
low = [layer for layer, s in zip(config.mamba_layers, scores.selectivity_low, strict=True) if s > 0]
Markdown(
    f"Best: layer {best_layer}, {scores.score.max():.0%} right [{scores.low[scores.score.argmax()]:.0%}, "
    f"{scores.high[scores.score.argmax()]:.0%}] on {samples} prompts; chance {scores.chance:.0%}, control "
    f"{scores.control[scores.score.argmax()]:.0%}. The interval of score less control lies above zero in "
    f"{len(low)} of {len(names)} layers ({', '.join(map(str, low)) or 'none'})."
)

# %% [markdown]
# ## 4. Does the answer depend on it?
#
# Erase a state: pin it to zero after one position. It is a causal edit: the recurrence goes on from the zeros, later
# tokens write as usual. What changes? Nothing before; that is the check that an edit is where we think it is. After
# it, the KL divergence from the untouched prediction says how much the model minds, token by token.

# %%
ERASED = said


@torch.no_grad()
def divergence(interventions) -> torch.Tensor:
    """KL(untouched || edited) of the prediction at each position of the first prompt, nats."""
    clean, edited = (run(model, prompt, i).logits[0].double().log_softmax(-1) for i in ((), interventions))
    return (clean.exp() * (clean - edited)).sum(-1)


kl = torch.stack([divergence(PinState(layer, ERASED, 0.0)) for layer in config.mamba_layers])
assert kl[:, :ERASED].abs().max() < 1e-6, "the past cannot change"
assert kl[:, ERASED:].max() > 1e-6, "the future does"
effect_map(
    "Erasing one layer's state", f"after “{words[ERASED]}” ({ERASED}); the blank past cannot change",
    np.where(np.arange(len(words)) < ERASED, np.nan, kl.numpy()), config.mamba_layers, words,
    unit="KL (nats)", limit=float(kl.max()), signed=False, position_title="prediction after token (position)",
)  # fmt: skip

# %%
worst, when = np.unravel_index(int(kl.argmax()), kl.shape)
Markdown(
    f"The largest divergence, of layer {config.mamba_layers[worst]} after “{words[when]}” ({when}), is {kl.max():.3f} "
    f"nats. For scale: a model that lost the answer altogether would be {-np.log(1 / config.d_vocab):.1f} nats off."
)

# %% [markdown]
# For the answer itself, all prompts: erase the states of *all* Mamba layers at once, after each position in turn; then
# again together with the convolution's memory of its last three inputs.

# %%
changes: dict[str, dict[int, torch.Tensor]] = {"states": {}, "states and convolution": {}}
for position in range(said - 3, last + 1):
    for name, conv in (("states", None), ("states and convolution", 0.0)):
        erase = [PinState(layer, position, 0.0, conv=conv) for layer in config.mamba_layers]
        changes[name][position] = log_p(erase) - base
points = []
for name, by_position in changes.items():
    for position, change in by_position.items():
        points.append(Estimate.of(f"{position}", name, change))
estimates(
    "Erasing all Mamba layers at once",
    f"the word is announced at {said}, asked for at {last}; 95 % intervals over {PROMPTS} prompts",
    points, "erased after position", "change of log p(word) (nats)",
)  # fmt: skip

# %% [markdown]
# Zeros are a memory that no run ever has: what hurts might be the shock. The milder question puts in the memory of
# *another* prompt, after the token before the announced word: once of a prompt that says “secret” there as well, with
# other words around it, and once of a prompt that says some other word there. If the memory's only use is to know that
# “secret” was just said, the first changes nothing, and the second everything. Two cuts of attention stand beside them:
# the last token may no longer see the announced word, or another one.

# %%
after = said - 1
parts = ("hook_ssm_state", "hook_conv_state")
memory = [f"blocks.{layer}.mixer.{part}" for layer in config.mamba_layers for part in parts]
with_secret = [ask("lamp") for _ in range(PROMPTS)]
without = [prompt.replace("secret", str(rng.choice(NOISE)), 1) for prompt in with_secret]


def memory_of(others: list[str]) -> list[PinState]:
    donor = run(model, others, capture=memory).cache
    return [PinState.from_cache(model, donor, layer, after, with_conv=True) for layer in config.mamba_layers]


attention_layer = config.attention_layers[0]
tried = {
    "memory of a prompt with “secret”": memory_of(with_secret),
    "memory of one without": memory_of(without),
    "attention to the word cut": KnockOutEdges(attention_layer, edges=[(last, said)]),
    "attention to another word cut": KnockOutEdges(attention_layer, edges=[(last, said + 3)]),
}
effects = {name: log_p(interventions) - base for name, interventions in tried.items()}
points = []
for name, change in effects.items():
    points.append(Estimate.of(name, "change", change))
estimates(
    "What the answer depends on", f"95 % intervals over {PROMPTS} prompts", points, "changed",
    "change of log p(word) (nats)",
)  # fmt: skip

# %%


def shown(change: torch.Tensor) -> str:
    return str(Estimate.of("", "", change))


between = [position for position in changes["states"] if said < position < last - 4]
alone = torch.stack([changes["states"][position] for position in between]).mean(0)
both = {position: changes["states and convolution"][position] for position in (said - 3, after, last - 1)}
Markdown(
    f"Change of log p(word), nats, n = {PROMPTS}:\n\n"
    f"- all states erased at a position between announcement and question: {shown(alone)};\n"
    f"- with the convolution, after “secret” ({after}): {shown(both[after])}, states alone there "
    f"{shown(changes['states'][after])}; just before the question ({last - 1}): {shown(both[last - 1])}; before "
    f"anything was announced ({said - 3}, control): {shown(both[said - 3])};\n"
    + "\n".join(f"- {name}: {shown(change)};" for name, change in effects.items())
)

# %% [markdown]
# ## What to take along
#
# Read the list as a division of labour. An effect of erasing states between announcement and question would mean that
# they *carry* the word. An effect only at the announcement, only with the convolution, and only when the memory put in
# lacks “secret” means that Mamba layers *mark* the word (“I follow secret”) within the few tokens that the convolution
# spans, and that something else fetches it. A probe that succeeds where erasing does nothing has found information that
# this answer does not use.
#
# A pure Mamba model has nothing else to fetch with: ask the same of one. To go on: `notebooks/activation_patching.py`
# follows such a mark from layer to layer.
