"""What the Router page shows. T position, X expert."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

import numpy as np
import streamlit as st
import torch

from jambascope.dashboards.results import what_if
from jambascope.dashboards.session import View
from jambascope.dashboards.work import Report
from jambascope.errors import InputError
from jambascope.hooks import routing, routing_chance, routing_dependence, routing_sets
from jambascope.hooks.interventions import AblateExperts, ForceRoute, Intervention, hooks
from jambascope.studies.corpus import corpus, text_windows

LENGTH = 128
"""Tokens of a window of text."""
BATCH = 8
"""Windows that run together."""
SHUFFLES = 20


@st.cache_data(max_entries=32, show_spinner=False)
def _route(key: tuple, _view: View) -> dict[int, routing.Routing]:
    return routing.capture_routing(_view.model, _view.tokens)


def route(view: View) -> dict[int, routing.Routing]:
    """What the router of each MoE layer did with each token."""
    return _route(view.key, view)


@st.cache_data(max_entries=256, show_spinner=False)
def load_range(tokens: int, slots: int, experts: int) -> tuple[float, float]:
    """The middle 95 % of an expert's load by chance."""
    return routing_chance.load_range(tokens, slots, experts)


@st.cache_data(max_entries=256, show_spinner=False)
def variation_range(tokens: int, slots: int, experts: int) -> tuple[float, float]:
    """The middle 95 % of the load's CV by chance."""
    drawn = routing_chance.draw_counts(tokens, slots, experts).double()
    low, high = np.quantile(routing.load_variation(drawn).numpy(), [0.025, 0.975])
    return float(low), float(high)


# -- over a text ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """A file that was uploaded."""

    name: str
    words: str
    digest: str
    """SHA-256 of its bytes."""

    @classmethod
    def of(cls, name: str, content: bytes) -> Text:
        """Raises InputError where the bytes are no text."""
        name = PurePath(name.replace("\\", "/")).name[:80]
        try:
            words = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{name!r} is not UTF-8 text (byte {error.start}); save it as UTF-8 and try again"
            ) from None
        if "\0" in words:
            raise InputError(f"{name!r} holds zero bytes, so it is no text; give a plain text file")
        if not words.strip():
            raise InputError(f"{name!r} is empty; give a file with some words")
        return cls(name, words, hashlib.sha256(content).hexdigest())

    @property
    def key(self) -> tuple[str, str]:
        return self.name, self.digest


@dataclass(frozen=True, eq=False)
class Read:
    """What the routers did with many windows of text, each of one domain."""

    routes: dict[int, routing.Routing]
    domains: torch.Tensor
    """[prompts], index into ``names``."""
    names: tuple[str, ...]
    unknown: float
    """Share of tokens that are not in the vocabulary."""

    def labels(self, layer: int) -> torch.Tensor:
        """The domain of each token."""
        return self.domains[self.routes[layer].prompts]


def reader(view: View, files: tuple[Text, ...], windows: int) -> Callable[[Report], Read | None]:
    """A computation for :mod:`jambascope.dashboards.work`: ``windows`` of each file, or of the language's domains."""

    def compute(report: Report) -> Read | None:
        report(0, "preparing the text")
        batches, names = _batches(view, files, windows)
        parts, domains, unknown = [], [], []
        for done, (rows, own) in enumerate(batches, 1):
            parts.append(routing.capture_routing(view.model, rows))
            domains.append(own)
            unknown.append((rows[:, 1:] == getattr(view.model.tokenizer, "unk_token_id", None)).double().mean())
            if not report(done / len(batches), f"{done} of {len(batches)} batches of windows"):
                break
        routes = {layer: routing.concatenate(part[layer] for part in parts) for layer in view.model.config.moe_layers}
        return Read(routes, torch.cat(domains), names, float(torch.stack(unknown).mean()))

    return compute


def _batches(view: View, files: tuple[Text, ...], windows: int) -> tuple[list[tuple[torch.Tensor, ...]], tuple]:
    """(rows, domain of each) in an order in which every part of it is a fair sample; and the domains' names."""
    length = min(LENGTH, view.model.config.n_ctx)
    if not files:
        texts = corpus(view.model, (), windows, length, seed=0)
        return list(zip(texts.tokens.split(BATCH), texts.domains.split(BATCH), strict=True)), texts.names
    of_files = [text_windows(view.model, file.words, windows, length).split(BATCH) for file in files]
    rounds = range(max(map(len, of_files)))
    batches = [
        (own[i], torch.full((len(own[i]),), domain))
        for i in rounds
        for domain, own in enumerate(of_files)
        if i < len(own)
    ]
    return batches, tuple(file.name for file in files)


@dataclass(frozen=True, eq=False)
class Words:
    """Which tokens use which expert of one layer."""

    found: routing_dependence.VocabularySpecialization
    names: list[str]
    top: list[list[int]]
    """Rows of ``found`` whose tokens use each expert most."""
    least: int


@st.cache_data(max_entries=32, show_spinner=False)
def words(key: tuple, least: int, _view: View, _routing: routing.Routing) -> Words:
    """Vocabulary specialisation of the tokens that occur ``least`` times, or as often as the most frequent does.

    Args:
        key: all that decides the routing.
    """
    least = min(least, int(_routing.token_ids.bincount().max()))
    found = routing_dependence.vocabulary_specialization(_routing, least=least, shuffles=SHUFFLES)
    names = [_view.model.to_string(torch.tensor([i])) for i in found.labels.tolist()]
    return Words(found, names, routing_dependence.top_items(found, 8).tolist(), least)


