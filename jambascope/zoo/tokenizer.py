"""The tokenizer of the packaged models: one token per word, words separated by white space, case kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jambascope.zoo.words import SPECIAL, VOCABULARY

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A transformers tokenizer over ``words.VOCABULARY``; save_pretrained writes it, AutoTokenizer opens it.

    It adds no special tokens: ``HookedJamba`` puts <bos> in front itself, and an end-of-sequence token behind
    a prompt would end the document that is to be continued. White space is dropped, also line breaks, and decoded
    words are joined by single spaces.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pad, bos, eos, unk = SPECIAL
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token=unk))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unk,
        clean_up_tokenization_spaces=False,
    )
