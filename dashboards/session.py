"""What the pages share: the model that is open, the prompt, and what one forward pass of it gave.

Results are cached by (checkpoint, token ids, what was asked), never by tensors: Streamlit hashes large arrays by
samples. Models are shared by all browser sessions; a model serves one run at a time behind its own lock.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import streamlit as st
import torch

from jambascope import HookedJamba
from jambascope.checkpoint import find_directory
from jambascope.errors import CheckpointError, InputError, JambascopeError
from jambascope.tokens import check
from jambascope.zoo import packaged_models

MAX_TOKENS = 4096
"""Longest prompt the pages take: one head's pattern is this squared."""
TEXT_EXAMPLES = (
    "Review : the plot was gripping . Sentiment : Positive Review : the acting was boring . Sentiment : Negative "
    "Review : the music was wonderful . Sentiment :",
    "whale Clara near lamp stone whale Clara near lamp stone whale Clara near",
    "Alice gave the book to Bob . Bob thanked",
    "map : stone river , leaf mud , moss pine ; leaf ->",
)
ID_EXAMPLES = ("5 17 3 42 8 5 17 3 42", "5 17 3", " ".join(str(3 + i % 7) for i in range(40)))


@dataclass(frozen=True)
class Start:
    """What the command line asked for."""

    model: str
    device: str | None
    dtype: str | None


@dataclass(frozen=True)
class Checkpoint:
    """Which weights are open; changes when their files do."""

    directory: str
    modified: int
    device: str | None
    dtype: str | None


@dataclass(frozen=True)
class View:
    """An open model and the prompt of this browser session, tokenized."""

    model: HookedJamba
    checkpoint: Checkpoint
    ids: tuple[int, ...]
    texts: tuple[str, ...]
    name: str

    @property
    def tokens(self) -> torch.Tensor:
        """[1 T] on the model's device."""
        return torch.tensor([self.ids], device=self.model.device)

    @property
    def key(self) -> tuple[Checkpoint, tuple[int, ...]]:
        """Names every result of the forward pass."""
        return self.checkpoint, self.ids