@st.cache_data(max_entries=32, show_spinner=False)
def domains(key: tuple, layer: int, _read: Read) -> routing_dependence.DomainSpecialization:
    """Domain specialisation of one layer."""
    return routing_dependence.domain_specialization(_read.routes[layer], _read.labels(layer), draws=300)


@st.cache_data(max_entries=32, show_spinner=False)
def together(key: tuple, _routing: routing.Routing) -> routing_sets.Coactivation:
    """How often experts of one layer are chosen together."""
    return routing_sets.coactivation(_routing)


# -- what if --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Edit:
    """Experts that are turned off, or that a route is forced to."""

    kind: Literal["masked", "zeroed", "forced"]
    experts: tuple[int, ...]
    layers: tuple[int, ...]
    position: int | None
    """None for all positions."""

    def interventions(self) -> list[Intervention]:
        if self.kind == "forced":
            return [ForceRoute(self.layers, self.position, indices=torch.tensor(self.experts))]
        return [AblateExperts(self.layers, self.position, experts=self.experts, form=self.kind)]


@dataclass(frozen=True)
class Changed:
    predictions: what_if.Change
    kept: dict[int, np.ndarray]
    """MoE layer -> share of each token's experts that stay, [T]."""


@st.cache_data(max_entries=64, show_spinner=False)
def _change(key: tuple, edit: Edit, read: int, _view: View) -> Changed:
    edits = edit.interventions()
    found = what_if.compare(_view, edits, read)
    with _view.model.hooks(hooks(_view.model, edits, 1, len(_view.ids))):
        after = routing.capture_routing(_view.model, _view.tokens)
    before = route(_view)
    return Changed(found, {layer: routing_sets.overlap(before[layer], after[layer]).numpy() for layer in before})


def change(view: View, edit: Edit, read: int) -> Changed:
    """What the edit changes in predictions and routes, and in the next tokens after the position ``read``."""
    return _change(view.key, edit, read, view)


# -- code -----------------------------------------------------------------------------------------------------


def prompt_code(layer: int) -> str:
    """Lines that compute the figures of the prompt."""
    return f"""
from jambascope.hooks import routing, routing_chance

tokens = model.to_tokens(prompt)
routes = routing.capture_routing(model, tokens)  # MoE layer -> Routing
route = routes[{layer}]
weights = routing.kept_weights(route)  # [T X]
retained = routing.retained_mass(route.probabilities, route.indices)  # [T]
lead = routing.margin(route.probabilities)  # [T]
balance = {{layer: routing.summarize(own) for layer, own in routes.items()}}
by_chance = routing_chance.load_range(len(route), route.experts_per_token, route.num_experts)
"""


def text_code(layer: int, least: int, windows: int, length: int, files: Iterable[str] | None) -> str:
    """Lines that compute the figures of a text.

    Args:
        files: names of text files; none are the packaged language; None is the prompt.
    """
    head = "from jambascope.hooks import routing, routing_dependence, routing_sets\n"
    domains = "domains = routing_dependence.domain_specialization(route, labels[route.prompts])\n"
    if files is None:
        read = f"\nroute = routing.capture_routing(model, model.to_tokens(prompt))[{layer}]\n"
        domains = ""
    elif not (files := list(files)):
        head += "from jambascope.studies.corpus import corpus\n"
        read = f"""
texts = corpus(model, (), {windows}, {length}, seed=0)
labels = texts.domains
route = routing.capture_routing(model, texts.tokens)[{layer}]
"""
    else:
        head = f"from pathlib import Path\n\nimport torch\n\n{head}from jambascope.studies.corpus import text_windows\n"
        read = f"""
files = {files!r}
texts = [text_windows(model, Path(file).read_text("utf-8-sig"), {windows}, {length}) for file in files]
labels = torch.cat([torch.full((len(rows),), i) for i, rows in enumerate(texts)])
route = routing.concatenate(routing.capture_routing(model, rows)[{layer}] for rows in texts)
"""
    return f"""
{head}{read}pairs = routing_sets.coactivation(route)
words = routing_dependence.vocabulary_specialization(route, least={least}, shuffles={SHUFFLES})
{domains}"""


def what_if_code(edit: Edit, read: int) -> str:
    """Lines that make the edit, compare the predictions, and the routes."""
    where = f"{list(edit.layers)}, {edit.position}"
    if edit.kind == "forced":
        edits = f"ForceRoute({where}, indices={list(edit.experts)})"
    else:
        edits = f"AblateExperts({where}, experts={list(edit.experts)}, form={edit.kind!r})"
    return f"""
import torch

from jambascope.hooks import predictions, routing, routing_sets, run
from jambascope.hooks.interventions import {edits.partition("(")[0]}, hooks

tokens = model.to_tokens(prompt)
edits = [{edits}]
{what_if.code(read).strip()}
routes = routing.capture_routing(model, tokens)
with model.hooks(hooks(model, edits, *tokens.shape)):
    changed = routing.capture_routing(model, tokens)
kept = {{layer: routing_sets.overlap(routes[layer], changed[layer]) for layer in routes}}
"""
