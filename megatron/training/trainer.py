"""The training loop.

The host never waits for the device without need: what an update did is read while the device is busy with the next one,
or at once where a hook needs it, for a log line, a validation or a save.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Concatenate, NamedTuple, ParamSpec

from megatron.engine.base import AsyncScalar, StepResult
from megatron.training.batches import micro_batches_per_rank, training_batches
from megatron.training.clock import Step, global_batch_size
from megatron.training.hooks.hook import Hook, Outcome
from megatron.training.metadata import hook_states
from megatron.training.metrics import mean_loss
from megatron.training.run import Run
from megatron.training.start import Checkpoint

_P = ParamSpec("_P")


class _Queued(NamedTuple):
    """An update that the device may still be computing, and its loss."""

    step: Step
    result: StepResult
    loss: AsyncScalar


class Trainer:
    """Trains from the position of ``run``'s clock to the end, or until the run is asked to stop.

    Raises:
        ValueError: two hooks have the same name.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.hooks = run, run.hooks
        self._queued: _Queued | None = None
        for name, count in Counter(hook.key for hook in self.hooks).items():
            if count > 1:
                raise ValueError(f"got {count} hooks with the name {name!r}; set the attribute name of each")
        for hook in self.hooks:
            hook.run = run

    def train(self) -> str:
        """Train; returns why it ended.

        A failed save, for instance on a full disk, is logged, and training continues.

        Raises:
            CheckpointError: the last save failed, or there was nothing good to save.
            TrainingDiverged: too many updates in a row were skipped.
        """
        if self.run.start.resumed is not None:
            self._load_hook_states(self.run.start.resumed)
        try:
            return self._train()
        finally:
            self._call(Hook.close)

    def _train(self) -> str:
        self._call(Hook.pre_train)
        batches, reason = training_batches(self.run), self.run.stop_reason()
        while reason is None:
            self._call(Hook.pre_step)
            queued = self._queue_step(batches)
            self._read_outcome()  # of the update before: the device is busy with this one
            self._queued = queued
            self._call(Hook.post_step, queued.step)
            if any(hook.needs_outcome(queued.step) for hook in self.hooks):
                self._read_outcome()
            if self._went_back():
                batches = training_batches(self.run)
                continue
            self._call(Hook.end_step, queued.step)
            reason = self.run.stop_reason()
            if reason is not None:
                self._read_outcome()
                if self._went_back():
                    break
            self._call(Hook.save, reason)
        self._call(Hook.post_train, reason)
        return reason

    def _call(self, method: Callable[Concatenate[Hook, _P], None], *args: _P.args, **kwargs: _P.kwargs) -> None:
        """Call a method of every hook, in their order."""
        for hook in self.hooks:
            getattr(hook, method.__name__)(*args, **kwargs)

    def _queue_step(self, batches: Iterator[dict[str, Any]]) -> _Queued:
        """Have the device do the next update, and set the clock past it."""
        run = self.run
        size = global_batch_size(run.config.training, run.clock.samples)
        step = run.clock.next_step(size)
        monitored = any(hook.needs_monitors(step) for hook in self.hooks)
        micro_batches = self._next(batches, micro_batches_per_rank(run, size))
        result = run.engine.train_step(micro_batches, step.end * run.config.model.seq_length, monitored)
        loss = mean_loss(result.sums)
        return _Queued(run.clock.advance(size), result, loss)

    def _next(self, batches: Iterator[dict[str, Any]], count: int) -> list[dict[str, Any]]:
        """The micro-batches of an update."""
        micro_batches = list(itertools.islice(batches, count))
        if len(micro_batches) < count:
            raise RuntimeError(
                f"the data ended after {self.run.clock.samples} samples, before the {self.run.total_samples} of the run"
            )
        return micro_batches

    def _read_outcome(self) -> None:
        """Tell the hooks what the queued update did, unless they know; waits until the device is through with it."""
        if self._queued is None:
            return
        (step, result, loss), self._queued = self._queued, None
        self.run.clock.skipped += result.skipped
        self._call(Hook.on_outcome, Outcome(step, result, float(loss)))

    def _went_back(self) -> bool:
        """Go back to an earlier checkpoint, which is then saved anew, if a hook asks for it."""
        for hook in self.hooks:
            source = hook.rewind_to()
            if source is not None:
                self._rewind(source)
                return True
        return False

    def _rewind(self, source: Checkpoint) -> None:
        with self.run.paused():
            self._queued = None
            self.run.restore(source)
            self._load_hook_states(source)
            self._call(Hook.post_rewind, source)

    def _load_hook_states(self, source: Checkpoint) -> None:
        states = hook_states(source.meta)
        for hook in self.hooks:
            hook.load_state_dict(states.get(hook.key, {}))
