"""Batches, how they grow, and how many there are: what is told, and that the advice is good."""

import re

import pytest
from config.problems import problems


@pytest.mark.parametrize(
    ("values", "world_size", "message"),
    [
        (
            {"tensor_model_parallel_size": 2, "global_batch_size": 20}, 8,
            "--global-batch-size 20 must be a multiple of --micro-batch-size 2 x 4 data-parallel replicas = 8"
            " (20 = 2 x 8 + 4); use --global-batch-size 16 or 24, or --micro-batch-size 1 or 5",
        ),
        (
            {"global_batch_size": 20}, 4,
            "--global-batch-size 20 must be a multiple of --micro-batch-size 2 x 4 processes = 8 (20 = 2 x 8 + 4); use"
            " --global-batch-size 16 or 24, or --micro-batch-size 1 or 5",
        ),
        (
            {"global_batch_size": 3}, 4,
            "--global-batch-size 3 must be a multiple of --micro-batch-size 2 x 4 processes = 8 (3 = 0 x 8 + 3); use"
            " --global-batch-size 8",
        ),
        (
            {"rampup_batch_size": (8, 8)}, 4,
            "--rampup-batch-size 8 8 has 2 numbers; expected 3, START INCREMENT SAMPLES, such as 8 8 100000",
        ),
        (
            {"rampup_batch_size": (5, 8, 100), "global_batch_size": 32}, 4,
            "--rampup-batch-size 5 8 100: START 5 must be a multiple of --micro-batch-size 2 x 4 processes = 8"
            " (5 = 0 x 8 + 5); use --rampup-batch-size 8 8 100, or none",
        ),
        (
            {"rampup_batch_size": (8, 12, 100), "global_batch_size": 32}, 4,
            "--rampup-batch-size 8 12 100: INCREMENT 12 must be a multiple of --micro-batch-size 2 x 4 processes = 8"
            " (12 = 1 x 8 + 4); use --rampup-batch-size 8 8 100, or none",
        ),
        (
            {"rampup_batch_size": (8, 16, 100), "global_batch_size": 32}, 4,
            "--rampup-batch-size 8 16 100: INCREMENT 16 must divide --global-batch-size 32 - START 8 = 24"
            " (24 = 1 x 16 + 8); use --rampup-batch-size 8 8 100, or none",
        ),
        (
            {"rampup_batch_size": (24, 8, 100)}, 4,
            "--rampup-batch-size 24 8 100: START 24 must not exceed --global-batch-size 16; use --rampup-batch-size"
            " 8 8 100, or none",
        ),
        (
            {"rampup_batch_size": (24, 8, 100), "global_batch_size": 8}, 4,
            "--rampup-batch-size 24 8 100: START 24 must not exceed --global-batch-size 8; use --rampup-batch-size"
            " none",
        ),
        (
            {"train_tokens": None}, 4,
            "--train-tokens is missing: nothing says how long to train; add, for example, --train-tokens 300B",
        ),
        (
            {"train_tokens": 511}, 4,
            "--train-tokens 511 must be at least one update, --global-batch-size 16 x --seq-length 32 = 512;"
            " use --train-tokens 512 or a smaller batch",
        ),
    ],
)  # fmt: skip
def test_message_names_the_numbers_the_rule_and_the_fix(values, world_size, message):
    assert problems(values, world_size) == (message,)


@pytest.mark.parametrize("start", [1, 8, 30, 64, 200, 512])
@pytest.mark.parametrize("increment", [1, 30, 96, 700])
@pytest.mark.parametrize(("micro", "world_size"), [(2, 64), (4, 8), (1, 3), (8, 64)])
def test_suggested_rampup_is_valid(start, increment, micro, world_size):
    values = {"global_batch_size": 1536, "micro_batch_size": micro, "rampup_batch_size": (start, increment, 1000)}
    for problem in problems(values, world_size):
        advice = re.search(r"use --rampup-batch-size (\d+) (\d+) (\d+), or none", problem)
        values["rampup_batch_size"] = tuple(map(int, advice.groups()))
        assert problems(values, world_size) == ()
