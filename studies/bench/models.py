"""The models that race: the same random checkpoint opened by us, by transformers and by TransformerLens's bridge."""

from __future__ import annotations

import copy
import gc
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from jambascope.config import JambaConfig
from jambascope.model import HookedJamba

VOCABULARY = 1024
LAYERS = 8
EXPERTS = 8


class Lab:
    """What races share: the device, and the models of the size at hand (those of the last size are let go)."""

    def __init__(self, device: torch.device, directory: Path, lengths: tuple[int, ...] = ()) -> None:
        """``directory`` takes the checkpoints; ``lengths`` are those asked for, or empty: then a race has its own."""
        self.device, self.lengths = device, lengths
        self._directory = directory
        self._size: tuple[int, int] | None = None
        self._made: dict[str, Any] = {}

    def directory(self, d_model: int, layers: int = LAYERS) -> Path:
        """The checkpoint, with a tokenizer, which the bridge asks for."""
        path = self._directory / f"d{d_model}-{layers}"
        if not path.exists():
            self._get((d_model, layers), "theirs", partial(_write_checkpoint, d_model, layers, path, self.device))
        return path

    def ours(self, d_model: int, layers: int = LAYERS) -> HookedJamba:
        load = lambda: HookedJamba.from_pretrained(self.directory(d_model, layers), device=self.device)  # noqa: E731
        return self._get((d_model, layers), "ours", lambda: _compile(load()))

    def theirs(self, d_model: int, layers: int = LAYERS) -> Any:
        """transformers' JambaForCausalLM."""
        from transformers import JambaForCausalLM

        directory = self.directory(d_model, layers)
        load = lambda: JambaForCausalLM.from_pretrained(directory, dtype=torch.float32).to(self.device).eval()  # noqa: E731
        return self._get((d_model, layers), "theirs", load)

    def bridge(self, d_model: int, layers: int = LAYERS) -> Any:
        """TransformerLens's bridge on a copy, since it changes the model that it is given."""
        from transformer_lens.model_bridge import TransformerBridge

        def boot() -> Any:
            theirs = copy.deepcopy(self.theirs(d_model, layers))
            return TransformerBridge.boot_transformers(
                str(self.directory(d_model, layers)), hf_model=theirs, device=str(self.device)
            )

        return self._get((d_model, layers), "bridge", boot)

    def pure_mamba(self, d_model: int) -> HookedJamba:
        """Four Mamba layers and nothing else."""
        make = lambda: HookedJamba(mamba_config(d_model), device=self.device)  # noqa: E731
        return self._get((d_model, LAYERS), "mamba", lambda: _compile(make()))

    def tokens(self, batch: int, length: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(3, VOCABULARY, (batch, length), generator=generator).to(self.device)

    def random(self, *shape: int, seed: int = 0) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device)

    def _get(self, size: tuple[int, int], name: str, make: Callable[[], Any]) -> Any:
        """``size``: d_model and layers."""
        if size != self._size:
            self._made, self._size = {}, size
            gc.collect()
        if name not in self._made:
            torch.manual_seed(0)
            made = make()  # may itself ask for another
            self._made[name] = made
        return self._made[name]


@torch.no_grad()
def _compile(model: HookedJamba) -> HookedJamba:
    """The model after a pass of two tokens: kernels are compiled at their first use, which is nobody's time here."""
    model.eval()(torch.tensor([[3, 4]], device=model.device))
    return model


def jamba_fields(d_model: int, layers: int = LAYERS) -> dict[str, int | float]:
    """The raced Jamba in transformers' names: layers in the releases' proportions, 8 experts of width 2 d_model."""
    heads = max(2, d_model // 32)
    return dict(
        vocab_size=VOCABULARY,
        hidden_size=d_model,
        intermediate_size=2 * d_model,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        initializer_range=0.05,
    )


def mamba_config(d_model: int) -> JambaConfig:
    """A pure-Mamba model, sized as Mamba is."""
    return JambaConfig(
        d_model=d_model,
        d_vocab=VOCABULARY,
        mixers=("mamba",) * 4,
        feed_forwards=("none",) * 4,
        d_inner=2 * d_model,
        dt_rank=max(1, d_model // 16),
        inner_norms=False,
    )


def _write_checkpoint(d_model: int, layers: int, directory: Path, device: torch.device) -> Any:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    model = transformers.JambaForCausalLM(transformers.JambaConfig(**jamba_fields(d_model, layers))).eval()
    model.save_pretrained(directory)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(pad_token="t0", bos_token="t1", eos_token="t2", unk_token="t0")
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(directory)
    return model.to(device)


def quiet_libraries() -> None:
    """No progress bars and notices of the peers among ours."""
    import warnings

    import transformers
    from transformer_lens import patching

    patching.tqdm = partial(patching.tqdm, disable=True)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="transformer")


def temporary_directory() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="jambascope-bench-")
