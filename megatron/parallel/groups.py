"""Process groups: those that share a layer's experts, and those that share every layer's matrices."""

import dataclasses

import torch.distributed as dist


def member_group(group: dist.ProcessGroup | int | None) -> dist.ProcessGroup:
    """What :func:`torch.distributed.new_group` returned to a rank of the group, without its other types."""
    assert isinstance(group, dist.ProcessGroup), "this rank is not in the group"
    return group


@dataclasses.dataclass(frozen=True)
class NodeGroups:
    """An expert group spread over ``nodes`` nodes with ``members`` ranks each: group rank = node * members + member.

    ``inside`` has the members on this process's node, ``across`` the same member of every node, both in order.
    """

    nodes: int
    members: int
    inside: dist.ProcessGroup
    across: dist.ProcessGroup


@dataclasses.dataclass(frozen=True)
class ExpertGroup:
    """The ``size`` processes over which the experts of a layer are spread; this one has the group rank ``rank``.

    Of E experts, group rank r holds E / size, from number r * E / size on. ``group`` is None for a single process.
    With ``node_groups`` the all-to-all is hierarchical. Buffers of fixed capacity are split into ``overlap_chunks``
    chunks to overlap the all-to-all with computation.
    """

    size: int
    rank: int
    group: dist.ProcessGroup | None
    node_groups: NodeGroups | None = None
    overlap_chunks: int = 1


@dataclasses.dataclass(frozen=True)
class TensorGroup:
    """The ``size`` processes over which every layer's matrices are sharded; this one has the group rank ``rank``.

    Between layers each process holds the whole residual stream, or with ``sequence_parallel`` its shard of every
    sequence (shard ``rank`` of ``size`` equal ones). Experts are replicated, and each process computes its share of the
    assignments; with ``shard_experts`` the experts' matrices are sharded too. ``group`` is None for a single process.
    """

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None
    sequence_parallel: bool = False
    shard_experts: bool = False

    def shard_size(self, length: int, what: str) -> int:
        """Length of one process's shard of a dimension of this ``length``.

        Raises:
            ValueError: ``size`` does not divide ``length``.
        """
        if length % self.size:
            raise ValueError(
                f"{what} {length} cannot be shared evenly by {self.size} tensor-parallel processes: {length} = "
                f"{self.size} x {length // self.size} + {length % self.size}; choose a multiple of {self.size}"
            )
        return length // self.size


ALONE = TensorGroup()
LOCAL_EXPERTS = ExpertGroup(size=1, rank=0, group=None)
