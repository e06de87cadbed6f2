"""How a run is laid out over processes."""

import dataclasses
import datetime
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.config.errors import around, divisors, multiples, remainder
from megatron.config.moe import moe_layers
from megatron.config.option import option, rule

if TYPE_CHECKING:
    from megatron.config.run import RunConfig


@dataclasses.dataclass
class ParallelConfig:
    """Tensor, pipeline, data and expert parallelism.

    Processes are numbered tensor-parallel rank first, then data-parallel rank, then pipeline stage. Expert parallelism
    lives inside data parallelism.
    """

    tensor_model_parallel_size: int = option(
        1, "Processes that share every layer's matrices between them; divides the attention heads.", min=1,
        resumable=True,
    )  # fmt: skip
    sequence_parallel: bool = option(
        False, "Split layer norms and dropout along the sequence over the tensor-parallel processes.", resumable=True
    )
    pipeline_model_parallel_size: int = option(
        1, "Pipeline stages: groups of processes with some of the layers each.", min=1, resumable=True
    )
    pipeline_layer_split: str | None = option(
        None, "Transformer layers of each pipeline stage, such as 6,6,6,6 (default: placed by cost).",
        metavar="N,N,...", resumable=True,
    )  # fmt: skip
    moe_expert_parallel_size: tuple[int, ...] = option(
        (1,), "Processes that share the experts of an MoE layer: one number for all, or one per MoE layer. Divides the "
        "layer's experts and the data-parallel replicas.", min=1, nargs="+", resumable=True,
    )  # fmt: skip
    enable_expert_tensor_parallelism: bool = option(
        False, "Share the experts' matrices over the tensor-parallel processes too, instead of splitting their tokens.",
        resumable=True,
    )  # fmt: skip
    moe_hierarchical_all_to_all: bool = option(
        False, "Tokens cross nodes in fewer, larger messages: first an exchange inside each node, then one across "
        "them.", resumable=True,
    )  # fmt: skip
    moe_overlap_chunks: int = option(
        1, "Split expert buffers into this many chunks to overlap all-to-all with compute.", min=1, resumable=True
    )
    distributed_backend: str | None = option(
        None, "Collectives library (default: nccl with GPUs, else gloo).", choices=("nccl", "gloo"), resumable=True
    )
    distributed_timeout_minutes: float = option(
        10.0, "A collective that takes longer ends the run.", above=0, resumable=True
    )
    deepspeed_config: str | None = option(
        None, "A DeepSpeed JSON file to merge with the flags; where the two disagree the run stops.",
        flag="--deepspeed_config", metavar="FILE", resumable=True,
    )  # fmt: skip

    @property
    def layers_of_stages(self) -> tuple[int, ...] | None:
        """``--pipeline-layer-split``, read; None if it is not given.

        Raises:
            ValueError: it is not positive whole numbers with commas between them.
        """
        if self.pipeline_layer_split is None:
            return None
        words = [word.strip() for word in self.pipeline_layer_split.split(",")]
        if not all(word.isascii() and word.isdigit() and int(word) > 0 for word in words):
            raise ValueError("must be positive whole numbers with commas between them")
        return tuple(map(int, words))

    @property
    def timeout(self) -> datetime.timedelta:
        """``--distributed-timeout-minutes``."""
        return datetime.timedelta(minutes=self.distributed_timeout_minutes)

    def data_parallel_size(self, world_size: int) -> int:
        """Copies of the model that ``world_size`` processes train, each on micro-batches of its own."""
        return world_size // (self.tensor_model_parallel_size * self.pipeline_model_parallel_size)

    def count_replicas(self, world_size: int) -> tuple[int, str]:
        """The number of data-parallel replicas, and what to call them in a message."""
        replicas = max(self.data_parallel_size(world_size), 1)
        return replicas, "processes" if replicas == world_size else "data-parallel replicas"


