"""All of a run's configuration in one object."""

import dataclasses

from megatron.config.checkpoint import CheckpointConfig
from megatron.config.data import DataConfig
from megatron.config.guard import GuardConfig
from megatron.config.logging import LoggingConfig
from megatron.config.model import ModelConfig
from megatron.config.moe import MoEConfig, one_for_all_or_each
from megatron.config.optimizer import OptimizerConfig
from megatron.config.parallel import ParallelConfig
from megatron.config.training import TrainingConfig


@dataclasses.dataclass
class RunConfig:
    """One section for each package; field names are unique over all sections."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    moe: MoEConfig = dataclasses.field(default_factory=MoEConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    logging: LoggingConfig = dataclasses.field(default_factory=LoggingConfig)
    guard: GuardConfig = dataclasses.field(default_factory=GuardConfig)

    def expert_parallel_degree(self, layer: int) -> int:
        """Processes that share the experts of layer number ``layer`` (from 0); 1 for a dense layer."""
        if self.moe.experts_of_layer(layer) == 1:
            return 1
        return one_for_all_or_each(self.parallel.moe_expert_parallel_size, self.moe.place(layer))

    def expert_parallel_degrees(self) -> list[int]:
        """The degrees of all layers with experts, each once, ascending; none for a dense model."""
        layers = (n for n in range(self.model.num_layers) if self.moe.experts_of_layer(n) > 1)
        return sorted({self.expert_parallel_degree(layer) for layer in layers})

    def expert_counts(self, degree: int) -> list[int]:
        """The numbers of experts that layers of this degree have, each once, ascending."""
        layers = (n for n in range(self.model.num_layers) if self.expert_parallel_degree(n) == degree)
        return sorted({self.moe.experts_of_layer(layer) for layer in layers} - {1})
