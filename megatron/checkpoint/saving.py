"""Save a checkpoint: all ranks together, at once or in the background."""

import atexit
import copy
import dataclasses
import datetime
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

from megatron.checkpoint.agree import Coordinator, raise_failures
from megatron.checkpoint.errors import CommunicationError
from megatron.checkpoint.folder import CheckpointStatus, abandon, delete_older, step_name
from megatron.checkpoint.storage import BoxSavePlanner, Writer
from megatron.checkpoint.tensors import Box, ShardedTensor, data_of


def save(
    folder: str | os.PathLike,
    step: int,
    entries: Sequence[ShardedTensor],
    meta: dict[str, Any],
    group: dist.ProcessGroup | None = None,
    *,
    keep_last: int = 0,
    status: CheckpointStatus = CheckpointStatus.CONFIRMED,
) -> Path:
    """Write a checkpoint and mark it latest. All ranks of ``group`` call it together.

    Until the last moment the new checkpoint has another name: a crash at any time leaves the previous one as it was.
    Saving a step that was saved before replaces that checkpoint, just as safely.

    Args:
        folder: the run's folder, on a file system that all ranks see.
        step: names the checkpoint.
        entries: this rank's tensors; with those of the other ranks they must cover each tensor exactly once, not
            counting replicas (equal boxes on several ranks, of which one is written).
        meta: what else to remember, JSON-able; the first rank's is kept.
        group: a process group, best on a CPU backend; None is the default group, or this process alone if
            torch.distributed is not initialised.
        keep_last: delete all but this many most recently saved good checkpoints; 0 keeps all.
        status: of the checkpoint; one in doubt is marked latest only if no other one is.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: on every rank, with the same message, which names the ranks and what went wrong. The ranks may
            go on and save again, but for CommunicationError.
    """
    return _write(Path(folder), step, lambda: entries, meta, Coordinator(group), keep_last, status)


class AsyncSaver:
    """Saves in the background: :meth:`save` returns as soon as the tensors are copied to CPU memory.

    One save runs at a time. Its thread has a process group of its own, so that its messages cannot mix with the
    training's. All members of ``group`` make their saver together. A program that ends waits for the last save.

    Args:
        group: the ranks that save together; None is the default group, or this process alone.
        timeout: how long a rank waits for the others to write their part; None is torch's default, 30 minutes.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, timeout: datetime.timedelta | None = None) -> None:
        self._made_for = group
        own = None
        if Coordinator(group).distributed:
            members = dist.get_process_group_ranks(group or dist.group.WORLD)
            own = dist.new_group(members, timeout=timeout, backend="gloo", use_local_synchronization=True)
            if not isinstance(own, dist.ProcessGroup):
                raise ValueError("this rank is not in the group that saves; make the saver on its members only")
        self._ranks = Coordinator(own)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self,
        folder: str | os.PathLike,
        step: int,
        entries: Sequence[ShardedTensor],
        meta: dict[str, Any],
        group: dist.ProcessGroup | None = None,
        *,
        keep_last: int = 0,
        status: CheckpointStatus = CheckpointStatus.CONFIRMED,
    ) -> Path:
        """Start a save; takes what :func:`megatron.checkpoint.save` takes. Waits for the save before.

        Args:
            group: the group that the saver was made for, or None.

        Returns:
            The folder that the checkpoint will have once :meth:`wait` returned without an error.

        Raises:
            CheckpointError: of the save before.
            ValueError: another group.
        """
        if group is not None and group is not self._made_for:
            raise ValueError("an AsyncSaver saves with the group it was made for; make one for each group")
        self.wait()
        staged: list[ShardedTensor] = []
        failure: Exception | None = None
        try:
            staged, meta = _copy_to_cpu(entries), copy.deepcopy(meta)
        except Exception as error:  # the save reports it to all ranks, so that none waits for this one
            failure = error

        def copies() -> list[ShardedTensor]:
            if failure is not None:
                raise failure
            return staged

        self._thread = threading.Thread(
            target=self._run, args=(Path(folder), step, copies, meta, self._ranks, keep_last, status),
            name=f"save-{step_name(step)}",
        )  # fmt: skip
        atexit.register(self.wait)
        self._thread.start()
        return Path(folder) / step_name(step)

    @property
    def busy(self) -> bool:
        """Whether a save is under way on this rank."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Return when nothing is being saved any more.

        Raises:
            CheckpointError: the save failed; raised once, on every rank.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        atexit.unregister(self.wait)
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, *what: Any) -> None:
        try:
            _write(*what)
        except BaseException as error:  # whatever it is, wait() must not return as if all were well
            self._error = error


def _write(
    folder: Path,
    step: int,
    entries: Callable[[], Sequence[ShardedTensor]],
    meta: dict[str, Any],
    ranks: Coordinator,
    keep_last: int,
    status: CheckpointStatus,
) -> Path:
    doing = f"the checkpoint of step {step} was not saved in {folder}; earlier ones are as they were. "
    try:
        state_dict_saver.save(
            {},
            storage_writer=Writer(folder, step, meta, status),
            planner=BoxSavePlanner(entries),
            process_group=ranks.process_group,
            no_dist=not ranks.distributed,
        )
    except CheckpointException as error:
        if ranks.rank == 0:
            abandon(folder, step)
        raise_failures({rank: str(failure) for rank, (failure, _) in error.failures.items()}, ranks.size, doing)
    except RuntimeError as error:
        raise CommunicationError(f"{doing}Rank {ranks.rank} lost contact with another one: {error}") from error
    if ranks.rank == 0:
        delete_older(folder, keep_last)
    return folder / step_name(step)


def _copy_to_cpu(entries: Sequence[ShardedTensor]) -> list[ShardedTensor]:
    """Copies of the data in CPU memory (pinned, for tensors on a GPU), finished when this returns."""
    streams: set[torch.cuda.Stream] = set()
    copies = []
    for entry in entries:
        boxes = []
        for offsets, tensor in entry.boxes:
            source = data_of(tensor)
            if source.is_cuda:
                streams.add(torch.cuda.current_stream(source.device))
                target = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
                boxes.append(Box(offsets, target.copy_(source, non_blocking=True)))
            else:
                boxes.append(Box(offsets, source.clone()))
        copies.append(dataclasses.replace(entry, boxes=boxes))
    for stream in streams:
        stream.synchronize()
    return copies
