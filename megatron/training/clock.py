"""The clock of a run: consumed samples, and everything that follows from them."""

import dataclasses

from megatron.config import RunConfig, TrainingConfig


def global_batch_size(config: TrainingConfig, consumed_samples: int) -> int:
    """Sequences of the update that starts after ``consumed_samples``.

    With a ramp-up START INCREMENT SAMPLES the batch grows from START to the full size in steps of INCREMENT, each held
    for the same number of samples (as in Megatron-LM).
    """
    full = config.global_batch_size
    if config.rampup_batch_size is None:
        return full
    start, increment, samples = config.rampup_batch_size
    if consumed_samples >= samples or start >= full:
        return full
    stages = (full - start) // increment
    return min(start + increment * (consumed_samples * stages // samples), full)


@dataclasses.dataclass(frozen=True)
class Step:
    """One optimizer update: its number, from 1, and the samples that the run has consumed before and after it."""

    number: int
    start: int
    end: int

    def crosses(self, interval: int, batch_size: int) -> bool:
        """Whether the update passes a multiple of ``interval`` full batches of ``batch_size`` sequences; never for 0.

        Intervals are given in updates but measured in samples, so that a run with a batch ramp-up validates and saves
        at the same tokens as one without.
        """
        return interval > 0 and self.start // (interval * batch_size) != self.end // (interval * batch_size)


@dataclasses.dataclass
class Clock:
    """How far a run has come. ``samples`` decides; the rest is counted for people and for the optimizer."""

    seq_length: int
    samples: int = 0
    steps: int = 0  # updates, skipped ones included
    skipped: int = 0  # updates skipped for a non-finite gradient

    @property
    def tokens(self) -> int:
        """Consumed tokens."""
        return self.samples * self.seq_length

    def next_step(self, batch_size: int) -> Step:
        """The update that comes next, over ``batch_size`` sequences."""
        return Step(self.steps + 1, self.samples, self.samples + batch_size)

    def advance(self, batch_size: int) -> Step:
        """Count an update over ``batch_size`` sequences."""
        step = self.next_step(batch_size)
        self.steps, self.samples = step.number, step.end
        return step

    def state(self) -> dict[str, int]:
        """JSON-able state."""
        return dataclasses.asdict(self)


def total_samples(config: TrainingConfig, seq_length: int, consumed_samples: int = 0) -> int:
    """Samples of the whole run: as many whole batches as it takes to reach ``--train-tokens``.

    A run that goes on from ``consumed_samples`` counts its batches from there: their size may have changed.
    """
    samples = consumed_samples
    wanted = -(-(config.train_tokens or 0) // seq_length)
    ramp_end = config.rampup_batch_size[2] if config.rampup_batch_size else 0
    while samples < min(ramp_end, wanted):
        samples += global_batch_size(config, samples)
    if samples < wanted:
        samples += -(-(wanted - samples) // config.global_batch_size) * config.global_batch_size
    return samples


def last_samples(config: RunConfig, consumed_samples: int = 0) -> int:
    """Samples after which training ends: those of the whole run, or fewer by ``--exit-tokens``."""
    seq, limit = config.model.seq_length, config.checkpoint.exit_tokens
    total = total_samples(config.training, seq, consumed_samples)
    return total if limit is None else min(total, -(-limit // seq))
