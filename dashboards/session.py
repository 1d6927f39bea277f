"""What a page is given: the model that is open, and the prompt of this browser session.

Results are cached by (checkpoint, token ids, what was asked), never by tensors: Streamlit hashes large arrays by
samples. Models are shared by all browser sessions; a model serves one run at a time behind its own lock.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import streamlit as st
import torch

from jambascope import HookedJamba
from jambascope.dashboards import models
from jambascope.dashboards.models import Checkpoint
from jambascope.errors import InputError
from jambascope.tokens import check

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
    model_memory: int
    """Bytes of the weights that are kept in memory at once."""
    runs: Path
    """Directory of study runs."""


@dataclass(frozen=True)
class View:
    """An open model and the prompt of this browser session, tokenized."""

    model: HookedJamba
    checkpoint: Checkpoint
    prompt: str
    ids: tuple[int, ...]
    texts: tuple[str, ...]
    name: str
    """What the model is called."""
    address: str
    """What ``from_pretrained`` takes."""

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
    parser.add_argument("--model-memory", type=int)
    parser.add_argument("--runs", type=Path, default=Path("runs/studies"))
    known, _ = parser.parse_known_args(sys.argv[1:])
    most = known.model_memory or models.default_bytes(known.device)
    return Start(known.model, known.device, known.dtype, most, known.runs)


def model_choices() -> list[str]:
    """What this server may open."""
    return models.choices(start().model)


def examples(model: HookedJamba) -> tuple[str, ...]:
    """Prompts that a model can read: text, or token ids when its checkpoint has no tokenizer."""
    if model.tokenizer is None:
        return tuple(" ".join(str(int(i) % model.config.d_vocab) for i in ids.split()) for ids in ID_EXAMPLES)
    return TEXT_EXAMPLES


def checkpoint_of(name: str) -> Checkpoint:
    """The weights called ``name``, on the server's device; nothing of them is read."""
    return models.checkpoint_of(name, start().device, start().dtype)


def open_checkpoint(name: str) -> tuple[HookedJamba, Checkpoint]:
    """The model called ``name``, loaded once for all sessions and again when its files change.

    Raises:
        CheckpointError: it cannot be read.
        ConfigError: it does not fit into memory.
    """
    checkpoint = checkpoint_of(name)
    shelf = models.shelf(start().model_memory)
    if shelf.holds(checkpoint):
        return shelf.get(checkpoint), checkpoint
    with st.spinner(f"Opening {Path(name).name}"):
        return shelf.get(checkpoint), checkpoint


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
    texts = _texts(checkpoint, tuple(ids), model)
    return View(model, checkpoint, prompt, tuple(ids), texts, Path(name).name or name, name)


@st.cache_data(max_entries=64, show_spinner=False)
def _texts(checkpoint: Checkpoint, ids: tuple[int, ...], _model: HookedJamba) -> tuple[str, ...]:
    known = {i: _model.to_string(torch.tensor([i])) for i in set(ids)}
    return tuple(known[i] for i in ids)


def unknown_positions(view: View) -> list[int]:
    """Positions whose token the tokenizer has no entry for."""
    unknown = getattr(view.model.tokenizer, "unk_token_id", None)
    return [position for position, token in enumerate(view.ids) if token == unknown]
