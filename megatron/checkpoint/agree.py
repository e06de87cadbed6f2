"""Steps that succeed or fail on all ranks of a group together."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megatron.checkpoint.errors import CheckpointError

T = TypeVar("T")


class Coordinator:
    """Runs steps on the ranks of a process group, or in this process when torch.distributed is not initialized."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.distributed = dist.is_available() and dist.is_initialized()
        self.process_group = group if self.distributed else None
        self.rank = dist.get_rank(group) if self.distributed else 0
        self.size = dist.get_world_size(group) if self.distributed else 1
        if self.rank < 0:
            raise ValueError("this process is not in the group given for the checkpoint; only its members may call")

    def gather(self, step: Callable[[], T]) -> list[T]:
        """Call ``step`` on every rank. Returns every rank's result, in the order of ranks.

        Raises:
            CheckpointError: it failed somewhere; on every rank, with the same message.
        """
        mine: tuple[Any, str | None]
        try:
            mine = (step(), None)
        except CheckpointError as error:
            mine = (None, str(error))
        except Exception as error:
            mine = (None, f"{type(error).__name__}: {error}")
        everyone: list[Any] = [mine]
        if self.distributed:
            everyone = [None] * self.size
            dist.all_gather_object(everyone, mine, group=self.process_group)
        raise_failures({rank: failure for rank, (_, failure) in enumerate(everyone) if failure is not None}, self.size)
        return [result for result, _ in everyone]

    def each(self, step: Callable[[], T]) -> T:
        """Call ``step`` on every rank. Returns this rank's result, which is not sent; raises as :meth:`gather`."""
        results: list[T] = []
        self.gather(lambda: results.append(step()))
        return results[0]

    def first(self, step: Callable[[], T]) -> T:
        """Call ``step`` on the first rank only, and send its result to every rank; raises as :meth:`gather`."""
        of_first = self.gather(lambda: [step()] if self.rank == 0 else [])[0]
        return of_first[0]


def raise_failures(failures: dict[int, str], world_size: int, doing: str = "") -> None:
    """Raise one CheckpointError that says what failed on which ranks; equal failures are listed once.

    Args:
        failures: rank -> what went wrong there; nothing is raised when it is empty.
        doing: begins the message.
    """
    if not failures:
        return
    ranks: dict[str, list[int]] = {}
    for rank, failure in sorted(failures.items()):
        ranks.setdefault(failure, []).append(rank)
    messages = []
    for failure, where in ranks.items():
        named = ", ".join(map(str, where[:8])) + (", ..." if len(where) > 8 else "")
        messages.append(failure if world_size == 1 else f"rank {named}: {failure}")
    if len(messages) > 5:
        messages[5:] = [f"and {len(messages) - 5} other failures"]
    raise CheckpointError(doing + "; ".join(messages))
