"""AdamW, its learning-rate schedule in tokens, and numeric precision."""

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron.config.option import option, parse_count, rule

if TYPE_CHECKING:
    from megatron.config.run import RunConfig


@dataclasses.dataclass
class OptimizerConfig:
    """AdamW with decoupled weight decay (none on biases and norms) behind ZeRO-1."""

    lr: float = option(3e-4, "Peak learning rate.", above=0)
    min_lr: float = option(0.0, "Learning rate at the end of the decay and after it.", min=0)
    lr_warmup_tokens: int = option(0, "Tokens over which the learning rate rises linearly.", min=0, parse=parse_count)
    lr_decay_tokens: int | None = option(
        None, "Tokens, warm-up included, after which --min-lr is reached (default: --train-tokens).", min=1,
        parse=parse_count,
    )  # fmt: skip
    lr_decay_style: str = option("cosine", "Shape of the decay.", choices=("cosine", "linear", "constant"))
    weight_decay: float = option(0.1, "Decoupled weight decay.", min=0)
    adam_beta1: float = option(0.9, "Decay of the first moment.", min=0, below=1)
    adam_beta2: float = option(0.95, "Decay of the second moment.", min=0, below=1)
    adam_eps: float = option(1e-8, "Added to the root of the second moment.", above=0)
    clip_grad: float = option(1.0, "Largest global gradient norm; 0 turns clipping off.", min=0)
    exp_avg_dtype: str = option(
        "fp32",
        "bf16: number format of Adam's first moment; bf16 saves 2 bytes a weight.",
        choices=("fp32", "bf16"),
    )
    exp_avg_sq_dtype: str = option(
        "fp32",
        "bf16: number format of Adam's second moment; bf16 saves 2 bytes a weight.",
        choices=("fp32", "bf16"),
    )
    optimizer_name: str = option(
        "adamw",
        "How AdamW's moments are kept: in fp32 (adamw), or those of matrices in 8 bits a number (adamw8bit, needs the"
        " extra [8bit]). Checkpoints hold fp32 moments either way.",
        choices=("adamw", "adamw8bit"),
        flag="--optimizer",
    )
    optimizer_cpu_offload: bool = option(
        False,
        "Keep fp32 weights and AdamW's moments in CPU memory and update them there (ZeRO-Offload): saves GPU memory,"
        " makes updates slower.",
        resumable=True,
    )
    precision: str = option("bf16", "Number format of weights and activations.", choices=("bf16", "fp16", "fp32"))
    grad_reduce_in_bf16: bool = option(
        False, "bf16: add gradients over processes in bf16 instead of fp32, which halves what is sent for it."
    )
    loss_scale: float = option(0.0, "fp16: a fixed loss scale; 0 is the dynamic one.", min=0)
    initial_loss_scale_power: int = option(16, "fp16: the dynamic loss scale starts at 2 to this power.", min=0)
    loss_scale_window: int = option(1000, "fp16: good steps after which the loss scale doubles.", min=1)
    min_loss_scale: float = option(1.0, "fp16: the smallest loss scale.", above=0)
    hysteresis: int = option(2, "fp16: overflows in a row before the loss scale is halved.", min=1)


@rule("lr", "min_lr")
def learning_rates(config: "RunConfig", world_size: int) -> Iterator[str]:
    """The learning rate does not rise at its end."""
    lr, min_lr = config.optimizer.lr, config.optimizer.min_lr
    if min_lr > lr:
        yield f"--min-lr {min_lr} must not exceed --lr {lr}; use --min-lr {lr / 10:.3g} (a tenth), or a higher --lr"


@rule("lr_warmup_tokens", "lr_decay_tokens", "train_tokens")
def warmup(config: "RunConfig", world_size: int) -> Iterator[str]:
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


@rule("precision", "min_loss_scale", "initial_loss_scale_power", "loss_scale")
def loss_scales(config: "RunConfig", world_size: int) -> Iterator[str]:
    """The first loss scale is not below the least."""
    opt = config.optimizer
    if opt.precision == "fp16" and opt.loss_scale == 0 and opt.min_loss_scale > 2**opt.initial_loss_scale_power:
        yield (
            f"--min-loss-scale {opt.min_loss_scale} must not exceed the first loss scale, 2 to the power"
            f" --initial-loss-scale-power {opt.initial_loss_scale_power} = {2**opt.initial_loss_scale_power};"
            f" use --initial-loss-scale-power {math.ceil(math.log2(opt.min_loss_scale))} or more"
        )


@rule("precision", "grad_reduce_in_bf16")
def gradient_reduction(config: "RunConfig", world_size: int) -> Iterator[str]:
    """Gradients can be reduced in bf16 in bf16 runs alone."""
    precision = config.optimizer.precision
    if config.optimizer.grad_reduce_in_bf16 and precision != "bf16":
        yield f"--grad-reduce-in-bf16 requires --bf16, and the precision is {precision}; drop it, or use --bf16"


@rule("precision", "optimizer_name", "optimizer_cpu_offload", "exp_avg_dtype", "exp_avg_sq_dtype")
def optimizer_state(config: "RunConfig", world_size: int) -> Iterator[str]:
    """Which optimizers can keep their state where and as what."""
    optimizer = config.optimizer.optimizer_name
    if config.optimizer.optimizer_cpu_offload and optimizer != "adamw":
        yield (
            f"--optimizer-cpu-offload requires --optimizer adamw, and the optimizer is {optimizer}; 8-bit moments are"
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
                f"{flag} {dtype} requires --bf16, and the precision is {config.optimizer.precision}; drop it, or use"
                f" --bf16"
            )
        if optimizer != "adamw" or config.optimizer.optimizer_cpu_offload:
            other = f"--optimizer {optimizer}" if optimizer != "adamw" else "--optimizer-cpu-offload"
            yield f"{flag} {dtype} does not go with {other}, which has moments of its own; drop one of the two"
