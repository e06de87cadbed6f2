"""Validation on a fixed set."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from megatron.engine.base import Engine
from megatron.training.metrics import expert_balance, mean_losses, reduce_sums


def evaluate(engine: Engine, micro_batches: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean loss over this and all other ranks' micro-batches; every rank passes the same number of them."""
    reduced = reduce_sums(engine.evaluate(micro_batches))
    losses = mean_losses(reduced)
    record: dict[str, Any] = {**losses, "perplexity": math.exp(min(losses["loss"], 700.0))}
    if balance := expert_balance(reduced):
        record["experts"] = balance
    return record