@rule("tensor_model_parallel_size", "pipeline_model_parallel_size", "num_attention_heads", "num_layers")
def model_parallel(config: "RunConfig", world_size: int) -> Iterator[str]:
    """Every copy of the model has all of its processes."""
    tensor, stages = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    if world_size % (tensor * stages) == 0:
        return
    start = " or ".join(str(x) for x in multiples(world_size, tensor * stages))
    if world_size % stages == 0:
        sizes = divisors(math.gcd(config.model.num_attention_heads, world_size // stages))
        fix = f"--tensor-model-parallel-size {around(tensor, sizes)}"
    else:
        rest = world_size // tensor if world_size % tensor == 0 else world_size
        sizes = [x for x in divisors(rest) if x <= config.model.num_layers]
        fix = f"--pipeline-model-parallel-size {around(stages, sizes)}"
        fix += "" if world_size % tensor == 0 else " and --tensor-model-parallel-size 1"
    yield (
        f"--tensor-model-parallel-size {tensor} x --pipeline-model-parallel-size {stages} = {tensor * stages} must"
        f" divide the number of processes, {world_size} ({remainder(world_size, tensor * stages)}); start {start}"
        f" processes, or use {fix}"
    )


@rule("tensor_model_parallel_size", "num_attention_heads", "hidden_size", "ffn_hidden_size")
def tensor_parallel(config: "RunConfig", world_size: int) -> Iterator[str]:
    """Tensor-parallel processes share heads and feed-forward layers evenly."""
    size = config.parallel.tensor_model_parallel_size
    for flag, number in (
        ("--num-attention-heads", config.model.num_attention_heads),
        ("--ffn-hidden-size", config.model.ffn_size),
    ):
        if number % size:
            yield (
                f"--tensor-model-parallel-size {size} must divide {flag} {number} ({remainder(number, size)}); use"
                f" {around(size, divisors(number))}"
            )


@rule("tensor_model_parallel_size", "sequence_parallel", "seq_length")
def sequence_parallel(config: "RunConfig", world_size: int) -> Iterator[str]:
    """Tensor-parallel processes share the sequence evenly."""
    size, length = config.parallel.tensor_model_parallel_size, config.model.seq_length
    if not config.parallel.sequence_parallel:
        return
    if size == 1:
        yield (
            "--sequence-parallel requires tensor-parallel processes to split the sequence over; use"
            " --tensor-model-parallel-size 2 or more, or drop it"
        )
    elif length % size:
        yield (
            f"--sequence-parallel: --tensor-model-parallel-size {size} must divide --seq-length {length}"
            f" ({remainder(length, size)}); use --seq-length {around(length, multiples(length, size))}"
        )


@rule("num_layers", "pipeline_model_parallel_size", "pipeline_layer_split")
def pipeline(config: "RunConfig", world_size: int) -> Iterator[str]:
    """Every pipeline stage has layers, together all of them."""
    stages, layers = config.parallel.pipeline_model_parallel_size, config.model.num_layers
    if stages > layers:
        yield (
            f"--pipeline-model-parallel-size {stages} must not exceed --num-layers {layers}: every stage needs a layer;"
            f" use {layers} or fewer"
        )
    flag, even = f"--pipeline-layer-split {config.parallel.pipeline_layer_split}", _even(layers, stages)
    try:
        numbers = config.parallel.layers_of_stages
    except ValueError as error:
        yield f"{flag} {error}; use {even}, or leave it out"
        return
    if numbers is None:
        return
    if len(numbers) != stages:
        yield (
            f"{flag} has {len(numbers)} numbers, and --pipeline-model-parallel-size is {stages}; give one number for"
            f" each stage, such as {even}, or leave it out"
        )
    elif sum(numbers) != layers:
        sum_ = " + ".join(map(str, numbers))
        yield f"{flag}: {sum_} = {sum(numbers)} must be --num-layers {layers}; use {even}, or leave it out"


def _even(layers: int, stages: int) -> str:
    """As even a split as there is."""
    return ",".join(str(layers // stages + (stage < layers % stages)) for stage in range(stages))


@rule(
    *("num_layers", "num_experts", "expert_interval", "moe_expert_parallel_size"),
    *("tensor_model_parallel_size", "pipeline_model_parallel_size"),
)
def expert_parallel(config: "RunConfig", world_size: int) -> Iterator[str]:
    """Expert-parallel degrees divide the experts of their layers and the data-parallel replicas."""
    if any(moe_layers(config, world_size)):
        return
    replicas, what = config.parallel.count_replicas(world_size)
    sizes = config.parallel.moe_expert_parallel_size
    given = f"--moe-expert-parallel-size {' '.join(map(str, sizes))}"
    for size in config.expert_parallel_degrees():
        flag = given if len(sizes) == 1 else f"{given}: {size}"
        counts = config.expert_counts(size)
        fix = f"use {around(size, divisors(math.gcd(replicas, *counts)))}"
        if size > replicas:
            needed = size * (world_size // replicas)
            yield f"{flag} must not exceed the number of {what}, {replicas}; {fix}, or start {needed} processes"
        elif replicas % size:
            yield f"{flag} must divide the number of {what}, {replicas} ({remainder(replicas, size)}); {fix}"
        for count in counts:
            if count % size:
                yield f"{flag} must divide the {count} experts of a layer ({remainder(count, size)}); {fix}"


@rule(
    *("tensor_model_parallel_size", "enable_expert_tensor_parallelism", "num_experts", "moe_expert_parallel_size"),
    *("moe_hierarchical_all_to_all", "moe_overlap_chunks", "moe_token_dropping"),
)
def all_to_all(config: "RunConfig", world_size: int) -> Iterator[str]:
    """Options of the experts' all-to-all have an effect."""
    parallel, moe = config.parallel, config.moe
    if not moe.enabled:
        return
    if parallel.enable_expert_tensor_parallelism and parallel.tensor_model_parallel_size == 1:
        yield (
            "--enable-expert-tensor-parallelism requires tensor-parallel processes to share experts over; use"
            " --tensor-model-parallel-size 2 or more, or drop it"
        )
    chunks = f"--moe-overlap-chunks {parallel.moe_overlap_chunks}"
    for flag, given in (
        ("--moe-hierarchical-all-to-all", parallel.moe_hierarchical_all_to_all),
        (chunks, parallel.moe_overlap_chunks > 1),
    ):
        if given and max(parallel.moe_expert_parallel_size) == 1:
            yield (
                f"{flag} requires processes that exchange tokens; use --moe-expert-parallel-size 2 or more, or drop it"
            )
    if parallel.moe_overlap_chunks > 1 and not moe.moe_token_dropping:
        yield (
            f"{chunks} requires buffers of fixed capacity to cut, and --disable-moe-token-dropping has none; use"
            " --moe-overlap-chunks 1, or let tokens be dropped"
        )


@rule("device", "distributed_backend")
def backend(config: "RunConfig", world_size: int) -> Iterator[str]:
    """NCCL has GPUs."""
    if config.training.device == "cpu" and config.parallel.distributed_backend == "nccl":
        yield "--distributed-backend nccl requires GPUs, and --device is cpu; use --distributed-backend gloo"


@rule("deepspeed_config", files=True)
def deepspeed_file(config: "RunConfig", world_size: int) -> Iterator[str]:
    """The file of ``--deepspeed_config`` is there."""
    file = config.parallel.deepspeed_config
    if file is not None and not Path(file).is_file():
        yield f"--deepspeed_config {file}: no such file; give a DeepSpeed JSON file or drop the flag"
