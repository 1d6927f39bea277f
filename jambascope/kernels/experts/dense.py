"""One SwiGLU feed-forward for every token, as the loop of the CPU experts computes it: the one expert of all.

What lies between the products stays in a core's cache with the weights, where a library writes it out. Bound: ``6 D F``
operations a token.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float

from jambascope.kernels.experts.cpu import Weight, run_tasks
from jambascope.kernels.plain import is_plain

MOST_BYTES = 1 << 20
"""Weights that a core's cache holds beside its tokens."""
FEWEST_TOKENS = 256
"""Below, a library is as fast."""
FEWEST_WIDE = 8
"""Of d_model and d_mlp: then weights are read where they are."""
ROWS = 256
"""Tokens to a task, at most."""
STEP = 32
"""Tokens to a task are a multiple of this, or almost."""


def fits(x: torch.Tensor, *weights: torch.Tensor) -> bool:
    """Whether :func:`feed_forward` takes these: float32 on the CPU, gradients off, small weights and many tokens."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    if x.shape[:-1].numel() < FEWEST_TOKENS or min(weights[0].shape) < FEWEST_WIDE:
        return False
    tensors = (x, *weights)
    return (
        sum(w.nbytes for w in weights) <= MOST_BYTES
        and is_plain(*tensors)
        and all(v.dtype == torch.float32 and v.device.type == "cpu" and v.is_contiguous() for v in tensors)
    )


def feed_forward(
    x: Float[torch.Tensor, "*batch d_model"],
    gate: Float[torch.Tensor, "d_mlp d_model"],
    up: Float[torch.Tensor, "d_mlp d_model"],
    down: Float[torch.Tensor, "d_model d_mlp"],
) -> Float[torch.Tensor, "*batch d_model"]:
    """``down(SiLU(gate x) * up x)`` of each token (arXiv 2002.05202, equation 6); see :func:`fits`."""
    out, tokens = torch.empty_like(x), x.shape[:-1].numel()
    rows = min(ROWS, -(-tokens // (2 * torch.get_num_threads() * STEP)) * STEP)
    firsts = np.arange(0, tokens, rows)
    tasks = np.stack((np.zeros_like(firsts), firsts, np.minimum(firsts + rows, tokens)), axis=1)
    flat, ones = x.view(tokens, -1), x.new_ones(tokens, 1)
    between = up.data_ptr() - gate.data_ptr()
    run_tasks(tasks, np.arange(tokens), flat, ones, Weight(gate, None), Weight(down, None), between, out)
    return out
