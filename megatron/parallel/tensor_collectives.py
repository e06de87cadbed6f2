"""Collectives of tensor-parallel processes inside a layer, forward and backward.

A value is either whole (equal on all processes of the group), sharded (each has a shard of one dimension), or partial
(the whole is the sum over the processes). A gradient is whole, sharded or partial likewise. Each function is the
identity for a group of one process.

    function          value in -> out       gradient in -> out
    copy              whole -> whole        partial -> whole
    reduce            partial -> whole      whole -> whole
    split             whole -> sharded      sharded -> whole
    gather            sharded -> whole      whole -> sharded
    all_gather        sharded -> whole      partial -> sharded
    reduce_scatter    partial -> sharded    sharded -> whole

A layer whose matrices are sharded begins with ``enter_tensor_region`` and ends with ``leave_tensor_region``: ``copy``
and ``reduce``, or, with sequence parallelism, ``all_gather`` and ``reduce_scatter`` along the sequence, which is the
last dimension but one.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron.parallel.groups import TensorGroup

SEQUENCE = -2

# torch renamed these two
_all_gather_into: Callable = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_into: Callable = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def copy(x: torch.Tensor, group: TensorGroup) -> torch.Tensor:
    """Pass on a whole value to processes that each compute a part with it: their gradients are added."""
    return x if group.size == 1 else _Collective.apply(x, group, _identity, _sum, 0)


def reduce(x: torch.Tensor, group: TensorGroup) -> torch.Tensor:
    """The sum over the processes."""
    return x if group.size == 1 else _Collective.apply(x, group, _sum, _identity, 0)


def split(x: torch.Tensor, group: TensorGroup, dim: int) -> torch.Tensor:
    """This process's shard of a whole value."""
    return x if group.size == 1 else _Collective.apply(x, group, _shard, _concatenate, dim)


def gather(x: torch.Tensor, group: TensorGroup, dim: int) -> torch.Tensor:
    """All shards concatenated, for processes that go on to compute the same with it."""
    return x if group.size == 1 else _Collective.apply(x, group, _concatenate, _shard, dim)


def all_gather(x: torch.Tensor, group: TensorGroup, dim: int) -> torch.Tensor:
    """All shards concatenated, for processes that each compute a part with it: their gradients are added."""
    return x if group.size == 1 else _Collective.apply(x, group, _concatenate, _sum_shard, dim)


def reduce_scatter(x: torch.Tensor, group: TensorGroup, dim: int) -> torch.Tensor:
    """This process's shard of the sum over the processes."""
    return x if group.size == 1 else _Collective.apply(x, group, _sum_shard, _concatenate, dim)


def enter_tensor_region(x: torch.Tensor, group: TensorGroup) -> torch.Tensor:
    """From the residual stream into sharded matrices: all tokens, [..., S, H]."""
    return all_gather(x, group, SEQUENCE) if group.sequence_parallel else copy(x, group)


def leave_tensor_region(x: torch.Tensor, group: TensorGroup) -> torch.Tensor:
    """From each process's part of a sum, [..., S, H], back to the residual stream."""
    return reduce_scatter(x, group, SEQUENCE) if group.sequence_parallel else reduce(x, group)


def sum_gradients(group: TensorGroup, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same parameters, for use on this process's tokens only: their gradients become the sum over all tokens.

    So the gradient that the optimizer sees is complete and equal on all processes, whatever it does with it. The sum
    is taken in fp32, once for all the parameters of a call.
    """
    return parameters if group.size == 1 else _SumGradients.apply(group, *parameters)


def broadcast_first(x: torch.Tensor, group: TensorGroup) -> torch.Tensor:
    """Write the first process's ``x`` over the others', for decisions that must be the same; without gradients.

    Args:
        x: contiguous; of the same shape on all processes.
    """
    if group.size > 1:
        dist.broadcast(x, group=group.group, group_src=0)
    return x


class _Collective(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, forward, backward, dim):
        ctx.group, ctx.functions, ctx.dim = group, (backward, forward), dim
        return forward(x, group, dim)

    @staticmethod
    def backward(ctx, grad):
        forward, backward = ctx.functions
        return _Collective.apply(grad, ctx.group, forward, backward, ctx.dim), None, None, None, None


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, group, *parameters):
        ctx.group = group
        return tuple(parameter.view_as(parameter) for parameter in parameters)

    @staticmethod
    def backward(ctx, *grads):
        flat = torch.cat([grad.flatten().to(torch.promote_types(grad.dtype, torch.float32)) for grad in grads])
        dist.all_reduce(flat, group=ctx.group.group)
        pieces = flat.split([grad.numel() for grad in grads])
        return None, *(piece.view_as(grad).to(grad.dtype) for piece, grad in zip(pieces, grads, strict=True))


def _identity(x: torch.Tensor, group: TensorGroup, dim: int) -> torch.Tensor:
    return x.view_as(x)


def _sum(x: torch.Tensor, group: TensorGroup, dim: int) -> torch.Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group.group)
    return x


def _shard(x: torch.Tensor, group: TensorGroup, dim: int) -> torch.Tensor:
    length = group.shard_size(x.size(dim), "a dimension of")
    return x.narrow(dim, group.rank * length, length).contiguous()


def _concatenate(x: torch.Tensor, group: TensorGroup, dim: int) -> torch.Tensor:
    first = x.movedim(dim, 0).contiguous()
    joined = first.new_empty(group.size * first.size(0), *first.shape[1:])
    _all_gather_into(joined, first, group=group.group)
    return joined.movedim(0, dim).contiguous()


def _sum_shard(x: torch.Tensor, group: TensorGroup, dim: int) -> torch.Tensor:
    first = x.movedim(dim, 0).contiguous()
    piece = first.new_empty(group.shard_size(first.size(0), "a dimension of"), *first.shape[1:])
    _reduce_scatter_into(piece, first, group=group.group)
    return piece.movedim(0, dim).contiguous()
