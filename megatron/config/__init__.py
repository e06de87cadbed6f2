"""Typed configuration of a run. To be read in this order:

1. ``option.py``: what a line with ``option(...)`` says, and ``@rule``;
2. the sections, each with its rules: ``model``, ``moe``, ``parallel``, ``optimizer``, ``data``, ``training``,
   ``checkpoint``, ``logging``, ``guard``;
3. ``run.py``: all sections in one ``RunConfig``, and its values as YAML and JSON;
4. ``validation.py``: everything that is wrong with a run, at once;
5. ``flags.py``: the command line; ``presets.py``: the published runs and recipes; ``recipes.py``: how a recipe applies.
"""

from megatron.config.checkpoint import CheckpointConfig
from megatron.config.data import DataConfig
from megatron.config.guard import GuardConfig
from megatron.config.logging import LoggingConfig
from megatron.config.model import ModelConfig
from megatron.config.moe import MoEConfig
from megatron.config.optimizer import OptimizerConfig
from megatron.config.parallel import ParallelConfig
from megatron.config.run import RunConfig
from megatron.config.training import TrainingConfig

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "GuardConfig",
    "LoggingConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RunConfig",
    "TrainingConfig",
]
