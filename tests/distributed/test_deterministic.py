"""With ``--deterministic`` a training repeats bit for bit, and is the training that it is without."""

import pytest
import torch
from distributed.spawn import run_distributed
from distributed.test_layouts import EP, TP
from distributed.tiny_training import (
    DROPLESS,
    TOP1,
    TOP2,
    Trained,
    differences,
    run_config,
    train,
    with_dropout,
)

from megatron.config import RunConfig


def train_strictly(runs: list[RunConfig]) -> list[Trained]:
    """Train each configuration in processes that are set up as ``--deterministic`` does; memory is full of NaN."""
    from megatron.parallel.determinism import make_deterministic

    make_deterministic()
    torch.utils.deterministic.fill_uninitialized_memory = True  # what reads it is found out
    return train(runs)


def assert_same_bits(one: list[Trained], other: list[Trained]) -> None:
    assert len(one) == len(other) > 0
    for mine, theirs in zip(one, other, strict=True):
        assert all(0 < x < float("inf") for x in (*mine.losses, *mine.norms))
        assert mine.losses == theirs.losses
        assert mine.norms == theirs.norms
        assert mine.moe == theirs.moe
        assert mine.weights.keys() == theirs.weights.keys()
        assert all(torch.equal(weight, theirs.weights[name]) for name, weight in mine.weights.items())


@pytest.mark.exhaustive
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("size", "layout"),
    [
        (1, {}),
        (2, {EP: (2,)}),
        (2, {TP: 2}),
    ],
    ids=["1 process", "EP2", "TP2"],
)
def test_two_runs_are_one(size: int, layout: dict):
    kinds = [(TOP1, "bf16"), (TOP2, "fp32"), (DROPLESS, "bf16")]
    runs = [with_dropout(run_config(moe, precision, **layout)) for moe, precision in kinds]
    first, second = (run_distributed(train_strictly, size, runs)[0] for _ in range(2))
    assert_same_bits(first, second)
    (plain,) = run_distributed(train, size, runs[:1])[0]
    errors = differences(first[0], plain)
    assert all(error <= 1e-5 for error in errors), errors