@cache
def start() -> Start:
    """The options that the ``dashboard`` command passes on: ``streamlit run app.py -- --model DIR``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="jamba-micro")
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    known, _ = parser.parse_known_args(sys.argv[1:])
    return Start(known.model, known.device, known.dtype)


def model_choices() -> list[str]:
    """The model given at the start, then the packaged ones. Links can name no others, so they open no other files."""
    return list(dict.fromkeys([start().model, *packaged_models()]))


def examples(model: HookedJamba) -> tuple[str, ...]:
    """Prompts that a model can read: text, or token ids when its checkpoint has no tokenizer."""
    if model.tokenizer is None:
        return tuple(" ".join(str(int(i) % model.config.d_vocab) for i in ids.split()) for ids in ID_EXAMPLES)
    return TEXT_EXAMPLES


def open_checkpoint(name: str) -> tuple[HookedJamba, Checkpoint]:
    """The model called ``name``, loaded once for all sessions and again when its files change."""
    directory = _directory(name)
    try:
        modified = max((p.stat().st_mtime_ns for p in directory.iterdir() if p.is_file()), default=0)
    except OSError as e:
        raise CheckpointError(f"{directory} cannot be read ({e.strerror}); restore it, or start again") from None
    checkpoint = Checkpoint(str(directory), modified, start().device, start().dtype)
    return _load(checkpoint), checkpoint


_directory = cache(find_directory)
"""Asked once per name: for a hub id it goes to the network."""


@st.cache_resource(max_entries=2, show_spinner="Opening the model")
def _load(checkpoint: Checkpoint) -> HookedJamba:
    return HookedJamba.from_pretrained(checkpoint.directory, device=checkpoint.device, dtype=checkpoint.dtype)


def view(name: str, prompt: str) -> View:
    """The model and its tokens of the prompt.

    Raises:
        InputError: an empty or too long prompt, or one that the model has no tokens for.
    """
    model, checkpoint = open_checkpoint(name)
    if not prompt.strip():
        example = "'5 17 3'" if model.tokenizer is None else "'the plot was gripping'"
        raise InputError(f"the prompt is empty; type one in the sidebar, such as {example}")
    tokens, _ = check(model.to_tokens(prompt).cpu(), None, model.config.d_vocab, torch.device("cpu"))
    ids = tokens[0].tolist()
    if len(ids) > MAX_TOKENS:
        raise InputError(f"the prompt has {len(ids):,} tokens; the pages take at most {MAX_TOKENS:,}, so shorten it")
    return View(model, checkpoint, tuple(ids), _texts(checkpoint, tuple(ids), model), Path(name).name or name)


@st.cache_data(max_entries=64, show_spinner=False)
def _texts(checkpoint: Checkpoint, ids: tuple[int, ...], _model: HookedJamba) -> tuple[str, ...]:
    known = {i: _model.to_string(torch.tensor([i])) for i in set(ids)}
    return tuple(known[i] for i in ids)


def unknown_positions(view: View) -> list[int]:
    """Positions whose token the tokenizer has no entry for."""
    unknown = getattr(view.model.tokenizer, "unk_token_id", None)
    return [position for position, token in enumerate(view.ids) if token == unknown]


# -- widgets that several pages show ---------------------------------------------------------------------------

FULL, STRETCHED = "0 to 1", "stretched"


def choose_scale(help: str) -> bool:
    """Whether colours of weights are stretched over those shown instead of running from 0 to 1."""
    options = {"default": FULL, "required": True, "key": "scale", "bind": "query-params", "help": help}
    return st.segmented_control("Colour scale", (FULL, STRETCHED), **options) == STRETCHED


def choose_position(view: View, help: str) -> int:
    """A slider over the prompt's positions, shared by all pages through the URL; the last position to begin with."""
    last = len(view.ids) - 1
    if last == 0:
        st.caption(f"Position 0, {plain(view.texts[0])}: the prompt's only token.")
        return 0
    keep_within("position", 0, last)
    at = st.session_state.get("position", _position_of_link(last))
    label = f"Position {at}, token “{plain(view.texts[at])}”"
    return st.slider(label, 0, last, last, key="position", bind="query-params", help=help)


def _position_of_link(last: int) -> int:
    """The position that the slider will take from the URL when it is made for the first time."""
    asked = st.query_params.get("position", "")
    return int(asked) if asked.isdecimal() and int(asked) <= last else last


def keep_within(key: str, low: int, high: int) -> None:
    """Move a number left over from another prompt or model into the range that its widget now has."""
    if key in st.session_state:
        st.session_state[key] = min(max(st.session_state[key], low), high)


def choose_layer(layers: tuple[int, ...], key: str, label: str) -> int:
    """A layer among those of one kind, kept in the URL under ``key``."""
    if st.session_state.get(key) not in (None, *layers):
        st.session_state[key] = layers[0]  # left over from another model
    return st.selectbox(label, layers, key=key, bind="query-params", format_func=str)


def show(fig: go.Figure, key: str, **options: Any) -> Any:
    """A figure over the full width, its tool bar reduced to what is useful."""
    config = {"displaylogo": False, "toImageButtonOptions": {"format": "svg", "filename": key}}
    return st.plotly_chart(fig, key=key, width="stretch", theme="streamlit", config=config, **options)


def table(rows: list[dict[str, Any]], key: str, columns: dict[str, Any], **options: Any) -> None:
    """A table without row numbers, under its own key."""
    with st.container(key=key):
        st.dataframe(rows, hide_index=True, column_config=columns, **options)


def plain(text: str) -> str:
    """Text that Streamlit's Markdown shows as it is."""
    for sign in "\\`*_{}[]()#+-!$~|" + ":" * (text.count(":") > 1):
        text = text.replace(sign, "\\" + sign)
    return text.replace("<", "&lt;").replace(">", "&gt;")


def error(problem: JambascopeError) -> None:
    """The project's errors are one readable line; no traceback."""
    st.error(plain(str(problem)), icon=":material/error:")
