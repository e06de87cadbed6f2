"""How long to train, in what batches, and when to look."""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron.config.errors import around, divisors, multiples, remainder
from megatron.config.option import option, parse_count, rule
from megatron.config.presets import RECIPES

if TYPE_CHECKING:
    from megatron.config.run import RunConfig


@dataclasses.dataclass
class TrainingConfig:
    """The clock of a run is consumed tokens; a step is one optimizer update."""

    recipe: str = option(
        "published", "Values of options that balance experts and keep training stable: as published, as recommended "
        "here, or auto: as recommended for experts in a model that was not published.", choices=(*RECIPES, "auto"),
        resumable=True,
    )  # fmt: skip
    train_tokens: int | None = option(None, "Tokens to train on, such as 300B.", min=1, parse=parse_count)
    micro_batch_size: int = option(4, "Sequences of one forward pass on one process.", min=1)
    global_batch_size: int = option(256, "Sequences of one optimizer update over all processes.", min=1)
    rampup_batch_size: tuple[int, ...] | None = option(
        None, "START INCREMENT SAMPLES: the global batch grows from START by INCREMENT evenly over SAMPLES sequences.",
        min=1, nargs="+", metavar="N", parse=parse_count,
    )  # fmt: skip
    eval_interval: int = option(
        100, "Validate every this many updates of the full global batch (counted in tokens); 0 never.", min=0,
        resumable=True,
    )  # fmt: skip
    eval_iters: int = option(
        10, "Global batches to read of each validation and test set; always the same ones.", min=1, resumable=True
    )
    checkpoint_activations: bool = option(
        False, "Recompute each layer in the backward pass to save memory.", resumable=True
    )
    compile: bool = option(
        True, "Do not let torch.compile fuse the layers on GPUs.", flag="--no-compile", resumable=True
    )
    cuda_graphs: bool = option(
        False, "bf16 on GPUs, without tensor and pipeline parallelism: launch a micro-batch as one CUDA graph. For "
        "what the host launches more slowly than the GPU computes: small micro-batches, recomputation.",
        resumable=True,
    )  # fmt: skip
    deterministic: bool = option(
        False, "Repeat bit for bit on the same machine and layout; slower, for attention's backward pass most of all.",
        resumable=True,
    )  # fmt: skip
    max_skipped_updates: int = option(
        10, "Updates in a row with a non-finite loss or gradient (they are skipped) after which the run stops.", min=1,
        resumable=True,
    )  # fmt: skip
    check_replicas: int = option(
        0, "Every this many updates, compare the parameters that processes must hold alike and stop if any differ; 0"
        " never.", min=0, resumable=True,
    )  # fmt: skip
    seed: int = option(1234, "Seed of initial weights, data order, dropout and routing.", min=0, max=2**32 - 1)
    device: str | None = option(
        None, "cuda or cpu (default: cuda where there is a GPU).", choices=("cuda", "cpu"), resumable=True
    )

    @property
    def eval_samples(self) -> int:
        """Sequences that are read of each validation and test set."""
        return self.eval_iters * self.global_batch_size


@rule("micro_batch_size", "global_batch_size", "tensor_model_parallel_size", "pipeline_model_parallel_size")
def batch(config: "RunConfig", world_size: int) -> Iterator[str]:
    """The global batch is whole micro-batches on every replica."""
    micro, batch = config.training.micro_batch_size, config.training.global_batch_size
    replicas, what = config.parallel.count_replicas(world_size)
    step = micro * replicas
    if batch % step:
        fix = f"--global-batch-size {around(batch, multiples(batch, step))}"
        if batch % replicas == 0:
            fix += f", or --micro-batch-size {around(micro, divisors(batch // replicas))}"
        yield (
            f"--global-batch-size {batch} must be a multiple of --micro-batch-size {micro} x {replicas} {what}"
            f" = {step} ({remainder(batch, step)}); use {fix}"
        )


