"""Which ranks form which group: arithmetic on rank numbers, for any number of ranks and without processes.

Ranks are counted along four axes, the first one fastest:

    rank = tensor + T * (data + D * stage)        T * D * P ranks; data = expert + EP * replica

The D data-parallel ranks of a stage are divided into D / EP expert-parallel groups of EP consecutive ranks, over which
the experts of a layer are spread. The ranks with the same position in each of them hold the same experts
(expert-data-parallel group). EP may differ from layer to layer, so both kinds exist once for each degree.

A group's members are in ascending order, and the groups of a kind in the order of their first members.
"""

import dataclasses

import numpy as np

_AXES = ("stage", "replica", "expert", "tensor")

# Kind of group -> the axes along which its members differ
_KINDS: dict[str, tuple[str, ...]] = {
    "tensor": ("tensor",),  # share every layer's matrices
    "pipeline": ("stage",),  # have the stages of one copy of the model
    "data": ("replica", "expert"),  # hold the same part of the model outside the experts
    "model": ("stage", "tensor"),  # hold one copy of the model
    "embedding": ("stage",),  # first and last stage: both have the token table
    "expert": ("expert",),  # share the experts of a layer
    "expert_data": ("replica",),  # hold the same experts, or with replicated experts see different tokens for them
}


@dataclasses.dataclass(frozen=True)
class Grid:
    """The groups of ``world`` ranks.

    Tensor-parallel ranks each have whole experts and compute different tokens, so they belong to one expert-data group;
    with ``shard_experts`` each has a shard of every expert, and only ranks with the same tensor rank form the group.

    Raises:
        ValueError: the sizes do not multiply to ``world``; the message has the equation.
    """

    world: int
    tensor: int = 1
    pipeline: int = 1
    shard_experts: bool = False

    def __post_init__(self) -> None:
        for name, size in (("world", self.world), ("tensor", self.tensor), ("pipeline", self.pipeline)):
            if size < 1:
                raise ValueError(f"{name} = {size}; a size of a grid is at least 1")
        model = self.tensor * self.pipeline
        if self.world % model:
            raise ValueError(
                f"world = tensor x pipeline x data does not hold for any number of data-parallel ranks: {self.world} = "
                f"{self.tensor} x {self.pipeline} x {self.world // model} + {self.world % model}; take "
                f"{max(self.world // model, 1) * model} ranks or other sizes"
            )

    @property
    def data(self) -> int:
        """Data-parallel ranks."""
        return self.world // (self.tensor * self.pipeline)

    def groups(self, kind: str, degree: int = 1) -> np.ndarray:
        """All groups of a kind, int64 [groups, members].

        Args:
            kind: tensor, pipeline, data, model, embedding, expert or expert_data.
            degree: of expert parallelism, for the last two kinds.

        Raises:
            ValueError: there is no such kind, or ``degree`` does not divide the data-parallel ranks.
        """
        members = self._axes_of(kind)
        ranks = np.arange(self.world).reshape(self._shape(degree))
        if kind == "embedding":
            ranks = ranks[:: max(self.pipeline - 1, 1)]
        inside = [axis for axis, name in enumerate(_AXES) if name in members]
        outside = [axis for axis, name in enumerate(_AXES) if name not in members]
        size = int(np.prod([ranks.shape[axis] for axis in inside]))
        return ranks.transpose(outside + inside).reshape(-1, size)

    def group_of(self, rank: int, kind: str, degree: int = 1) -> list[int]:
        """The group of a kind that ``rank`` belongs to; no other group is built. A middle stage has no embedding group.

        Raises:
            ValueError: as for :meth:`groups`, or there is no such rank.
        """
        if not 0 <= rank < self.world:
            raise ValueError(f"rank {rank} is not from 0 to {self.world - 1}")
        members, shape = self._axes_of(kind), self._shape(degree)
        coordinates = np.unravel_index(rank, shape)
        along = [
            np.arange(size) if name in members else np.array([at])
            for name, size, at in zip(_AXES, shape, coordinates, strict=True)
        ]
        if kind == "embedding":
            along[0] = along[0][:: max(self.pipeline - 1, 1)]
            if coordinates[0] not in along[0]:
                return []
        return np.ravel_multi_index(np.ix_(*along), shape).flatten().tolist()

    def _axes_of(self, kind: str) -> tuple[str, ...]:
        if kind not in _KINDS:
            raise ValueError(f"no kind of group {kind!r}; there are {', '.join(_KINDS)}")
        replicated = kind == "expert_data" and not self.shard_experts
        return _KINDS[kind] + (("tensor",) if replicated else ())

    def _shape(self, degree: int) -> tuple[int, int, int, int]:
        if degree < 1 or self.data % degree:
            raise ValueError(
                f"data = expert-parallel x replicas does not hold for degree {degree}: {self.data} data-parallel ranks "
                f"({self.world} / {self.tensor} tensor / {self.pipeline} pipeline); take a divisor of {self.data}"
            )
        return self.pipeline, self.data // degree, degree, self.tensor
