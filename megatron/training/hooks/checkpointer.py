"""Saves a run: at intervals, in the background if asked to, and at its end."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from megatron.checkpoint import AsyncSaver, CheckpointError, CheckpointStatus, CommunicationError, save
from megatron.checkpoint.folder import step_name
from megatron.config import CheckpointConfig
from megatron.parallel.initialize import Topology
from megatron.training.clock import Step
from megatron.training.hooks.checkpoint_tracker import CheckpointTracker, origin_of
from megatron.training.hooks.hook import Hook, Outcome
from megatron.training.metadata import describe
from megatron.training.start import Checkpoint, on_first_rank


class Checkpointer(Hook):
    """Saves after good updates only, and keeps track of which checkpoints are good.

    Every ``--save-interval`` updates a save is due; after an update that is not good it waits for the next good one. A
    save that fails, for instance on a full disk, is logged, and fails the run only if it was the last.
    """

    def __init__(self, config: CheckpointConfig, topology: Topology) -> None:
        self._folder = None if config.save is None else Path(config.save)
        self._tracker = CheckpointTracker(self._folder, config.keep_last, topology.is_first)
        self._saver = AsyncSaver(topology.control_group) if config.async_save else None
        self._due = self._newly_due = False
        self._saving: Path | None = None  # the checkpoint that is being written
        self._failure: CheckpointError | None = None  # of the last save

    def pre_train(self) -> None:
        """The checkpoint that the run resumes from may yet turn out not to be good."""
        resumed = self.run.start.resumed
        if resumed is not None:
            self._tracker.start_from(on_first_rank(lambda: origin_of(resumed.path), self.run.topology))

    def post_step(self, step: Step) -> None:
        """Find out whether a save is due."""
        at_interval = step.crosses(self.run.config.checkpoint.save_interval, self.run.config.training.global_batch_size)
        self._newly_due, self._due = at_interval and not self._due, self._due or at_interval

    def needs_outcome(self, step: Step) -> bool:
        """Whether a save is due: only a good update is followed by one."""
        return self._due

    def on_outcome(self, outcome: Outcome) -> None:
        """Record what the update says of the checkpoints before it."""
        if outcome.only_lowers_loss_scale:
            return
        self._tracker.add_update(finite=outcome.finite, good=outcome.good)
        if self._saving is None:
            self._tracker.write_statuses()

    def post_rewind(self, source: Checkpoint) -> None:
        """Save the checkpoint that the run goes on from anew: it now knows of the data that is left out."""
        self.wait()
        self._tracker.rewind(source.path)
        self._save(CheckpointStatus.CONFIRMED)

    def end_step(self, step: Step) -> None:
        """Take note of a background save that is over."""
        if self._saver is not None and not self._saver.busy:
            self.finish_background_save()

    def save(self, stop_reason: str | None) -> None:
        """Save if that is due or the run ends, and the last update was good."""
        if self._due or stop_reason is not None:
            with self.run.paused():
                self._save_if_good(at_the_end=stop_reason is not None)

    def post_train(self, reason: str) -> None:
        """Raises CheckpointError if the last save failed."""
        self._tracker.wait()
        if self._failure is not None:
            raise self._failure

    def finish_background_save(self) -> None:
        """Wait for the checkpoint that is being saved in the background, if any, and take note of how that ended."""
        if self._saver is None or self._saving is None:
            return
        with self._failure_logged(self._saving):
            self._saver.wait()
            self._saving, self._failure = None, None
            self._tracker.write_statuses()

    def wait(self) -> None:
        """Return when no checkpoint is being saved or deleted any more."""
        self.finish_background_save()
        self._tracker.wait()

    def advice(self) -> str:
        """What a user can do when the run has gone wrong."""
        good, what = self._tracker.last_good, "a lower --lr or a longer --lr-warmup-tokens"
        if good is None:
            return f"No checkpoint is known to be good. Start anew, in another --save, with {what}"
        return f"Last good checkpoint: {good}. Resume from it with {what}, or look at the data of these steps"

    def _save_if_good(self, at_the_end: bool) -> None:
        tracker = self._tracker
        if tracker.good or (at_the_end and tracker.finite):
            self._save(tracker.status_of_new(at_the_end), in_background=not at_the_end)
        elif self._folder is not None and (at_the_end or self._newly_due):
            why = "whose loss is far above the usual" if tracker.finite else "with a loss or gradient not finite"
            problem = f"the checkpoint of step {self.run.clock.steps} would follow an update {why}"
            if at_the_end:
                self.finish_background_save()
                self._failure = CheckpointError(f"{problem}, and was not saved. {self.advice()}")
            self.run.log("not_saved", reason=problem if at_the_end else f"{problem}; saving waits for a good one")

    def _save(self, status: CheckpointStatus, in_background: bool = False) -> None:
        self._due = False
        if self._folder is None:
            return
        run, start = self.run, time.perf_counter()
        meta = describe(run)
        self.wait()
        background = self._saver if in_background else None
        path = self._saving = self._folder / step_name(run.clock.steps)
        if status is not CheckpointStatus.CONFIRMED:
            self._tracker.add_checkpoint(path, status)
        with self._failure_logged(path):
            tensors, group = run.engine.saved_tensors(), run.topology.control_group
            write = save if background is None else background.save
            write(self._folder, run.clock.steps, tensors, meta, group=group, status=status)
            if background is None:
                self._saving, self._failure = None, None
                if status.good:
                    self._tracker.delete_older()
            seconds = time.perf_counter() - start
            what = {"folder": str(path), "seconds": seconds, "background": background is not None}
            run.log("save", **what, standing=status.value)

    @contextlib.contextmanager
    def _failure_logged(self, path: Path) -> Iterator[None]:
        try:
            yield
        except CommunicationError:
            raise
        except CheckpointError as error:  # the same on all ranks, which go on together
            self._tracker.remove(path)
            self._saving, self._failure = None, error
            self.run.log("not_saved", reason=str(error))
