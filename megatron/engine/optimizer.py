"""AdamW and its parameter groups."""

import torch
from torch import nn

from megatron.config import OptimizerConfig
from megatron.engine.deepspeed_internals import mark_expert, split_expert_groups


def build_adam(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over all parameters of ``model``; weight decay on matrices only, experts in groups of their own.

    Biases and norms are the tensors with one dimension, plus the stacked biases of experts, which have two.
    """
    decay, no_decay = [], []
    for name, parameter in model.named_parameters():
        is_expert = getattr(parameter, "is_expert", False)
        if is_expert:
            mark_expert(parameter)
        (decay if parameter.dim() - is_expert >= 2 else no_decay).append((name, parameter))
    groups = [
        {"params": [p for _, p in decay], "weight_decay": config.weight_decay, "name": "decay"},
        {"params": [p for _, p in no_decay], "weight_decay": 0.0, "name": "no_decay"},
    ]
    return torch.optim.AdamW(
        split_expert_groups([group for group in groups if group["params"]]),
        lr=0.0,  # set before every step
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        fused=True,
    )
