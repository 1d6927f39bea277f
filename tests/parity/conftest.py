"""Random Hugging Face models in float64 (the truth) and float32 (the yardstick), and ours with the same weights."""

from __future__ import annotations

import statistics
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
import transformers
from transformers.models.mamba2 import modeling_mamba2

from jambascope import HookedJamba
from jambascope.hf_format import pieces

ULP = torch.finfo(torch.float32).eps


@dataclass
class Trio:
    """The same weights three times."""

    truth: torch.nn.Module
    yardstick: torch.nn.Module
    ours: HookedJamba

    def parameters_by_hf_name(self, attribute: str = "data") -> dict[str, torch.Tensor]:
        """Ours, under the names that transformers gives its parameters."""
        names = dict(self.truth.named_parameters())
        model_type = self.truth.config.model_type
        found = {}
        for piece in pieces(dict(self.ours.named_parameters()), self.ours.config, model_type, names):
            found[piece.file_name] = piece.part(getattr(self.ours.get_parameter(piece.parameter), attribute))
        return found


def error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative error in the Euclidean norm."""
    return ((value.detach().double() - truth.detach()).norm() / truth.detach().norm().clamp_min(1e-30)).item()


def assert_no_worse(ours: dict[str, list[float]], yardstick: dict[str, list[float]]) -> None:
    """Per name: our median error over several draws is at most twice that of transformers' float32.

    A single draw cannot tell: wide weights amplify one rounding or another, and either side may be the unlucky one.
    For the same reason a parameter on which the yardstick happens to be lucky is held to its typical parameter.
    """
    medians = {name: statistics.median(errors) for name, errors in yardstick.items()}
    typical = statistics.median(medians.values())
    for name, errors in ours.items():
        allowed = 2 * max(medians[name], typical if name not in ("logits", "loss") else 0) + 4 * ULP
        assert statistics.median(errors) <= allowed, (
            f"{name}: ours {statistics.median(errors):.2e}, transformers float32 {medians[name]:.2e}"
        )


@torch.no_grad()
def randomize(model: torch.nn.Module, std: float, seed: int) -> None:
    """Weights wide enough that states and routing matter; also those that usually start as constants."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        if "norm" in name:
            p.copy_(1 + 0.3 * noise)
        elif name.endswith("A_log"):
            p.copy_(torch.arange(1, p.shape[-1] + 1).log() + 0.3 * noise)
        elif name.endswith(("dt_proj.bias", "dt_bias")):
            p.copy_(noise - 1)
        elif name.endswith((".D", "conv1d.weight", "conv1d.bias")):
            p.copy_(0.5 * noise)
        else:
            p.copy_(std * noise)


@pytest.fixture(scope="session")
def make_trio(tmp_path_factory):
    """make_trio("jamba", seed, std, **config fields) -> Trio; ours is read from what transformers saved.

    The truth of Mamba-2 is float64 only within ``float64_inside``: transformers rounds its scan to float32.
    """

    def make(kind: str, seed: int = 0, std: float = 0.15, **fields) -> Trio:
        config_class, model_class = {
            "jamba": (transformers.JambaConfig, transformers.JambaForCausalLM),
            "mamba": (transformers.MambaConfig, transformers.MambaForCausalLM),
            "mamba2": (transformers.Mamba2Config, transformers.Mamba2ForCausalLM),
        }[kind]
        base = dict(vocab_size=61, pad_token_id=None, bos_token_id=1, eos_token_id=2)
        if kind == "jamba":
            base |= dict(hidden_size=32, intermediate_size=40, num_attention_heads=4, num_key_value_heads=2)
            base |= dict(num_experts=4, mamba_d_state=16, mamba_dt_rank=5)
        elif kind == "mamba2":
            base |= dict(hidden_size=32, state_size=16, num_heads=8, head_dim=8, n_groups=2, chunk_size=16)
        else:
            base |= dict(hidden_size=32, state_size=16)
        config = config_class(**(base | fields))
        # float64 products of grouped experts do not exist in torch; the eager loop is the same mathematics.
        config._experts_implementation = "eager"
        # Drawn in float32, so that all three hold exactly the same numbers.
        yardstick = model_class(config)
        randomize(yardstick, std, seed)
        truth = model_class(config).double()
        truth.load_state_dict(yardstick.state_dict())
        directory = tmp_path_factory.mktemp(kind)
        yardstick.save_pretrained(directory)
        return Trio(truth.eval(), yardstick.eval(), HookedJamba.from_pretrained(directory))

    return make


class _Float64Torch:
    """The module ``torch`` for transformers' Mamba-2 code, with float64 under the name of float32."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture
def float64_inside(monkeypatch):
    """``with float64_inside():`` what transformers' Mamba-2 rounds to float32 in between stays in float64."""

    @contextmanager
    def inside():
        with monkeypatch.context() as m:
            m.setattr(modeling_mamba2, "torch", _Float64Torch())
            m.setattr(torch.Tensor, "float", torch.Tensor.double)
            yield

    return inside


@pytest.fixture(scope="session")
def no_worse():
    return assert_no_worse


@pytest.fixture(scope="session")
def relative_error():
    return error


@pytest.fixture
def random_tokens():
    def make(batch: int, length: int, vocab: int = 61, seed: int = 1) -> torch.Tensor:
        return torch.randint(3, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))

    return make
