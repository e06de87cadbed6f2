"""Bytes of weights, gradients and optimizer state for a parameter, in closed form."""

import dataclasses

from megatron.config import OptimizerConfig
from megatron.engine.optim import OPTIMIZERS


@dataclasses.dataclass(frozen=True)
class BytesPerParameter:
    """For a parameter that a process computes with: by part on the GPU, and all in CPU memory."""

    weights: float
    gradients: float
    fp32_weights: float
    moments: float
    cpu: float
    lasting: bool  # gradients have their place between updates too

    @property
    def gpu(self) -> float:
        """All on the GPU."""
        return self.weights + self.gradients + self.fp32_weights + self.moments


def bytes_per_parameter(
    optimizer: OptimizerConfig, replicas: int, *, one_micro_batch: bool = False
) -> BytesPerParameter:
    """Bytes that weights, gradients and the optimizer's state take when they are most, at the end of a backward pass.

    On the GPU: weights (2, or 4 with --fp32) and gradients: sums in fp32 (4), or for the one micro-batch of an update,
    without replicas and not with --fp32 or 8-bit moments, the gradients as they come (2). ZeRO-1 spreads over
    ``replicas``: fp32 weights (4) and the optimizer's states (AdamW's moments: 4 each, 2 in bf16, 1 in 8 bits). In CPU
    memory there are also the gradients (4) of what a process updates, and its weights on their way back (2 or 4).

    Activations and communication buffers are not in it, and neither is it that moments of biases and norms are always
    fp32: they are less than a thousandth of a model's parameters.

    Args:
        optimizer: of the run.
        replicas: processes with the same parameters: data-parallel ones, or for experts expert-data-parallel ones.
        one_micro_batch: whether an update has one micro-batch, and the model no pipeline.

    Raises:
        ValueError: there are no replicas.
    """
    if replicas < 1:
        raise ValueError(f"got {replicas} replicas; a parameter is on at least 1 process")
    weight = 4 if optimizer.precision == "fp32" else 2
    kind = OPTIMIZERS[optimizer.optimizer_name]
    moments = kind.state_bytes(optimizer)
    direct = one_micro_batch and replicas == 1 and optimizer.precision != "fp32" and kind.updates_slices
    gradients = 2 if direct else 4
    if optimizer.optimizer_cpu_offload:
        cpu = (4 + moments + 4 + weight) / replicas
        return BytesPerParameter(weight, gradients, 0, 0, cpu, lasting=not direct)
    return BytesPerParameter(weight, gradients, 4 / replicas, moments / replicas, cpu=0, lasting=not direct)
