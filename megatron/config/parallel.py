"""How a run is laid out over processes."""

import dataclasses

from megatron.config.fields import option


@dataclasses.dataclass
class ParallelConfig:
    """Data and expert parallelism. Every process is a data-parallel rank; expert parallelism lives inside them."""

    moe_expert_parallel_size: int = option(
        1, "Processes that share the experts of a layer between them; divides the number of experts and of processes."
    )
    distributed_backend: str | None = option(
        None, "Collectives library (default: nccl with GPUs, else gloo).", choices=("nccl", "gloo")
    )
    distributed_timeout_minutes: float = option(10.0, "A collective that takes longer ends the run.")
    deepspeed_config: str | None = option(
        None, "A DeepSpeed JSON file to merge with the flags; where the two disagree the run stops.",
        flag="--deepspeed_config", metavar="FILE",
    )  # fmt: skip
