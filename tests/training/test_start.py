"""What a run looks for before it starts."""

import importlib.util

import pytest

from megatron.config import OptimizerConfig, RunConfig
from megatron.config.errors import ConfigError
from megatron.training.start import check_optimizer


def test_8_bit_moments_without_their_library_are_an_error_that_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_optimizer(RunConfig())
    with pytest.raises(ConfigError, match=r"needs torchao; run: pip install .*\[8bit\].* or use --optimizer adamw"):
        check_optimizer(RunConfig(optimizer=OptimizerConfig(optimizer="adamw8bit")))
