"""Optimizers: each is a class in a file of its own, registered here under its name for ``--optimizer``."""

from megatron.engine.optim.adamw import AdamW
from megatron.engine.optim.adamw8bit import AdamW8bit
from megatron.engine.optim.base import ParameterSlice, ShardedOptimizer

OPTIMIZERS: dict[str, type[ShardedOptimizer]] = {
    "adamw": AdamW,
    "adamw8bit": AdamW8bit,
}

__all__ = ["OPTIMIZERS", "ParameterSlice", "ShardedOptimizer"]
