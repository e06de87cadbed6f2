"""Checks that replicas of parameters are equal on all processes.

They diverge when hardware computes wrongly, or when a random number or a reduction was not shared as it should be. The
loss may not show it for a long time.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist

from megatron.parallel.initialize import Topology
from megatron.parallel.sharding import ParamLayout

CHUNK = 1 << 24  # elements of a checksum at a time, 8 bytes each
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MIXER = 0x1E3779B97F4A7C15  # odd


class ReplicasDiffer(RuntimeError):
    """Processes that must hold the same parameter hold different ones."""


def checksum(x: torch.Tensor) -> torch.Tensor:
    """The sum of each element's bits times an odd number that depends on its position, modulo 2^64; an int64 scalar.

    It follows from the bits alone, NaNs and the sign of zero included, and changes with any one element for sure: a
    difference of bits below 2^64 times an odd number is not 0 modulo 2^64.
    """
    bits = x.detach().contiguous().view(-1).view(_INTEGERS[x.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for start in range(0, bits.numel(), CHUNK):
        chunk = bits[start : start + CHUNK].long()
        position = torch.arange(start, start + chunk.numel(), device=x.device)
        total += (chunk * (2 * position + 1) * _MIXER).sum()
    return total


def check_replicas(
    parameters: Iterable[tuple[str, torch.nn.Parameter]], layouts: Mapping[str, ParamLayout], topology: Topology
) -> None:
    """Compare every replicated parameter over all processes that have it. All ranks call this together.

    Costs two small reductions for each group and one pass over the parameters.

    Args:
        parameters: of the model, or this rank's part of it, by the names that they have in the whole model.
        layouts: of the parameters, by name.
        topology: of this rank.

    Raises:
        ReplicasDiffer: on every rank, naming the first parameter that differs and the ranks that are in the minority.
    """
    named = dict(parameters)
    sums = {name: checksum(parameter) for name, parameter in named.items()}
    differing = {name for group, names in _groups(layouts, topology) for name in _differing(sums, names, group)}
    if topology.agree_max(len(differing)) == 0:
        return
    found = _gather(sorted(differing, key=list(named).index), topology)  # also by ranks whose own groups all agree
    names = dict.fromkeys(name for of_rank in found for name in of_rank)
    held = [(name, _shard_description(layouts[name]), int(sums[name])) for name in names if name in named]
    raise ReplicasDiffer(_describe(_gather(held, topology)))


def _gather(mine: list, topology: Topology) -> list[list]:
    everyone: list = [None] * topology.launch.world_size
    dist.all_gather_object(everyone, mine, group=topology.control_group)
    return everyone


def _groups(
    layouts: Mapping[str, ParamLayout], topology: Topology
) -> list[tuple[dist.ProcessGroup | None, Sequence[str | None]]]:
    """The groups over which parameters are replicated, with the names of these, in the same order on all ranks."""
    outside = [name for name, layout in layouts.items() if not layout.is_expert]
    table = "embedding.word_embeddings.weight"  # on the first and the last stage of a pipeline
    groups: list[tuple[dist.ProcessGroup | None, Sequence[str | None]]] = [
        (topology.data_parallel_group, outside),
        (
            topology.tensor_parallel_group,
            [name for name, layout in layouts.items() if not layout.is_expert and not layout.shards],
        ),
        (topology.pipeline_parallel_group, [table if table in layouts else None]),
    ]
    for degree in sorted(topology.expert_data_groups):
        experts = [name for name, layout in layouts.items() if layout.expert_degree == degree]
        groups.append((topology.expert_data_group(degree), experts))
    return groups


def _differing(sums: dict[str, torch.Tensor], names: Sequence[str | None], group: dist.ProcessGroup | None) -> set[str]:
    """Those of ``names`` whose sums are not equal in ``group``; None means that only other ranks have it."""
    if group is None or not names or dist.get_world_size(group) == 1:
        return set()
    limits = torch.iinfo(torch.int64)
    device = next(iter(sums.values())).device
    least, most = (
        torch.stack([torch.tensor(none, device=device) if name is None else sums[name] for name in names])
        for none in (limits.max, limits.min)
    )
    dist.all_reduce(least, op=dist.ReduceOp.MIN, group=group)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    unequal = (least != most).tolist()
    return {name for name, differs in zip(names, unequal, strict=True) if differs and name is not None}


def _shard_description(layout: ParamLayout) -> str:
    """Which shard of the whole parameter this rank holds, for messages."""
    return "".join(f", piece {shard.rank} of {shard.size} of dimension {shard.dim}" for shard in layout.shards)


def _describe(everyone: list[list[tuple[str, str, int]]]) -> str:
    holders: dict[tuple[str, str], dict[int, list[int]]] = {}  # (name, piece) -> checksum -> ranks
    for rank, found in enumerate(everyone):
        for name, piece, value in found:
            holders.setdefault((name, piece), {}).setdefault(value, []).append(rank)
    differing = [(what, sorted(ranks.values(), key=len)) for what, ranks in holders.items() if len(ranks) > 1]
    (name, piece), by_value = differing[0]
    ranks = [rank for each in by_value for rank in each]
    minority = "no majority agrees"
    if 2 * len(by_value[-1]) > len(ranks):
        minority = f"odd: rank {', '.join(str(rank) for each in by_value[:-1] for rank in each)}"
    more = f"; so do {len(differing) - 1} more parameters" if len(differing) > 1 else ""
    return (
        f"replicas differ: {name}{piece} is not the same on ranks {sorted(ranks)} ({minority}){more}. Suspect the "
        "memory or the GPU of an odd rank, and restart from a checkpoint before the last check that passed"
    )
