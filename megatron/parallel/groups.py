"""What a layer must know of the processes that share its work."""

import dataclasses

import torch.distributed as dist


@dataclasses.dataclass(frozen=True)
class ExpertGroup:
    """The processes that hold the experts of a layer between them.

    Process ``rank`` of ``size`` holds experts ``rank * E / size`` up to the next one's. ``group`` is None when ``size``
    is 1: then nothing is communicated.
    """

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None
