"""The processes that share one layer's experts, or every layer's matrices."""

import dataclasses

import torch.distributed as dist


@dataclasses.dataclass(frozen=True)
class NodeGroups:
    """An expert group spread over ``nodes`` nodes with ``members`` places on each: place = node * members + member.

    ``inside`` joins the places of this process's node, ``across`` the same place of every node, both in order.
    """

    nodes: int
    members: int
    inside: dist.ProcessGroup
    across: dist.ProcessGroup


@dataclasses.dataclass(frozen=True)
class ExpertGroup:
    """The ``size`` processes over which the experts of a layer are spread, seen from the one at place ``rank``.

    With E experts, place r holds the E / size experts from r * E / size on. ``group`` is None for a single process.
    With ``node_groups`` the all-to-all is hierarchical. Buffers of fixed capacity are sent in ``overlap_chunks``
    pieces: while one is computed, others are being sent.
    """

    size: int
    rank: int
    group: dist.ProcessGroup | None
    node_groups: NodeGroups | None = None
    overlap_chunks: int = 1


@dataclasses.dataclass(frozen=True)
class TensorGroup:
    """The ``size`` processes that share every layer's matrices, seen from the one at place ``rank``.

    Between layers each of them holds the whole residual stream, or with ``sequence_parallel`` a piece of every sequence
    (piece r of ``size`` equal ones). Experts are replicated, and each process serves its share of the assignments; with
    ``shard_experts`` the experts' matrices are shared too. ``group`` is None for a single process.
    """

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None
    sequence_parallel: bool = False
    shard_experts: bool = False

    def piece(self, length: int, what: str) -> int:
        """Length of one process's piece of ``length`` things.

        Raises:
            ValueError: they cannot be cut into equal pieces.
        """
        if length % self.size:
            raise ValueError(
                f"{what} {length} cannot be shared evenly by {self.size} tensor-parallel processes: {length} = "
                f"{self.size} x {length // self.size} + {length % self.size}; choose a multiple of {self.size}"
            )
        return length // self.size


ALONE = TensorGroup()
