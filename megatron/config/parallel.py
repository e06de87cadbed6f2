"""How a run is laid out over processes."""

import dataclasses
import datetime

from megatron.config.fields import option


@dataclasses.dataclass
class ParallelConfig:
    """Tensor, pipeline, data and expert parallelism.

    Processes are numbered tensor-parallel rank first, then data-parallel rank, then pipeline stage. Expert parallelism
    lives inside data parallelism.
    """

    tensor_model_parallel_size: int = option(
        1, "Processes that share every layer's matrices between them; divides the attention heads."
    )
    sequence_parallel: bool = option(
        False, "Split layer norms and dropout along the sequence over the tensor-parallel processes."
    )
    pipeline_model_parallel_size: int = option(1, "Pipeline stages: groups of processes with some of the layers each.")
    pipeline_layer_split: str | None = option(
        None, "Transformer layers of each pipeline stage, such as 6,6,6,6 (default: placed by cost).", metavar="N,N,..."
    )
    moe_expert_parallel_size: tuple[int, ...] = option(
        (1,), "Processes that share the experts of an MoE layer: one number for all, or one per MoE layer. Divides the "
        "layer's experts and the data-parallel replicas.", nargs="+",
    )  # fmt: skip
    enable_expert_tensor_parallelism: bool = option(
        False, "Share the experts' matrices over the tensor-parallel processes too, instead of splitting their tokens."
    )
    moe_hierarchical_all_to_all: bool = option(
        False, "Tokens cross nodes in fewer, larger messages: first an exchange inside each node, then one across them."
    )
    moe_overlap_chunks: int = option(
        1, "Chunks in which experts' buffers travel, so that some travel while others are computed."
    )
    distributed_backend: str | None = option(
        None, "Collectives library (default: nccl with GPUs, else gloo).", choices=("nccl", "gloo")
    )
    distributed_timeout_minutes: float = option(10.0, "A collective that takes longer ends the run.")
    deepspeed_config: str | None = option(
        None, "A DeepSpeed JSON file to merge with the flags; where the two disagree the run stops.",
        flag="--deepspeed_config", metavar="FILE",
    )  # fmt: skip

    @property
    def timeout(self) -> datetime.timedelta:
        """``--distributed-timeout-minutes``."""
        return datetime.timedelta(minutes=self.distributed_timeout_minutes)

    def data_parallel_size(self, world_size: int) -> int:
        """Copies of the model that ``world_size`` processes train, each on micro-batches of its own."""
        return world_size // (self.tensor_model_parallel_size * self.pipeline_model_parallel_size)
