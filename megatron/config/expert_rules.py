"""What mixtures of experts need of the rest of a configuration."""

import math
from collections.abc import Iterator

from megatron.config.errors import around, divisors, remainder
from megatron.config.run import RunConfig


def expert_layer_problems(config: RunConfig) -> Iterator[str]:
    """What is wrong with the number of MoE layers, and with the options that list one number for each of them."""
    layers, interval = config.model.num_layers, config.moe.expert_interval
    if not config.moe.enabled:
        return
    if interval > layers:
        yield (
            f"--expert-interval {interval} must be from 1 to --num-layers {layers}, or no layer has experts;"
            f" use --expert-interval {min(2, layers)}"
        )
        return
    for flag, given in (
        ("--num-experts", len(config.moe.num_experts)),
        ("--moe-expert-parallel-size", len(config.parallel.moe_expert_parallel_size)),
    ):
        if given not in (1, layers // interval):
            yield (
                f"{flag} lists {given} numbers; {layers} layers with --expert-interval {interval} have {layers} //"
                f" {interval} = {layers // interval} MoE layers; give one number for all of them or"
                f" {layers // interval}"
            )


def expert_parallel_problems(config: RunConfig, world_size: int, replicas: int, what: str) -> Iterator[str]:
    """Which expert-parallel degrees do not divide the experts of their layers or the ``replicas`` (called ``what``)."""
    if any(expert_layer_problems(config)):
        return
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
