"""Hooks that end a run which has gone wrong."""

from megatron.training.clock import Step
from megatron.training.hooks.checkpointer import Checkpointer
from megatron.training.hooks.hook import Hook, Outcome
from megatron.training.start import Checkpoint


class WatchdogTimer(Hook):
    """Tells the watchdog when each update begins (``--watchdog-factor``)."""

    def pre_step(self) -> None:
        """The update before this one is done."""
        number = self.run.clock.steps + 1
        self.run.watchdog.begin(number, f"update {number}")


class ReplicaCheck(Hook):
    """Compares the parameters that several ranks hold, every ``--check-replicas`` updates."""

    def post_step(self, step: Step) -> None:
        """Raises ReplicasDiffer, on all ranks, if a parameter is not the same everywhere."""
        every = self.run.config.training.check_replicas
        if every and step.number % every == 0:
            self.run.engine.check_replicas()


class TrainingDiverged(RuntimeError):
    """Too many updates in a row had a loss or gradient that is not finite."""


class SkippedUpdateLimit(Hook):
    """Ends a run after more than ``--max-skipped-updates`` in a row whose loss or gradient is not finite."""

    def __init__(self, checkpointer: Checkpointer) -> None:
        self._checkpointer = checkpointer
        self._in_a_row = 0

    def on_outcome(self, outcome: Outcome) -> None:
        """Raises TrainingDiverged, on all ranks, at the limit."""
        if outcome.only_lowers_loss_scale:
            return
        self._in_a_row = 0 if outcome.finite else self._in_a_row + 1
        most = self.run.config.training.max_skipped_updates
        if self._in_a_row > most:
            self._checkpointer.finish_background_save()
            raise TrainingDiverged(
                f"{self._in_a_row} updates in a row had a loss or gradient that is not finite "
                f"(--max-skipped-updates {most}), at {self.run.clock.tokens} tokens. {self._checkpointer.advice()}"
            )

    def post_rewind(self, source: Checkpoint) -> None:
        """What went wrong since is undone."""
        self._in_a_row = 0
