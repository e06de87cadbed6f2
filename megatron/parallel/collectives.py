"""Collectives that gradients flow through."""

from collections.abc import Sequence

import torch
import torch.distributed as dist


class _AllToAll(torch.autograd.Function):
    """The gradient of an all-to-all is the all-to-all back, with the split sizes exchanged."""

    @staticmethod
    def forward(ctx, x, group, output_splits, input_splits):
        ctx.group, ctx.output_splits, ctx.input_splits = group, output_splits, input_splits
        rows = x.size(0) if output_splits is None else sum(output_splits)
        out = x.new_empty(rows, *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), output_splits, input_splits, group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        back = _AllToAll.apply(grad, ctx.group, ctx.input_splits, ctx.output_splits)
        return back, None, None, None


def all_to_all(
    x: torch.Tensor,
    group: dist.ProcessGroup | None,
    output_splits: Sequence[int] | None = None,
    input_splits: Sequence[int] | None = None,
) -> torch.Tensor:
    """Send a stretch of rows of ``x`` to each process of ``group`` and receive one from each, in rank order.

    Args:
        x: [N, ...]; rows of one process follow those of the one before.
        group: None does nothing.
        output_splits: rows to receive from each process; None for equal stretches.
        input_splits: rows to send to each process; None for equal stretches.
    """
    if group is None:
        return x
    received = None if output_splits is None else list(output_splits)
    sent = None if input_splits is None else list(input_splits)
    return _AllToAll.apply(x, group, received, sent)
