"""Spikes of the loss: when there is one, what data it came with, and how the run goes back.

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

from megatron.checkpoint.folder import checkpoint_status, complete_checkpoints, read_manifest
from megatron.config import GuardConfig, RunConfig
from megatron.config.spans import Span, merge, nth_outside, parse_span

_LEAST = 1e-3  # of the median, for the deviation
_OUTLIER_SIGMAS, _FEW, _LEAST_OF_FEW = 10.0, 8, 0.05


@dataclasses.dataclass(frozen=True)
class Update:
    """One update that was done: its number from 1, and the samples that the run had consumed before and after it."""

    number: int
    before: int
    after: int


@dataclasses.dataclass(frozen=True)
class Spike:
    """``first`` to ``last`` are the updates whose data is to be left out."""

    first: Update
    last: Update
    loss: float
    median: float
    limit: float


class SpikeWatch:
    """Takes the loss of each update and says when they are a spike."""

    def __init__(self, config: GuardConfig) -> None:
        self._sigmas, self._updates = config.spike_sigmas or math.inf, config.spike_updates
        self._losses: deque[float] = deque(maxlen=config.spike_window)
        self._usual: deque[Update] = deque(maxlen=config.spike_updates)
        self._high: list[tuple[Update, float]] = []

    def add(self, update: Update, loss: float) -> Spike | None:
        """Take in the next update."""
        limit, median = math.inf, math.nan
        if len(self._losses) == self._losses.maxlen:
            median, deviation = self._usual_losses(_LEAST)
            limit = median + self._sigmas * deviation
        if math.isfinite(limit) and not loss <= limit:
            self._high.append((update, loss))
            if len(self._high) < self._updates:
                return None
            first = self._usual[0] if self._usual else self._high[0][0]
            spike = Spike(first, update, max(loss for _, loss in self._high), median, limit)
            self._accept()
            return spike
        self._accept()
        self._take(update, loss)
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
        for update, loss in self._high:
            self._take(update, loss)
        self._high.clear()

    def _take(self, update: Update, loss: float) -> None:
        self._usual.append(update)
        if math.isfinite(loss):
            self._losses.append(loss)

    def state(self) -> dict[str, Any]:
        """JSON-able state."""
        return {
            "losses": list(self._losses),
            "usual": [dataclasses.astuple(update) for update in self._usual],
            "high": [[dataclasses.astuple(u), loss if math.isfinite(loss) else None] for u, loss in self._high],
        }

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Take over what :meth:`state` gave; None: as if new."""
        state = state or {"losses": [], "usual": [], "high": []}
        self._losses = deque(state["losses"], maxlen=self._losses.maxlen)
        self._usual = deque((Update(*update) for update in state["usual"]), maxlen=self._usual.maxlen)
        self._high = [(Update(*update), math.nan if loss is None else loss) for update, loss in state["high"]]


@dataclasses.dataclass
class Detours:
    """What a run leaves out of its data, and how often it went back. Part of every checkpoint."""

    skipped: list[Span] = dataclasses.field(default_factory=list)  # samples of the training data, merged
    restarts: int = 0

    @classmethod
    def of(cls, config: RunConfig, meta: dict[str, Any] | None, consumed_samples: int) -> "Detours":
        """Those of a run that begins, or goes on from a checkpoint with ``meta``.

        Raises:
            ValueError: ``--skip-samples`` names, anew, data that the run has read or passed already.
        """
        saved = (meta or {}).get("detours", {"skipped": [], "restarts": 0})
        before = [(first, end) for first, end in saved["skipped"]]
        read_up_to = nth_outside(before, consumed_samples)
        for word in config.data.skip_samples:
            span = parse_span(word)
            if merge([*before, span]) != before and span[0] < read_up_to:
                raise ValueError(
                    f"--skip-samples {word}: the run has read its data up to sample {read_up_to}; give a span that "
                    "begins there or later, or go on from an earlier checkpoint (--load DIR/step_N and another --save)"
                )
        return cls(merge([*before, *map(parse_span, config.data.skip_samples)]), saved["restarts"])

    def state(self) -> dict[str, Any]:
        """JSON-able state."""
        return {"skipped": [list(span) for span in self.skipped], "restarts": self.restarts}

    def span_of(self, spike: Spike) -> Span:
        """The samples of the training data from the first to the last update of a spike."""
        return nth_outside(self.skipped, spike.first.before), nth_outside(self.skipped, spike.last.after - 1) + 1


def checkpoint_before(folder: Path, update: Update) -> Path | None:
    """The good checkpoint to go back to, to do ``update`` anew.

    Among the checkpoints of earlier detours, which lie there too, those saved last are of the run as it is: when a run
    goes back, it saves where it begins anew.
    """
    for path in complete_checkpoints(folder):
        if read_manifest(path).step < update.number and checkpoint_status(path).good:
            return path
    return None
