"""AdamW, its learning-rate schedule in tokens, and numeric precision."""

import dataclasses

from megatron.config.fields import option, parse_count


@dataclasses.dataclass
class OptimizerConfig:
    """AdamW with decoupled weight decay (none on biases and norms) behind ZeRO-1."""

    lr: float = option(3e-4, "Peak learning rate.")
    min_lr: float = option(0.0, "Learning rate at the end of the decay and after it.")
    lr_warmup_tokens: int = option(0, "Tokens over which the learning rate rises linearly.", parse=parse_count)
    lr_decay_tokens: int | None = option(
        None, "Tokens, warm-up included, after which --min-lr is reached (default: --train-tokens).", parse=parse_count
    )
    lr_decay_style: str = option("cosine", "Shape of the decay.", choices=("cosine", "linear", "constant"))
    weight_decay: float = option(0.1, "Decoupled weight decay.")
    adam_beta1: float = option(0.9, "Decay of the first moment.")
    adam_beta2: float = option(0.95, "Decay of the second moment.")
    adam_eps: float = option(1e-8, "Added to the root of the second moment.")
    clip_grad: float = option(1.0, "Largest global gradient norm; 0 turns clipping off.")
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
    optimizer: str = option(
        "adamw",
        "How AdamW's moments are kept: in fp32 (adamw), or those of matrices in 8 bits a number (adamw8bit, needs the"
        " extra [8bit]). Checkpoints hold fp32 moments either way.",
        choices=("adamw", "adamw8bit"),
    )
    optimizer_cpu_offload: bool = option(
        False,
        "Keep fp32 weights and AdamW's moments in CPU memory and update them there (ZeRO-Offload): saves GPU memory,"
        " makes updates slower.",
    )
    precision: str = option("bf16", "Number format of weights and activations.", choices=("bf16", "fp16", "fp32"))
    grad_reduce_in_bf16: bool = option(
        False, "bf16: add gradients over processes in bf16 instead of fp32, which halves what is sent for it."
    )
    loss_scale: float = option(0.0, "fp16: a fixed loss scale; 0 is the dynamic one.")
    initial_loss_scale_power: int = option(16, "fp16: the dynamic loss scale starts at 2 to this power.")
    loss_scale_window: int = option(1000, "fp16: good steps after which the loss scale doubles.")
    min_loss_scale: float = option(1.0, "fp16: the smallest loss scale.")
    hysteresis: int = option(2, "fp16: overflows in a row before the loss scale is halved.")
