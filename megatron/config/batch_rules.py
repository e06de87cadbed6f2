"""Batches: their sizes, how they grow, and how many there are."""

from collections.abc import Iterator

from megatron.config.errors import around, divisors, multiples, remainder
from megatron.config.run import RunConfig


def count_replicas(config: RunConfig, world_size: int) -> tuple[int, str]:
    """The number of data-parallel replicas, and what to call them."""
    replicas = max(config.parallel.data_parallel_size(world_size), 1)
    return replicas, "processes" if replicas == world_size else "data-parallel replicas"


def batch_problems(config: RunConfig, world_size: int) -> Iterator[str]:
    """The global batch is whole micro-batches on every replica."""
    micro, batch = config.training.micro_batch_size, config.training.global_batch_size
    replicas, what = count_replicas(config, world_size)
    step = micro * replicas
    if batch % step:
        fix = f"--global-batch-size {around(batch, multiples(batch, step))}"
        if batch % replicas == 0:
            fix += f", or --micro-batch-size {around(micro, divisors(batch // replicas))}"
        yield (
            f"--global-batch-size {batch} must be a multiple of --micro-batch-size {micro} x {replicas} {what}"
            f" = {step} ({remainder(batch, step)}); use {fix}"
        )


def rampup_problems(config: RunConfig, world_size: int) -> Iterator[str]:
    """So is every step of a ramp-up, and its steps reach the global batch."""
    ramp, batch = config.training.rampup_batch_size, config.training.global_batch_size
    replicas, what = count_replicas(config, world_size)
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


def train_tokens_problems(config: RunConfig) -> Iterator[str]:
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
