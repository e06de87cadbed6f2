"""The learning rate as a function of consumed tokens."""

import math

from megatron.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, tokens: int, decay_tokens: int) -> float:
    """Learning rate of the update that brings the run to ``tokens`` consumed tokens.

    The rate rises linearly to ``config.lr`` over ``config.lr_warmup_tokens``, then falls to ``config.min_lr`` at
    ``decay_tokens`` (warm-up included) along ``config.lr_decay_style``, and stays there. As ``tokens`` counts the batch
    of the update itself, the first update has a rate above zero.
    """
    if tokens < config.lr_warmup_tokens:
        return config.lr * tokens / config.lr_warmup_tokens
    if config.lr_decay_style == "constant":
        return config.lr
    span = max(decay_tokens - config.lr_warmup_tokens, 1)
    done = min((tokens - config.lr_warmup_tokens) / span, 1.0)
    left = 1.0 - done if config.lr_decay_style == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return config.min_lr + (config.lr - config.min_lr) * left
