"""Which checkpoints of a run are good, and what follows: ``latest``, and what ``--keep-last`` may delete.

**The rule.** An update is good if its loss and gradient are finite and its loss is no outlier
(:meth:`megatron.training.hooks.spikes.SpikeDetector.is_outlier`). An update's loss is that of the weights before it, so
a checkpoint is confirmed by the first good update after it. Until then it is pending or, once an update that is not
good has followed, in doubt. An fp16 overflow that only lowers the loss scale, at a usual loss, does not count.

**What is saved.** At an interval, a checkpoint is saved right after a good update only; else it waits for the next one.
At the end of a run, or when it is asked to stop, what follows a good update counts as good (a run that resumes from it
may yet doubt it), what follows an outlier is saved in doubt, and after an update that is not finite nothing is saved.

**What follows.** ``latest`` names the newest checkpoint of the run that is not in doubt. Only good ones count for
``--keep-last``, and the last confirmed one is never deleted.

All ranks decide alike, from numbers that are equal on all. The first rank alone writes the records, never while another
checkpoint is being written (:mod:`megatron.checkpoint.folder` says where they lie).
"""

import contextlib
import dataclasses
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

from megatron.checkpoint.folder import (
    CheckpointStatus,
    checkpoint_status,
    complete_checkpoints,
    delete_older,
    mark_latest,
    record_status,
)


@dataclasses.dataclass(frozen=True)
class Origin:
    """The checkpoint that a run resumes from."""

    path: Path
    status: CheckpointStatus
    confirmed: Path | None  # it or, if it is not confirmed itself, the newest confirmed one that was saved before it


def origin_of(source: Path) -> Origin:
    """What the folder tells of the checkpoint ``source``."""
    status = checkpoint_status(source)
    if status is CheckpointStatus.CONFIRMED:
        return Origin(source, status, source)
    newest_first = complete_checkpoints(source.parent)
    older = newest_first[newest_first.index(source) + 1 :] if source in newest_first else []
    confirmed = (path for path in older if checkpoint_status(path) is CheckpointStatus.CONFIRMED)
    return Origin(source, status, next(confirmed, None))


@dataclasses.dataclass
class _Unconfirmed:
    """A checkpoint that was not confirmed when it was saved."""

    path: Path
    written: CheckpointStatus  # in the folder
    status: CheckpointStatus


class CheckpointTracker:
    """Follows the updates of a run and the checkpoints between them.

    Args:
        folder: of the run's checkpoints; None if it saves none.
        keep_last: how many good checkpoints to keep; 0 keeps all.
        writes: whether this rank writes the records.
    """

    def __init__(self, folder: Path | None, keep_last: int, writes: bool) -> None:
        self._folder, self._keep_last, self._writes = folder, keep_last, writes
        self.finite = self.good = True  # of the last update that says something
        self.last_good: Path | None = None
        self._unconfirmed: list[_Unconfirmed] = []
        self._deleting: threading.Thread | None = None

    def start_from(self, origin: Origin) -> None:
        """The run resumes from a checkpoint, which the next updates may confirm or doubt."""
        self.last_good = origin.confirmed
        if origin.status is not CheckpointStatus.CONFIRMED:
            self._unconfirmed.append(_Unconfirmed(origin.path, origin.status, origin.status))

    def add_update(self, *, finite: bool, good: bool) -> None:
        """Take in an update, and what it says of the checkpoints before it."""
        self.finite, self.good = finite, good
        for saved in self._unconfirmed:
            if saved.status is not CheckpointStatus.CONFIRMED:
                saved.status = CheckpointStatus.CONFIRMED if good else CheckpointStatus.DOUBTED

    def status_of_new(self, at_the_end: bool) -> CheckpointStatus:
        """The status of a checkpoint that is saved now."""
        if not self.good:
            return CheckpointStatus.DOUBTED
        return CheckpointStatus.ENDED if at_the_end else CheckpointStatus.PENDING

    def add_checkpoint(self, path: Path, status: CheckpointStatus) -> None:
        """A checkpoint of the run as it is now is being saved at ``path``."""
        self._unconfirmed.append(_Unconfirmed(path, status, status))

    def remove(self, path: Path) -> None:
        """That checkpoint could not be saved."""
        self._unconfirmed = [saved for saved in self._unconfirmed if saved.path != path]

    def rewind(self, source: Path) -> None:
        """The run goes on from an earlier checkpoint, which is good; of the later ones nothing more will be known."""
        self.finite = self.good = True
        self.last_good, self._unconfirmed = source, []

    def write_statuses(self) -> None:
        """Write down what is known by now. Nothing must be being saved."""
        changed = [saved for saved in self._unconfirmed if saved.status is not saved.written]
        good = [saved.path for saved in changed if saved.status is CheckpointStatus.CONFIRMED]
        if good:
            self.last_good = good[-1]
        self._unconfirmed = [saved for saved in self._unconfirmed if saved.status is not CheckpointStatus.CONFIRMED]
        for saved in changed:
            saved.written = saved.status
        if self._writes and changed:
            with _failure_as_warning():
                for saved in changed:
                    if self._is_ours(saved.path):
                        record_status(saved.path, saved.status)
                if self.last_good is not None and self._is_ours(self.last_good):
                    mark_latest(self.last_good)
        if good:
            self.delete_older()

    def delete_older(self) -> None:
        """Delete what ``--keep-last`` does not keep, while training goes on."""
        self.wait()
        if self._writes and self._folder is not None and self._keep_last:
            arguments = (self._folder, self._keep_last, self.last_good)
            self._deleting = threading.Thread(target=delete_older, args=arguments, name="delete-older")
            self._deleting.start()

    def wait(self) -> None:
        """Return when nothing is being deleted any more."""
        if self._deleting is not None:
            self._deleting.join()
            self._deleting = None

    def _is_ours(self, checkpoint: Path) -> bool:
        """Whether it lies among this run's checkpoints; those of others are left as they are."""
        return self._folder is not None and checkpoint.resolve().parent == self._folder.resolve()


@contextlib.contextmanager
def _failure_as_warning() -> Iterator[None]:
    """A record that the disk does not take is no reason for a run to end; a checkpoint then stays unconfirmed."""
    try:
        yield
    except OSError as error:
        warnings.warn(f"the status of checkpoints cannot be recorded: {error}", stacklevel=3)
