"""The micro-batches of a run, for training and for validation."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from megatron.data.gpt_dataset import batches
from megatron.data.skipping import SkippingSamples
from megatron.data.spans import nth_outside
from megatron.training.run import Run


def training_batches(run: Run) -> Iterator[dict[str, Any]]:
    """This rank's micro-batches from the clock's position to the end of the run, without the skipped data."""
    skipped, total = run.skipped.spans, run.total_samples
    source = run.data.train.extended(nth_outside(skipped, total - 1) + 1)
    dataset = SkippingSamples(source, skipped, total)
    return micro_batches(run, dataset, run.clock.samples, run.config.data.num_workers)


def micro_batches(run: Run, dataset: Any, consumed_samples: int, num_workers: int) -> Iterator[dict[str, Any]]:
    """This rank's micro-batches of ``dataset`` after its first ``consumed_samples``."""
    config = dataclasses.replace(run.config, data=dataclasses.replace(run.config.data, num_workers=num_workers))
    rank, size = run.topology.data_parallel_rank, run.topology.data_parallel_size
    return iter(batches(dataset, config, rank, size, consumed_samples, run.tokenizer.eod))


def micro_batches_per_rank(run: Run, batch_size: int) -> int:
    """Micro-batches of each rank in a global batch of ``batch_size`` sequences."""
    return batch_size // (run.config.training.micro_batch_size * run.topology.data_parallel_size)
