"""Which part of a global parameter a process holds, as data by the parameter's name.

A module that shards its parameters, or holds experts, has a method ``param_layouts`` (:class:`ShardedModule`);
:func:`collect_layouts` asks all modules of a model. Initial values, parameter groups, the gradient norm, checkpoints
and replica checks follow from the layouts.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import nn


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


@dataclasses.dataclass(frozen=True)
class ParamLayout:
    """How one parameter is spread over processes. The default is a parameter that every process holds whole.

    Args:
        shards: how it is cut, one :class:`Shard` for each dimension; those of size 1 are left out.
        expert_degree: of an expert's parameter, the number of processes that share the layer's experts. Its gradient is
            reduced over the processes that hold the same experts only.
    """

    shards: tuple[Shard, ...] = ()
    expert_degree: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shards", tuple(shard for shard in self.shards if shard.size > 1))

    @property
    def is_expert(self) -> bool:
        """Whether the parameter belongs to experts."""
        return self.expert_degree is not None

    @property
    def model_parallel(self) -> bool:
        """Whether every tensor-parallel rank's gradient counts in the gradient norm, and not only that of the first.

        Either the ranks hold different shards, or ZeRO-1 keeps different parts of an expert's gradient on each.
        """
        return bool(self.shards) or self.is_expert


WHOLE = ParamLayout()


@runtime_checkable
class ShardedModule(Protocol):
    """A module that holds some of its own parameters in part, or experts."""

    def param_layouts(self) -> Mapping[str, ParamLayout]:
        """Layouts by the parameters' names within this module; parameters that are not named are whole."""
        ...


def collect_layouts(model: nn.Module) -> dict[str, ParamLayout]:
    """The layout of each parameter of ``model``, by the names and in the order of ``model.named_parameters()``.

    Raises:
        AttributeError: a module gives the layout of a parameter that it does not have.
    """
    layouts = {name: WHOLE for name, _ in model.named_parameters()}
    for prefix, module in model.named_modules():
        if isinstance(module, ShardedModule):
            for name, layout in module.param_layouts().items():
                _ = getattr(module, name)
                full_name = f"{prefix}.{name}" if prefix else name
                if full_name in layouts:  # a tied parameter is listed under its first name only
                    layouts[full_name] = layout
    return layouts


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


def global_boxes(
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