@rule(
    *("micro_batch_size", "global_batch_size", "rampup_batch_size"),
    *("tensor_model_parallel_size", "pipeline_model_parallel_size"),
)
def rampup(config: "RunConfig", world_size: int) -> Iterator[str]:
    """So is every step of a ramp-up, and its steps reach the global batch."""
    ramp, batch = config.training.rampup_batch_size, config.training.global_batch_size
    replicas, what = config.parallel.count_replicas(world_size)
    step = config.training.micro_batch_size * replicas
    if ramp is None:
        return
    flag = f"--rampup-batch-size {' '.join(map(str, ramp))}"
    if len(ramp) != 3:
        yield f"{flag} has {len(ramp)} numbers; expected 3, START INCREMENT SAMPLES, such as {step} {step} 100000"
        return
    start, increment, samples = ramp
    fix = f"use {_nearest_ramp(start, increment, samples, batch, step)}"
    unit = f"--micro-batch-size {config.training.micro_batch_size} x {replicas} {what} = {step}"
    uneven = [(name, value) for name, value in (("START", start), ("INCREMENT", increment)) if value % step]
    for name, value in uneven:
        yield f"{flag}: {name} {value} must be a multiple of {unit} ({remainder(value, step)}); {fix}"
    if start > batch:
        yield f"{flag}: START {start} must not exceed --global-batch-size {batch}; {fix}"
    elif (batch - start) % increment and not uneven:
        yield (
            f"{flag}: INCREMENT {increment} must divide --global-batch-size {batch} - START {start} = {batch - start}"
            f" ({remainder(batch - start, increment)}); {fix}"
        )


@rule("train_tokens", "global_batch_size", "seq_length")
def train_tokens(config: "RunConfig", world_size: int) -> Iterator[str]:
    """There is an end, after at least one update."""
    tokens, batch, length = config.training.train_tokens, config.training.global_batch_size, config.model.seq_length
    if tokens is None:
        yield "--train-tokens is missing: nothing says how long to train; add, for example, --train-tokens 300B"
    elif tokens < batch * length:
        yield (
            f"--train-tokens {tokens} must be at least one update, --global-batch-size {batch} x --seq-length {length}"
            f" = {batch * length}; use --train-tokens {batch * length} or a smaller batch"
        )


def _nearest_ramp(start: int, increment: int, samples: int, batch: int, step: int) -> str:
    """The flag with the valid START nearest to that given and then the nearest valid INCREMENT."""
    starts = [x for x in multiples(start, step) if x < batch] or multiples(batch - 1, step)[:1]
    start = min(starts, key=lambda x: abs(x - start))
    if batch % step or start >= batch:
        return "--rampup-batch-size none" + (f", or first a multiple of {step} as global batch" if batch % step else "")
    increments = [step * d for d in divisors((batch - start) // step)]
    increment = min(increments, key=lambda x: abs(x - increment))
    return f"--rampup-batch-size {start} {increment} {samples}, or none"


@rule(
    *("cuda_graphs", "device", "precision", "num_experts", "topk", "moe_rts", "moe_noise_policy", "moe_token_dropping"),
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "optimizer_cpu_offload", "reset_attention_mask"),
)
def cuda_graphs(config: "RunConfig", world_size: int) -> Iterator[str]:
    """A micro-batch can be recorded as a CUDA graph.

    A graph repeats kernels on the same memory: no shape may follow from the data, and the host may not look at it.
    """
    training, parallel, moe = config.training, config.parallel, config.moe
    if not training.cuda_graphs:
        return
    flag = "--cuda-graphs"
    if training.device == "cpu":
        yield f"{flag} requires a GPU, and --device is cpu; drop one of the two"
    if config.optimizer.precision != "bf16":
        yield f"{flag} requires --bf16, and the precision is {config.optimizer.precision}; drop it, or use --bf16"
    if config.optimizer.optimizer_cpu_offload:
        yield f"{flag} does not go with --optimizer-cpu-offload, which takes gradients one by one; drop one of the two"
    for size_flag, size in (
        ("--tensor-model-parallel-size", parallel.tensor_model_parallel_size),
        ("--pipeline-model-parallel-size", parallel.pipeline_model_parallel_size),
    ):
        if size > 1:
            yield (
                f"{flag} supports neither tensor nor pipeline parallelism, and {size_flag} is {size}; use {size_flag}"
                f" 1, or drop {flag}"
            )
    if config.data.reset_attention_mask:
        yield (
            f"{flag} does not go with --reset-attention-mask: how many documents a micro-batch has follows from the"
            " data; drop one of the two"
        )
    if not moe.enabled:
        return
    if not moe.moe_token_dropping:
        yield (
            f"{flag} requires experts of fixed capacity, and --disable-moe-token-dropping gives them as many rows as"
            " there are tokens; drop one of the two"
        )
    elif moe.topk == 1 and moe.moe_rts and moe.moe_noise_policy is not None:
        yield (
            f"{flag}: with --moe-noise-policy {moe.moe_noise_policy} the random choice of the tokens that top-1 experts"
            " keep waits for the GPU; use --no-moe-rts, or drop the noise"
        )
