"""Running text for any model, and how well it is read: the packaged models' language by domain, or files of yours."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int

from jambascope import checkpoint
from jambascope.config import JambaConfig
from jambascope.errors import ConfigError, InputError
from jambascope.losses import token_losses
from jambascope.zoo.language import DOMAINS, mixture
from jambascope.zoo.words import VOCABULARY

if TYPE_CHECKING:
    from jambascope.model import HookedJamba

TEXT = "Text files (UTF-8), each a domain, to read instead of the packaged models' language; other models need one."


@dataclass(frozen=True, eq=False)
class Corpus:
    """Prompts of equal length, each of one domain, in random order."""

    tokens: Int[torch.Tensor, "prompts pos"]
    domains: Int[torch.Tensor, " prompts"]
    """Index into ``names``."""
    names: tuple[str, ...]


def speaks_zoo(tokenizer: Any) -> bool:
    """Whether a tokenizer's vocabulary is that of the packaged models."""
    return tokenizer is not None and tokenizer.get_vocab() == VOCABULARY


def check_corpus(directory: Path, config: JambaConfig, text: tuple[str, ...], length: int) -> None:
    """What a study's ``check`` asks of a model that shall read a corpus.

    Raises:
        ConfigError: text files that are needed or missing, or a length beyond the context.
        InputError: no tokenizer.
    """
    if length > config.n_ctx:
        raise ConfigError(f"length={length} exceeds its context of {config.n_ctx}; make length smaller")
    tokenizer = checkpoint.load_tokenizer(directory)
    if tokenizer is None:
        raise InputError("it has no tokenizer, and this study reads text; give a checkpoint with a tokenizer")
    if not text and not speaks_zoo(tokenizer):
        raise ConfigError("text is empty, and it reads another language than the packaged models; give --set text=FILE")
    for name in text:
        if not Path(name).expanduser().is_file():
            raise ConfigError(f"text={name!r} is no file; give a text file, or several with commas")


def corpus(model: HookedJamba, text: tuple[str, ...], prompts: int, length: int, seed: int) -> Corpus:
    """``prompts`` of each domain, of ``length`` tokens with <bos>: held-out documents of the language's domains,
    or windows of the text files that do not overlap.

    Raises:
        InputError: a file too short for as many windows, or that is no UTF-8 text.
    """
    rng = np.random.default_rng([seed, length, 3])
    if text:
        parts = [_windows(model, name, prompts, length, rng) for name in text]
        names = _distinct_names(text)
    else:
        parts = [_rows(rng, length, prompts, {domain: 1.0}) for domain in DOMAINS]
        names = tuple(DOMAINS)
    order = torch.from_numpy(rng.permutation(prompts * len(names)))
    domains = torch.arange(len(names)).repeat_interleave(prompts)
    return Corpus(torch.cat(parts)[order], domains[order], names)


def mixed(
    model: HookedJamba, text: tuple[str, ...], prompts: int, length: int, seed: int
) -> Int[torch.Tensor, "prompts pos"]:
    """Prompts of the mixture that training draws (held-out combinations), or of all text files; [B T] with <bos>."""
    if text:
        each = -(-prompts // len(text))
        return corpus(model, text, each, length, seed).tokens[:prompts]
    return _rows(np.random.default_rng([seed, length, 4]), length, prompts)


@torch.no_grad()
def losses_and_hits(
    model: HookedJamba, tokens: Int[torch.Tensor, "prompts pos"], batch_size: int
) -> tuple[Float[torch.Tensor, "prompts pos-1"], Float[torch.Tensor, "prompts pos-1"]]:
    """Loss in nats of every token but the first, and 1 where it was the likeliest."""
    found = []
    for part in tokens.to(model.device).split(batch_size):
        logits = model(part)
        found.append(
            (token_losses(logits, part).double().cpu(), (logits[:, :-1].argmax(-1) == part[:, 1:]).double().cpu())
        )
    return torch.cat([losses for losses, _ in found]), torch.cat([hits for _, hits in found])


def _rows(rng: np.random.Generator, length: int, prompts: int, shares: dict | None = None) -> torch.Tensor:
    rows = mixture(rng, length, "held_out", **({} if shares is None else {"shares": shares}))
    return torch.from_numpy(np.stack([row.ids for row in islice(rows, prompts)]))


def _windows(model: HookedJamba, name: str, prompts: int, length: int, rng: np.random.Generator) -> torch.Tensor:
    try:
        words = Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"text={name!r} cannot be read as UTF-8 text ({e}); give another file") from None
    ids = _ids(model, words)
    room = length - len(_bos(model))
    if len(ids) // room < prompts:
        raise InputError(
            f"text={name!r} has {len(ids)} tokens, and {prompts} windows of {length} are asked for; give a longer "
            "file, or ask for fewer or shorter prompts"
        )
    return _cut(model, ids, room, torch.from_numpy(rng.permutation(len(ids) // room)[:prompts].copy()))


def text_windows(
    model: HookedJamba, words: str, most: int, length: int, seed: int = 0
) -> Int[torch.Tensor, "prompts pos"]:
    """At most ``most`` windows of a text of any length, each of ``length`` tokens with <bos>, none overlapping, in
    random order; a text that fills none is one shorter window.

    Raises:
        InputError: a model without a tokenizer, or a text without a token.
    """
    if model.tokenizer is None:
        raise InputError("this model has no tokenizer, and text is to be read; give a checkpoint with a tokenizer")
    ids = _ids(model, words)
    if len(ids) == 0:
        raise InputError("the text has no token; give some words")
    room = min(length - len(_bos(model)), len(ids))
    chosen = np.random.default_rng([seed, length, 5]).permutation(len(ids) // room)[:most]
    return _cut(model, ids, room, torch.from_numpy(chosen.copy()))


def _ids(model: HookedJamba, words: str) -> Int[torch.Tensor, " tokens"]:
    return torch.tensor(model.tokenizer(words, add_special_tokens=False)["input_ids"], dtype=torch.long)


def _bos(model: HookedJamba) -> list[int]:
    return [] if model.config.bos_token_id is None else [model.config.bos_token_id]


def _cut(model: HookedJamba, ids: torch.Tensor, room: int, chosen: torch.Tensor) -> torch.Tensor:
    """Chosen windows of ``room`` tokens, each after <bos>."""
    rows = ids[: len(ids) // room * room].view(-1, room)[chosen]
    return torch.cat([torch.tensor(_bos(model), dtype=torch.long).expand(len(rows), -1), rows], 1)


def _distinct_names(text: tuple[str, ...]) -> tuple[str, ...]:
    stems = tuple(Path(name).stem for name in text)
    return stems if len(set(stems)) == len(stems) else text
