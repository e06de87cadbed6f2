"""Bytes of weights, gradients and optimizer state for a parameter, in closed form."""

import dataclasses

from megatron.config import OptimizerConfig

BLOCK = 256  # numbers of an 8-bit moment that share an fp32 scale


@dataclasses.dataclass(frozen=True)
class BytesPerParameter:
    """On the GPU and in CPU memory, for a parameter that a process computes with."""

    gpu: float
    cpu: float


def bytes_per_parameter(optimizer: OptimizerConfig, replicas: int) -> BytesPerParameter:
    """Bytes that weights, gradients and AdamW's state take when they are most, at the end of a backward pass.

    On the GPU: weights (2, or 4 with --fp32), sums of gradients in fp32 (4), with --bf16 the gradients of a micro-batch
    too (2; DeepSpeed frees them one by one otherwise). ZeRO-1 spreads over ``replicas``: fp32 weights (4) and two
    moments (8, or 2 and a scale for each block). In CPU memory there are also the gradients (4) of what a process
    updates, and its weights on their way back (2 or 4).

    Activations and communication buffers are not in it, and neither is it that moments of biases and norms are always
    fp32: they are less than a thousandth of a model's parameters.

    Args:
        optimizer: of the run.
        replicas: processes with the same parameters: data-parallel ones, or for experts expert-data-parallel ones.

    Raises:
        ValueError: there are no replicas.
    """
    if replicas < 1:
        raise ValueError(f"got {replicas} replicas; a parameter is on at least 1 process")
    weight = 4 if optimizer.precision == "fp32" else 2
    sums = 4
    moments = 2 * (1 + 4 / BLOCK) if optimizer.optimizer_name == "adamw8bit" else 8
    state = (4 + moments) / replicas
    if optimizer.optimizer_cpu_offload:
        return BytesPerParameter(gpu=weight + sums, cpu=state + (4 + weight) / replicas)
    of_a_micro_batch = 2 if optimizer.precision == "bf16" else 0
    return BytesPerParameter(gpu=weight + of_a_micro_batch + sums + state, cpu=0)
