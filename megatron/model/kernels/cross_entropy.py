"""Cross-entropy over a large vocabulary in two launches: logits are read once forward, read and written once backward.

The gradient is written over the logits, which nothing else needs. At T tokens and V columns of b bytes, forward moves
T V b bytes and backward twice as many; no fp32 copy of them exists.

Shapes: T tokens, V vocabulary.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

LAUNCH: dict[str, Any] = {"BV": 4096, "num_warps": 8}  # columns at a time, and who computes them


def reference(logits_TV: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
    """-log softmax(logits)[label] of each token, in fp32 or wider."""
    wide = torch.promote_types(logits_TV.dtype, torch.float32)
    return -logits_TV.log_softmax(-1, dtype=wide).gather(1, labels_T[:, None])[:, 0]


@triton.jit
def _forward(logits_ptr, labels_ptr, loss_ptr, lse_ptr, V, BV: tl.constexpr):
    """Online softmax: the largest logit so far, and the sum of exponentials relative to it."""
    token = tl.program_id(0)
    start_ptr = logits_ptr + token.to(tl.int64) * V
    most = tl.full((BV,), float("-inf"), tl.float32)
    total = tl.zeros((BV,), tl.float32)
    for start in range(0, V, BV):
        v = start + tl.arange(0, BV)
        x = tl.load(start_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(most, x)
        # a column of nothing but -inf stays 0
        total = tl.where(larger == float("-inf"), 0.0, total * tl.exp(most - larger) + tl.exp(x - larger))
        most = larger
    whole = tl.max(most, axis=0)
    lse = whole + tl.log(tl.sum(total * tl.exp(most - whole), axis=0))
    label = tl.load(labels_ptr + token)
    tl.store(lse_ptr + token, lse)
    tl.store(loss_ptr + token, lse - tl.load(start_ptr + label).to(tl.float32))


@triton.jit
def _backward(logits_ptr, labels_ptr, loss_ptr, lse_ptr, grad_ptr, V, BV: tl.constexpr):
    """(softmax - onehot) * gradient over the logits. At the label p - 1 = expm1(-loss), where a difference cancels."""
    token = tl.program_id(0)
    start_ptr = logits_ptr + token.to(tl.int64) * V
    lse, grad = tl.load(lse_ptr + token), tl.load(grad_ptr + token)
    label, loss = tl.load(labels_ptr + token), tl.load(loss_ptr + token)
    # expm1(y) for y = -loss <= 0: exact series where exp(y) - 1 would cancel
    y = -loss
    near = y * (1.0 + y * (0.5 + y * (1.0 / 6 + y * (1.0 / 24 + y / 120))))
    at_label = tl.where(y > -0.1, near, tl.exp(y) - 1.0)
    for start in range(0, V, BV):
        v = start + tl.arange(0, BV)
        x = tl.load(start_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32)
        d = tl.where(v == label, at_label, tl.exp(x - lse)) * grad
        tl.store(start_ptr + v, d.to(logits_ptr.dtype.element_ty), mask=v < V)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TV, labels_T):
        T, V = logits_TV.shape
        loss_T, lse_T = (logits_TV.new_empty(T, dtype=torch.float32) for _ in range(2))
        if T:
            _forward[(T,)](logits_TV, labels_T, loss_T, lse_T, V, **LAUNCH)
        ctx.save_for_backward(logits_TV, labels_T, loss_T, lse_T)
        return loss_T

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_T):
        logits_TV, labels_T, loss_T, lse_T = ctx.saved_tensors
        T, V = logits_TV.shape
        if T:
            _backward[(T,)](logits_TV, labels_T, loss_T, lse_T, grad_T.contiguous(), V, **LAUNCH)
        return logits_TV, None


def cross_entropy(logits_TV: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
    """:func:`reference`, whose backward pass **overwrites the logits** with their gradient.

    Args:
        logits_TV: contiguous, in bf16, fp16 or fp32; of no use after the backward pass, which can be run once.
        labels_T: int64 below V.

    Returns:
        fp32 [T].
    """
    return _CrossEntropy.apply(logits_TV, labels_T)
