"""Loss spikes: when there is one, what data it came with, and how the run goes back.

**The rule.** Let m and d be the median and the deviation of the losses of the last ``--spike-window`` updates that were
not high; d is 1.4826 times the median distance from m, which is the standard deviation of what is normally distributed,
and at least 0.001 m. A loss is high if it is above m + ``--spike-sigmas`` d or not finite. ``--spike-updates`` high
losses in a row are a spike. Fewer are none, and then count like others. Until the window is full nothing is judged.

**Outliers.** With or without ``--spike-sigmas``, a loss above m + 10 d is an outlier; the window need not be full.
With fewer than 8 losses in it d is at least 0.05 m; with none, no finite loss is an outlier.

**What is left out.** The data of the high updates, and of as many updates before the first of them: their losses were
still as usual, but it may have been they that did the harm.

**Where the run goes on.** At the newest checkpoint from before that data. Samples and tokens count on from there. What
is left out was not trained on, and schedule, ``--train-tokens`` and logs know nothing of it; the place in the data is
another count (:class:`megatron.data.skipping.SkippingSamples`).
"""

import dataclasses
import math
import statistics
from collections import deque
from pathlib import Path
from typing import Any

from megatron.checkpoint import read_meta
from megatron.checkpoint.folder import checkpoint_status, complete_checkpoints, read_manifest
from megatron.config import GuardConfig
from megatron.training.clock import Step
from megatron.training.hooks.checkpointer import Checkpointer
from megatron.training.hooks.hook import Hook, Outcome
from megatron.training.resume import clock_from
from megatron.training.start import Checkpoint, on_first_rank

_LEAST = 1e-3  # of the median, for the deviation
_OUTLIER_SIGMAS, _FEW, _LEAST_OF_FEW = 10.0, 8, 0.05


