"""Which piece of a global parameter a process holds.

A parameter that is cut says how in its attribute ``shards``, a tuple of :class:`Shard`, one for each dimension that is
cut. Initial values, checkpoints and the gradient norm follow from it; whatever has no such attribute is whole.
"""

import dataclasses
from collections.abc import Sequence

import torch


@dataclasses.dataclass(frozen=True)
class Shard:
    """Dimension ``dim`` consists of ``parts`` equal parts, each cut into ``size`` equal pieces; this is piece ``rank``.

    A process holds its piece of each part, one after another: of Q, K and V stacked (``parts`` = 3), the rows of its
    heads out of each.
    """

    dim: int
    size: int
    rank: int
    parts: int = 1


def set_shards(parameter: torch.nn.Parameter, *shards: Shard) -> None:
    """Say how ``parameter`` is cut; dimensions that are cut into one piece are left out."""
    parameter.shards = tuple(shard for shard in shards if shard.size > 1)


def shards_of(parameter: torch.Tensor) -> tuple[Shard, ...]:
    """How ``parameter`` is cut; empty if it is whole."""
    return getattr(parameter, "shards", ())


def global_shape(shape: Sequence[int], shards: Sequence[Shard]) -> tuple[int, ...]:
    """Shape of the whole tensor of which a process holds ``shape``."""
    whole = list(shape)
    for shard in shards:
        whole[shard.dim] *= shard.size
    return tuple(whole)


def take(whole: torch.Tensor, shards: Sequence[Shard]) -> torch.Tensor:
    """This process's piece of ``whole``."""
    for shard in shards:
        length = whole.size(shard.dim) // shard.parts // shard.size
        parts = [
            whole.narrow(shard.dim, (part * shard.size + shard.rank) * length, length) for part in range(shard.parts)
        ]
        whole = parts[0] if shard.parts == 1 else torch.cat(parts, shard.dim)
    return whole


def place(
    offsets: Sequence[int], box: torch.Tensor, shape: Sequence[int], shards: Sequence[Shard]
) -> list[tuple[tuple[int, ...], torch.Tensor]]:
    """Where a box of the local tensor lies in the global one.

    Args:
        offsets: the box's place in the local tensor of ``shape``.
        box: its data.

    Returns:
        Pairs of global offsets and data, which are views of ``box``: one for each part that the box touches.
    """
    placed = [(tuple(offsets), box)]
    for shard in shards:
        length = shape[shard.dim] // shard.parts
        placed = [
            ((*where[: shard.dim], at + (part * (shard.size - 1) + shard.rank) * length, *where[shard.dim + 1 :]), x)
            for where, data in placed
            for part, at, x in _by_part(where[shard.dim], data, shard.dim, length)
        ]
    return placed


def _by_part(start: int, data: torch.Tensor, dim: int, length: int) -> list[tuple[int, int, torch.Tensor]]:
    """Cut ``data``, which begins at ``start``, where parts of ``length`` meet: triples (part, start, data)."""
    end, pieces, at = start + data.size(dim), [], start
    while at < end:
        stop = min(end, (at // length + 1) * length)
        pieces.append((at // length, at, data.narrow(dim, at - start, stop - at)))
        at = stop
    return pieces
