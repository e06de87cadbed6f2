"""Collectives that gradients flow through."""

from collections.abc import Sequence

import torch
import torch.distributed as dist


def all_to_all(
    x: torch.Tensor,
    group: dist.ProcessGroup,
    output_splits: Sequence[int] | None = None,
    input_splits: Sequence[int] | None = None,
) -> torch.Tensor:
    """Send a piece of ``x`` to every process of ``group`` and receive one from each, joined in the order of ranks.

    Differentiable: the gradient takes the way back. Every process of the group must call this, and must run the
    backward pass if one does, even where it has no rows to send.

    Args:
        x: cut along dimension 0; the trailing dimensions are equal on all processes.
        group: the processes that take part.
        output_splits: rows to receive from each process; equal pieces by default.
        input_splits: rows to send to each process; equal pieces by default.

    Returns:
        The received rows, of shape [sum of ``output_splits``, ...]; the shape of ``x`` for equal pieces.

    Raises:
        ValueError: there is no group, only one kind of splits is given, or the rows of ``x`` do not fit the splits.
    """
    if group is None:
        raise ValueError("all_to_all needs a process group, got None; a single process has nobody to exchange with")
    if (output_splits is None) != (input_splits is None):
        raise ValueError("all_to_all takes both output_splits and input_splits, or neither for equal pieces")
    size = dist.get_world_size(group)
    if input_splits is None and x.size(0) % size:
        raise ValueError(
            f"all_to_all cannot cut {x.size(0)} rows into equal pieces for {size} processes; "
            f"give a multiple of {size} rows, or input_splits and output_splits"
        )
    if input_splits is not None and (len(input_splits) != size or sum(input_splits) != x.size(0)):
        raise ValueError(
            f"all_to_all of {x.size(0)} rows over {size} processes got input_splits {list(input_splits)}; "
            f"they must be {size} numbers whose sum is {x.size(0)}"
        )
    return _AllToAll.apply(x, group, output_splits, input_splits)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, output_splits, input_splits):
        ctx.group, ctx.output_splits, ctx.input_splits = group, output_splits, input_splits
        rows = x.size(0) if output_splits is None else sum(output_splits)
        received = x.new_empty(rows, *x.shape[1:])
        dist.all_to_all_single(
            received,
            x.contiguous(),
            None if output_splits is None else list(output_splits),
            None if input_splits is None else list(input_splits),
            group=group,
        )
        return received

    @staticmethod
    def backward(ctx, grad):
        return _AllToAll.apply(grad, ctx.group, ctx.input_splits, ctx.output_splits), None, None, None
