"""The learning rate, the precision and the optimizer's state."""

import math
from collections.abc import Iterator

from megatron.config.run import RunConfig


def rates_problems(config: RunConfig) -> Iterator[str]:
    """The learning rate does not rise at its end."""
    lr, min_lr = config.optimizer.lr, config.optimizer.min_lr
    if min_lr > lr:
        yield f"--min-lr {min_lr} must not exceed --lr {lr}; use --min-lr {lr / 10:.3g} (a tenth), or a higher --lr"


def warmup_problems(config: RunConfig) -> Iterator[str]:
    """The warm-up ends before the run or its schedule does."""
    warmup, decay, train = (
        config.optimizer.lr_warmup_tokens,
        config.optimizer.lr_decay_tokens,
        config.training.train_tokens,
    )
    ends = [(decay, "--lr-decay-tokens"), (train, "--train-tokens")]
    end, flag = min((pair for pair in ends if pair[0] is not None), default=(None, ""))
    if end is not None and warmup >= end:
        yield (
            f"--lr-warmup-tokens {warmup} must be below {flag} {end}, or --lr is never reached; use"
            f" --lr-warmup-tokens {end // 100} (1%), or keep the schedule long and stop early with --exit-tokens"
        )


def loss_scale_problems(config: RunConfig) -> Iterator[str]:
    """The first loss scale is not below the least."""
    opt = config.optimizer
    if opt.precision == "fp16" and opt.loss_scale == 0 and opt.min_loss_scale > 2**opt.initial_loss_scale_power:
        yield (
            f"--min-loss-scale {opt.min_loss_scale} must not exceed the first loss scale, 2 to the power"
            f" --initial-loss-scale-power {opt.initial_loss_scale_power} = {2**opt.initial_loss_scale_power};"
            f" use --initial-loss-scale-power {math.ceil(math.log2(opt.min_loss_scale))} or more"
        )


def gradient_reduction_problems(config: RunConfig) -> Iterator[str]:
    """Gradients can be reduced in bf16 in bf16 runs alone."""
    precision = config.optimizer.precision
    if config.optimizer.grad_reduce_in_bf16 and precision != "bf16":
        yield f"--grad-reduce-in-bf16 must have --bf16, and the precision is {precision}; drop it, or use --bf16"


def optimizer_state_problems(config: RunConfig) -> Iterator[str]:
    """Which optimizers can keep their state where and as what."""
    optimizer = config.optimizer.optimizer_name
    if config.optimizer.optimizer_cpu_offload and optimizer != "adamw":
        yield (
            f"--optimizer-cpu-offload must have --optimizer adamw, and the optimizer is {optimizer}; 8-bit moments are"
            f" for GPU memory: use --optimizer adamw, or drop --optimizer-cpu-offload"
        )
    for flag, dtype in (
        ("--exp-avg-dtype", config.optimizer.exp_avg_dtype),
        ("--exp-avg-sq-dtype", config.optimizer.exp_avg_sq_dtype),
    ):
        if dtype == "fp32":
            continue
        if config.optimizer.precision != "bf16":
            yield (
                f"{flag} {dtype} must have --bf16, and the precision is {config.optimizer.precision}; drop it, or use"
                f" --bf16"
            )
        if optimizer != "adamw" or config.optimizer.optimizer_cpu_offload:
            other = f"--optimizer {optimizer}" if optimizer != "adamw" else "--optimizer-cpu-offload"
            yield f"{flag} {dtype} does not go with {other}, which has moments of its own; drop one of the two"
