"""HookedJamba: embed -> blocks -> unembed, every intermediate behind a hook point."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import nn
from transformer_lens import HookedRootModule

from jambascope import generation
from jambascope import tokens as tokenization
from jambascope.activation_cache import ActivationCache
from jambascope.block import Block
from jambascope.caching import caching_hooks
from jambascope.config import JambaConfig
from jambascope.devices import parse_device, parse_dtype
from jambascope.errors import ConfigError, InputError
from jambascope.hook_point import Clock, HookPoint, listeners
from jambascope.hook_table import hook_rows, resolve, select_names
from jambascope.initialization import initialize
from jambascope.losses import LossTerms, load_balancing_loss, mean_loss, token_losses
from jambascope.norms import RMSNorm
from jambascope.state import Auxiliary, InferenceState, Run

PIECE_TOKENS = 2048
"""Tokens that a layer takes at a time where nobody listens and no gradient is wanted: see the README's Speed."""

Input = str | list[str] | Int[torch.Tensor, "batch pos"] | Int[torch.Tensor, "pos"]


class HookedJamba(HookedRootModule):
    """A hybrid Transformer-Mamba-MoE language model with a hook point on every intermediate.

    ``run_with_cache``, ``run_with_hooks`` and ``hooks`` are TransformerLens's; the hook points are listed in
    ``jambascope.hook_table``. What a hook returns is what the rest of the network sees. A model serves one run
    at a time behind its own lock, so that threads cannot see each other's hooks.
    """

    tokenizer: Any = None
    """The checkpoint's tokenizer (a transformers tokenizer), or None: then prompts are token ids."""
    name_or_path: str = ""

    def __init__(
        self,
        config: JambaConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str = torch.float32,
    ) -> None:
        """A randomly initialised model (torch's global random numbers; Mamba's own start for A, D and dt)."""
        super().__init__()
        if not isinstance(config, JambaConfig):
            raise ConfigError(f"config is a {type(config).__name__}; give a JambaConfig")
        self.config = config
        self._lock = threading.RLock()
        with torch.device("meta"):
            self.embed = nn.Embedding(config.d_vocab, config.d_model)
            self.hook_embed = HookPoint()  # [B T D]
            self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
            self.ln_final = RMSNorm(config.d_model, config.eps)
            self.unembed = nn.Linear(config.d_model, config.d_vocab, bias=False)
            self.hook_logits = HookPoint()  # [B T V]
        self.hook_rows = hook_rows(config)
        self.setup()
        self._clock = Clock()
        for name, point in self.hook_dict.items():
            point.place(self.hook_rows[name], self._clock)
        self.to(parse_dtype(dtype))
        self.allocate(parse_device(device))
        if self.device.type != "meta":
            initialize(self)

    def allocate(self, device: torch.device | str) -> None:
        """Give every parameter (uninitialised) memory on ``device``, tied ones together."""
        self.to_empty(device=device)
        if self.config.tie_embeddings:
            self.unembed.weight = self.embed.weight

    # -- what TransformerLens's tools read ------------------------------------------------------------------

    @property
    def cfg(self) -> SimpleNamespace:
        """The configuration as TransformerLens's tools read it; ours is ``config``."""
        c = self.config
        return SimpleNamespace(
            n_layers=c.n_layers,
            d_model=c.d_model,
            n_heads=c.n_heads,
            n_key_value_heads=c.n_key_value_heads,
            d_head=c.d_head,
            d_mlp=c.d_mlp,
            d_vocab=c.d_vocab,
            n_ctx=c.n_ctx,
            eps=c.eps,
            num_experts=c.num_experts,
            experts_per_token=c.experts_per_token,
            layers_block_type=list(c.mixers),
            normalization_type="RMS",
            uses_rms_norm=True,
            final_rms=True,
            gated_mlp=True,
            attn_only=all(f == "none" for f in c.feed_forwards),
            positional_embedding_type="rotary" if c.rotary else "none",
            model_name=self.name_or_path,
            device=self.device,
            dtype=self.dtype,
        )

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    @property
    def W_E(self) -> torch.Tensor:
        """[V D]"""
        return self.embed.weight

    @property
    def W_U(self) -> torch.Tensor:
        """[D V]"""
        return self.unembed.weight.T

    @property
    def b_U(self) -> torch.Tensor:
        """[V]: Jamba has no unembedding bias."""
        return torch.zeros(self.config.d_vocab, device=self.device, dtype=self.dtype)

    # -- loading and saving ---------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        quantize: Literal["experts_int8"] | None = None,
    ) -> HookedJamba:
        """Open a packaged model, a Hugging Face directory or a hub id; see ``jambascope.checkpoint.load``."""
        from jambascope import checkpoint

        return checkpoint.load(name_or_path, device=device, dtype=dtype, revision=revision, quantize=quantize)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config, weights and tokenizer so that transformers opens them; see ``jambascope.checkpoint.save``."""
        from jambascope import checkpoint

        checkpoint.save(self, directory)

    # -- running --------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            return super().__call__(*args, **kwargs)

    def forward(
        self,
        input: Input,
        attention_mask: Int[torch.Tensor, "batch pos"] | None = None,
        state: InferenceState | None = None,
        return_type: Literal["logits", "loss", "both"] | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
    ) -> Any:
        """Logits [B T V], the loss in nats, or ``(logits, loss)``.

        Args:
            input: token ids [B T] or [T], a prompt, or a list of prompts (padded on the right, and masked).
            attention_mask: [B T], 1 for tokens and 0 for padding, on either side.
            state: memory to continue from and to update; without it every call starts anew.
            return_type: ``"loss"`` is the mean next-token cross-entropy over tokens, not padding.
            loss_per_token: the loss as [B T-1] instead of its mean.

        Raises:
            InputError: ids outside the vocabulary, an empty prompt, a mask or state that does not fit.
        """
        if return_type not in ("logits", "loss", "both", None):
            raise InputError(f"return_type={return_type!r} must be 'logits', 'loss', 'both' or None")
        tokens, mask = self._prepare(input, attention_mask, prepend_bos, state)
        if return_type in ("loss", "both"):
            tokenization.check_predictions(tokens, mask)
        nobody_looks = return_type is None and not any(
            listeners(nn.ModuleList([self.ln_final, self.unembed, self.hook_logits]))
        )
        logits = self._run(tokens, mask, state, last_only=nobody_looks)
        if return_type in ("logits", None):
            return logits if return_type else None
        losses = token_losses(logits, tokens)
        loss = losses if loss_per_token else mean_loss(losses, mask)
        return loss if return_type == "loss" else (logits, loss)

    def loss_terms(self, input: Input, attention_mask: Int[torch.Tensor, "batch pos"] | None = None) -> LossTerms:
        """The training loss and its parts: next token, load balancing, activation."""
        with self._lock:
            tokens, mask = self._prepare(input, attention_mask, None, None)
            tokenization.check_predictions(tokens, mask)
            auxiliary = Auxiliary()
            logits = self._run(tokens, mask, None, auxiliary)
            lm = mean_loss(token_losses(logits, tokens), mask)
            balance = lm.new_zeros(())
            if auxiliary.router_logits:
                balance = load_balancing_loss(auxiliary.router_logits, self.config.experts_per_token, mask)
            activation = torch.stack(auxiliary.squared_activations).mean()
            total = lm + self.config.load_balancing_coef * balance + self.config.activation_coef * activation
            return LossTerms(lm, balance, activation, total)

    def _prepare(
        self,
        input: Input,
        attention_mask: torch.Tensor | None,
        prepend_bos: bool | None,
        state: InferenceState | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Checked tokens [B T] on the model's device, and the mask as bool or None when all are tokens."""
        if isinstance(input, (str, list)):
            tokens, mask = tokenization.encode(self, input, prepend_bos)
            attention_mask = mask if attention_mask is None else attention_mask
        else:
            tokens = input
        if state is not None and not isinstance(state, InferenceState):
            raise InputError(f"state is a {type(state).__name__}; make one with model.new_state(batch)")
        tokens, mask = tokenization.check(
            tokens, attention_mask, self.config.d_vocab, self.device, empty_rows=state is not None
        )
        if state is not None:
            state.check(self.config, len(tokens), self.device, self.dtype)
        return tokens, mask

    def _run(
        self,
        tokens: torch.Tensor,
        mask: torch.Tensor | None,
        state: InferenceState | None,
        auxiliary: Auxiliary | None = None,
        last_only: bool = False,
        step_weights: dict | None = None,
    ) -> torch.Tensor:
        """Logits [B T V], or [B 1 V] of the last position: at long context the others are most of the memory."""
        run = Run(*tokens.shape, tokens.device, mask, state, auxiliary, step_weights)
        self._clock.start, self._clock.length = run.past, run.length
        if tokens.numel() > PIECE_TOKENS and not torch.is_grad_enabled() and not any(listeners(self)):
            run.piece_length = max(1, PIECE_TOKENS // len(tokens))
        x = self.hook_embed(self.embed(tokens))
        if run.piece_length is not None:
            x = x.clone()  # blocks write into it, and it may be somebody's
        for block in self.blocks:
            x = block(x, run)
        if last_only:
            x = x[:, -1:]
            self._clock.start, self._clock.length = run.past + run.length - 1, 1
        logits = self.hook_logits(self.unembed(self.ln_final(x)))
        run.commit()
        return logits

    def new_state(self, batch: int = 1) -> InferenceState:
        """An empty memory for ``batch`` sequences, to pass to every call that continues them."""
        return InferenceState.create(self.config, batch, self.device, self.dtype)

    def generate(self, input: Input, max_new_tokens: int = 64, **options: Any) -> Any:
        """Continue prompts; see :func:`jambascope.generation.generate`."""
        return generation.generate(self, input, max_new_tokens, **options)

    # -- hooks ----------------------------------------------------------------------------------------------

    @contextmanager
    def hooks(
        self,
        fwd_hooks: list[tuple[str | Callable[[str], bool], Callable]] = [],
        bwd_hooks: list[tuple[str | Callable[[str], bool], Callable]] = [],
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ):
        """Attach hooks for the duration of a ``with`` block, which holds the model's lock.

        Raises:
            HookError: before anything is attached, for a name that this model does not have.
        """
        fwd, bwd = (
            [(n if callable(n) else resolve(n, self.hook_dict), hook) for n, hook in hooks]
            for hooks in (fwd_hooks, bwd_hooks)
        )
        with self._lock:
            level = self.context_level
            try:
                with super().hooks(fwd, bwd, reset_hooks_end, clear_contexts):
                    yield self
            except BaseException:
                if reset_hooks_end:  # Ctrl-C may have come while they were taken off
                    self.reset_hooks(clear_contexts, including_permanent=False, level=level + 1)
                self.context_level = level
                raise

    def add_hook(self, name: str | Callable[[str], bool], hook: Callable, *args: Any, **kwargs: Any) -> None:
        """Attach a hook until ``reset_hooks``; an unknown name raises HookError with the nearest ones."""
        with self._lock:
            super().add_hook(name if callable(name) else resolve(name, self.hook_dict), hook, *args, **kwargs)

    def reset_hooks(self, *args: Any, **kwargs: Any) -> None:
        """Remove hooks (not permanent ones); waits for a run of another thread to end."""
        with self._lock:
            super().reset_hooks(*args, **kwargs)

    def run_with_cache(
        self,
        input: Input,
        *args: Any,
        names_filter: Any = None,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Run and keep activations: all but the expanded ones, or those that ``names_filter`` names.

        Returns the model's output and an ``ActivationCache`` (a dict with ``return_cache_object=False``).
        """
        if isinstance(input, torch.Tensor) and input.ndim == 1:
            input = input[None]
        if remove_batch_dim and not isinstance(input, str) and len(input) != 1:
            raise InputError(f"remove_batch_dim=True takes one prompt, not {len(input)}; leave it out")
        keep = select_names(names_filter, self.hook_rows)
        out, cache = super().run_with_cache(
            input, *args, names_filter=keep, remove_batch_dim=remove_batch_dim, **kwargs
        )
        if isinstance(names_filter, (str, list, tuple)):  # under the names that were asked for, aliases too
            wanted = [names_filter] if isinstance(names_filter, str) else names_filter
            cache |= {name: cache[resolve(name, self.hook_rows)] for name in wanted}
        return out, ActivationCache(cache, self, has_batch_dim=not remove_batch_dim) if return_cache_object else cache

    def get_caching_hooks(
        self,
        names_filter: Any = None,
        incl_bwd: bool = False,
        device: Any = None,
        remove_batch_dim: bool = False,
        cache: dict | None = None,
        pos_slice: Any = None,
    ) -> tuple[dict, list, list]:
        """As TransformerLens's, with the position axis read from the hook table; nothing that is kept can change."""
        return caching_hooks(self, names_filter, incl_bwd, device, remove_batch_dim, cache, pos_slice)

    # -- text -----------------------------------------------------------------------------------------------

    def to_tokens(self, input: str | list[str], prepend_bos: bool | None = None) -> Int[torch.Tensor, "batch pos"]:
        """Token ids [B T] on the model's device; prompts of different lengths are padded on the right.

        Padding is not marked in the ids: pass prompts of different lengths to ``forward`` or ``generate`` as text.
        Without a tokenizer a prompt is token ids separated by spaces. ``prepend_bos`` None means: when there is one.
        """
        return tokenization.encode(self, input, prepend_bos)[0].to(self.device)

    def to_str_tokens(self, input: Input, prepend_bos: bool | None = None) -> list[str]:
        """The text of each token of one prompt."""
        return tokenization.str_tokens(self, input, prepend_bos)

    def to_string(self, tokens: Int[torch.Tensor, "*batch pos"]) -> str | list[str]:
        """The text of token ids [T] (a string) or [B T] (a list)."""
        return tokenization.decode(self, tokens)

    def to_single_token(self, text: str) -> int:
        """The id of a text that is exactly one token; anything else raises InputError."""
        ids = tokenization.encode(self, text, False)[0][0].tolist()
        if len(ids) != 1:
            raise InputError(f"{text!r} is {len(ids)} tokens, not one; give the text of a single token")
        return ids[0]

    def tokens_to_residual_directions(self, tokens: Any) -> Float[torch.Tensor, "*tokens d_model"]:
        """The unembedding directions of tokens (ids or single-token texts): what a logit is read along."""
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        elif isinstance(tokens, list):
            tokens = [self.to_single_token(t) if isinstance(t, str) else t for t in tokens]
        tokens = torch.as_tensor(tokens)
        tokenization.check(tokens.reshape(1, -1), None, self.config.d_vocab, self.device)
        return self.W_U.T[tokens.to(self.device)]

    # -- copying: a lock cannot be copied or pickled ---------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lock = threading.RLock()
