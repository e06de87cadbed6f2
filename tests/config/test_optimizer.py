"""The learning rate, the precision and the optimizer's state: what is told."""

import pytest
from config.problems import problems


@pytest.mark.parametrize(
    ("values", "world_size", "message"),
    [
        (
            {"lr": 1e-4, "min_lr": 2e-4}, 4,
            "--min-lr 0.0002 must not exceed --lr 0.0001; use --min-lr 1e-05 (a tenth), or a higher --lr",
        ),
        (
            {"lr_warmup_tokens": 1000, "lr_decay_tokens": 1000}, 4,
            "--lr-warmup-tokens 1000 must be below --lr-decay-tokens 1000, or --lr is never reached;"
            " use --lr-warmup-tokens 10 (1%), or keep the schedule long and stop early with --exit-tokens",
        ),
        (
            {"lr_warmup_tokens": 2 * 10**6, "lr_decay_tokens": 3 * 10**6}, 4,
            "--lr-warmup-tokens 2000000 must be below --train-tokens 1000000, or --lr is never reached;"
            " use --lr-warmup-tokens 10000 (1%), or keep the schedule long and stop early with --exit-tokens",
        ),
        (
            {"precision": "fp16", "initial_loss_scale_power": 3, "min_loss_scale": 10.0}, 4,
            "--min-loss-scale 10.0 must not exceed the first loss scale, 2 to the power --initial-loss-scale-power 3 ="
            " 8; use --initial-loss-scale-power 4 or more",
        ),
        (
            {"optimizer_name": "adamw8bit", "optimizer_cpu_offload": True}, 4,
            "--optimizer-cpu-offload requires --optimizer adamw, and the optimizer is adamw8bit; 8-bit moments are for"
            " GPU memory: use --optimizer adamw, or drop --optimizer-cpu-offload",
        ),
    ],
)  # fmt: skip
def test_message_names_the_numbers_the_rule_and_the_fix(values, world_size, message):
    assert problems(values, world_size) == (message,)
