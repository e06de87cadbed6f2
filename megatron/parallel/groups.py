"""The processes that share one layer's experts."""

import dataclasses

import torch.distributed as dist


@dataclasses.dataclass(frozen=True)
class ExpertGroup:
    """The ``size`` processes over which the experts of a layer are spread, seen from the one at place ``rank``.

    With E experts, place r holds the E / size experts from r * E / size on. ``group`` is None for a single process.
    """

    size: int
    rank: int
    group: dist.ProcessGroup | None
