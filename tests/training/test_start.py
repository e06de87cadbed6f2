"""What a run looks for before it starts."""

import importlib.util

import pytest

from megatron.config import LoggingConfig, OptimizerConfig, RunConfig
from megatron.config.errors import ConfigError
from megatron.training.start import check_optimizer, check_outputs


def test_8_bit_moments_without_their_library_are_an_error_that_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_optimizer(RunConfig())
    with pytest.raises(ConfigError, match=r"needs torchao; run: pip install .*\[8bit\].* or use --optimizer adamw"):
        check_optimizer(RunConfig(optimizer=OptimizerConfig(optimizer_name="adamw8bit")))


def test_a_run_for_weights_and_biases_without_its_library_is_an_error_that_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_outputs(RunConfig())
    with pytest.raises(ConfigError, match=r"--wandb-project needs .* pip install .*\[wandb\]"):
        check_outputs(RunConfig(logging=LoggingConfig(wandb_project="p")))
