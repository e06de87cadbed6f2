"""Everything that a run is made of."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from megatron.config import RunConfig
from megatron.data.gpt_dataset import Datasets
from megatron.data.tokenizer import Tokenizer
from megatron.engine.base import Engine
from megatron.parallel.initialize import Topology
from megatron.parallel.watchdog import Watchdog
from megatron.training.clock import Clock, last_samples, total_samples
from megatron.training.hooks.hook import Hook
from megatron.training.metrics import PausableTimer
from megatron.training.report import Report
from megatron.training.resume import clock_from, restore
from megatron.training.signals import StopRequest
from megatron.training.skipped_data import SkippedData
from megatron.training.start import Checkpoint
from megatron.training.starting_point import StartingPoint


@dataclasses.dataclass
class Run:
    """The parts of a run and how far it has come, on one rank.

    Attributes:
        start: where it started: anew, from a checkpoint of its own, or from the weights of another run.
        skipped: what is left out of the training data.
        hooks: what happens beside the updates, in order.
        clock: how far it has come.
        total_samples: of the whole run.
        end_samples: where this start of the run ends; less than ``total_samples`` with ``--exit-tokens``.
        timer: seconds of training; it does not advance while the run is paused.
    """

    config: RunConfig
    topology: Topology
    tokenizer: Tokenizer
    start: StartingPoint
    skipped: SkippedData
    data: Datasets
    engine: Engine
    report: Report
    stop: StopRequest
    watchdog: Watchdog
    hooks: list[Hook] = dataclasses.field(default_factory=list)
    timer: PausableTimer = dataclasses.field(default_factory=PausableTimer)

    def __post_init__(self) -> None:
        self._set_clock(self.start.clock)

    def _set_clock(self, clock: Clock) -> None:
        self.clock = clock
        self.total_samples = total_samples(self.config.training, self.config.model.seq_length, clock.samples)
        self.end_samples = last_samples(self.config, clock.samples)

    @property
    def vocab_size(self) -> int:
        """Rows of the model's token table, padding included."""
        return self.start.vocab_size

    @property
    def train_tokens(self) -> int:
        """Tokens of the whole run."""
        return self.total_samples * self.config.model.seq_length

    @property
    def done(self) -> bool:
        """Whether this start of the run has trained on all its samples."""
        return self.clock.samples >= self.end_samples

    def stop_reason(self) -> str | None:
        """Why training ends here, or None; the same answer on every rank, which all call it at the same point."""
        if self.clock.samples >= self.total_samples:
            return "all tokens are trained on"
        if self.done:
            return f"--exit-tokens {self.config.checkpoint.exit_tokens}"
        return self.stop.agreed()

    def restore(self, source: Checkpoint) -> None:
        """Go back to an earlier checkpoint of this run: its weights, optimizer state and clock."""
        restore(self.engine, source, self.config, self.topology)
        self._set_clock(clock_from(source.meta))

    def has_blend_of(self, source: Checkpoint) -> bool:
        """Whether a checkpoint of this run is from after the last change of its blend of training data."""
        return source.meta.get("data", {}).get("position", 0) == self.data.state.position

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside may take its time: neither the watchdog nor the reported speed counts it."""
        with self.watchdog.paused(), self.timer.paused():
            yield

    def log(self, kind: str, **values: Any) -> None:
        """Write a record of ``kind`` with ``values`` to the console, metrics.jsonl and so on; any rank may call it."""
        step, tokens = self.clock.steps, self.clock.tokens
        self.report.write(kind, step=step, tokens=tokens, train_tokens=self.train_tokens, **values)

    def close(self) -> None:
        """End the watchdog and the report."""
        self.watchdog.close()
        self.report.close()