class SpikeRestarts(Hook):
    """Marks the losses that are outliers, and takes the run back when there is a spike (``--spike-sigmas``)."""

    name = "spikes"

    def __init__(self, config: GuardConfig, checkpointer: Checkpointer) -> None:
        self._restarts, self._updates = config.spike_restarts, config.spike_updates
        self._checkpointer = checkpointer
        self._detector = SpikeDetector(config)
        self._spike: Spike | None = None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the losses before."""
        self._detector.load_state(state)

    def state_dict(self) -> dict[str, Any]:
        """The losses that new ones are compared with."""
        return self._detector.state()

    def pre_train(self) -> None:
        """Losses on other data than the run goes on with are no measure."""
        resumed = self.run.start.resumed
        if resumed is not None and not self.run.has_blend_of(resumed):
            self._detector.load_state({})

    def on_outcome(self, outcome: Outcome) -> None:
        """Compare the loss with those before."""
        outcome.outlier = self._detector.is_outlier(outcome.loss)
        if not outcome.result.scale_fell:
            self._spike = self._detector.add(outcome.step, outcome.loss) or self._spike

    def rewind_to(self) -> Checkpoint | None:
        """The checkpoint to go back to for a new spike, whose data is left out from now on; None if there is none."""
        if self._spike is None:
            return None
        spike, self._spike = self._spike, None
        with self.run.paused():
            self._checkpointer.wait()
            source, why_not = self._checkpoint_before(spike)
            self._log(spike, source, why_not)
            if source is not None:
                self.run.skipped.restart_without(self.run.skipped.span_of(spike.first, spike.last))
        return source

    def _checkpoint_before(self, spike: "Spike") -> tuple[Checkpoint | None, str]:
        """The checkpoint to go back to; or None, and why."""
        run = self.run
        if run.skipped.restarts >= self._restarts:
            return None, f"--spike-restarts {self._restarts} are used up"

        def find() -> Checkpoint | None:
            path = checkpoint_before(Path(run.config.checkpoint.save or "."), spike.first)
            return None if path is None else Checkpoint(path, read_meta(path))

        source = on_first_rank(find, run.topology)
        if source is None:
            return None, f"there is no checkpoint from before update {spike.first.number}"
        if not run.has_blend_of(source):
            return None, f"the blend has changed since {source.path.name}"
        return source, ""

    def _log(self, spike: "Spike", source: Checkpoint | None, why_not: str) -> None:
        run, seq_length = self.run, self.run.config.model.seq_length
        first, end = run.skipped.span_of(spike.first, spike.last)
        reason = (
            f"{self._updates} losses in a row above {spike.limit:.4g}, up to {spike.loss:.4g}; the median was "
            f"{spike.median:.4g}"
        )
        tokens = None if source is None else clock_from(source.meta).tokens
        if source is None:
            reason += f". Training goes on: {why_not}"
        else:
            reason += (
                f". Going back to {source.path.name}, {tokens} tokens, without samples {first}-{end} of the data "
                f"({(end - first) * seq_length} tokens); restart {run.skipped.restarts + 1} of {self._restarts}"
            )
        run.log("spike", reason=reason, resumed_at_tokens=tokens, samples=[first, end])


@dataclasses.dataclass(frozen=True)
class Spike:
    """``first`` to ``last`` are the updates whose data is to be left out."""

    first: Step
    last: Step
    loss: float
    median: float
    limit: float


class SpikeDetector:
    """Takes the loss of each update and says when they are a spike."""

    def __init__(self, config: GuardConfig) -> None:
        self._sigmas, self._updates = config.spike_sigmas or math.inf, config.spike_updates
        self._losses: deque[float] = deque(maxlen=config.spike_window)
        self._usual: deque[Step] = deque(maxlen=config.spike_updates)
        self._high: list[tuple[Step, float]] = []

    def add(self, step: Step, loss: float) -> Spike | None:
        """Take in the next update."""
        limit, median = math.inf, math.nan
        if len(self._losses) == self._losses.maxlen:
            median, deviation = self._usual_losses(_LEAST)
            limit = median + self._sigmas * deviation
        if math.isfinite(limit) and not loss <= limit:
            self._high.append((step, loss))
            if len(self._high) < self._updates:
                return None
            first = self._usual[0] if self._usual else self._high[0][0]
            spike = Spike(first, step, max(loss for _, loss in self._high), median, limit)
            self._accept()
            return spike
        self._accept()
        self._take(step, loss)
        return None

    def is_outlier(self, loss: float) -> bool:
        """Whether the loss of the next update, not yet taken in, is unlike the ones before, or is not finite."""
        if not math.isfinite(loss):
            return True
        if not self._losses:
            return False
        median, deviation = self._usual_losses(_LEAST if len(self._losses) >= _FEW else _LEAST_OF_FEW)
        return loss > median + _OUTLIER_SIGMAS * deviation

    def _usual_losses(self, least: float) -> tuple[float, float]:
        """Median and deviation, which is at least ``least`` times the median."""
        median = statistics.median(self._losses)
        away = statistics.median(abs(loss - median) for loss in self._losses)
        return median, max(1.4826 * away, least * abs(median))

    def _accept(self) -> None:
        """What was high counts like others."""
        for step, loss in self._high:
            self._take(step, loss)
        self._high.clear()

    def _take(self, step: Step, loss: float) -> None:
        self._usual.append(step)
        if math.isfinite(loss):
            self._losses.append(loss)

    def state(self) -> dict[str, Any]:
        """JSON-able state."""
        return {
            "losses": list(self._losses),
            "usual": [dataclasses.astuple(step) for step in self._usual],
            "high": [[dataclasses.astuple(step), loss if math.isfinite(loss) else None] for step, loss in self._high],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` gave; from an empty one on as if new."""
        state = state or {"losses": [], "usual": [], "high": []}
        self._losses = deque(state["losses"], maxlen=self._losses.maxlen)
        self._usual = deque((Step(*step) for step in state["usual"]), maxlen=self._usual.maxlen)
        self._high = [(Step(*step), math.nan if loss is None else loss) for step, loss in state["high"]]


def checkpoint_before(folder: Path, step: Step) -> Path | None:
    """The good checkpoint to go back to, to do ``step`` anew.

    A run that goes back saves where it begins anew. So of the checkpoints in the folder, some of which may be of what
    it went back for, those saved last are of the run as it is.
    """
    for path in complete_checkpoints(folder):
        if read_manifest(path).step < step.number and checkpoint_status(path).good:
            return path
    return None
