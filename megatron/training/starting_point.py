"""Where a run starts: anew, from a checkpoint of its own, or from the weights of another run."""

import dataclasses
from typing import Any

from megatron.config import RunConfig
from megatron.config.run import from_dict
from megatron.data.data_state import DataState
from megatron.data.gpt_dataset import ResumedData
from megatron.data.spans import nth_outside
from megatron.data.tokenizer import Tokenizer
from megatron.engine.base import Engine
from megatron.parallel.initialize import Topology
from megatron.training.clock import Clock
from megatron.training.metadata import carried
from megatron.training.resume import check, check_base, clock_from, describe_base, padded_as_before, restore
from megatron.training.skipped_data import SkippedData
from megatron.training.start import Checkpoint, find_base, find_checkpoint


@dataclasses.dataclass(frozen=True)
class StartingPoint:
    """The state that a run starts with, on all ranks the same.

    Attributes:
        vocab_size: rows of the model's token table, padding included.
        resumed: the checkpoint of this run that it goes on from.
        base: the checkpoint whose weights ``--finetune`` starts from.
        carried: what the run's checkpoints keep of the metadata of ``resumed`` or ``base``.
        differences: from ``resumed`` or ``base`` that change how the run goes on.
    """

    vocab_size: int
    clock: Clock
    resumed: Checkpoint | None = None
    base: Checkpoint | None = None
    carried: dict[str, Any] = dataclasses.field(default_factory=dict)
    differences: list[str] = dataclasses.field(default_factory=list)

    @property
    def source(self) -> Checkpoint | None:
        """The checkpoint whose weights are loaded."""
        return self.resumed or self.base

    def skipped_data(self, config: RunConfig) -> SkippedData:
        """What the run leaves out of its training data."""
        return SkippedData.of(config, self.resumed and self.resumed.meta, self.clock.samples)

    def resumed_data(self, skipped: SkippedData) -> ResumedData | None:
        """What the checkpoint says of the training data; None for a run that has read none yet."""
        if self.resumed is None or self.clock.samples == 0:
            return None
        meta = self.resumed.meta
        state = DataState.load(meta["data"]) if "data" in meta else None
        return ResumedData(state, nth_outside(skipped.spans, self.clock.samples), from_dict(meta["config"]).data)

    def load(self, engine: Engine, config: RunConfig, topology: Topology) -> None:
        """Load the weights, and the optimizer state if it is to be kept, into a new engine."""
        if self.resumed is not None:
            restore(engine, self.resumed, config, topology)
        elif self.base is not None:
            restore(engine, self.base, config, topology, optimizer_state=config.checkpoint.finetune_load_optim)


def find_start(config: RunConfig, topology: Topology, tokenizer: Tokenizer) -> StartingPoint:
    """Find the checkpoint that the run starts from, if any, and compare it with the run.

    Raises:
        ConfigError, CheckpointError: ``--load`` or ``--save`` does not hold what the run needs, or the checkpoint there
            belongs to another model or tokenizer.
    """
    resumed = find_checkpoint(config, topology)
    if resumed is not None:
        vocab_size = padded_as_before(resumed.meta, topology.tensor_parallel_size)
        differences = check(resumed.meta, config, vocab_size, tokenizer)
        kept = carried(resumed.meta, tokenizer)
        return StartingPoint(
            vocab_size, clock_from(resumed.meta), resumed=resumed, carried=kept, differences=differences
        )
    clock = Clock(config.model.seq_length)
    if config.checkpoint.finetune:
        base = find_base(config, topology)
        vocab_size = padded_as_before(base.meta, topology.tensor_parallel_size)
        differences = check_base(base.meta, config, vocab_size, tokenizer)
        kept = carried(base.meta, tokenizer) | {"finetuned_from": describe_base(config, base)}
        return StartingPoint(vocab_size, clock, base=base, carried=kept, differences=differences)
    return StartingPoint(config.model.padded_vocab_size(tokenizer.vocab_size, topology.tensor_parallel_size), clock)
