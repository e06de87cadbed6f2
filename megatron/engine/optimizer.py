"""AdamW and its parameter groups."""

import torch
from torch import nn

from megatron.config import OptimizerConfig
from megatron.engine.deepspeed_internals import mark_expert, split_expert_groups
from megatron.engine.eight_bit import AdamW8bit


def build_adam(model: nn.Module, config: OptimizerConfig, compiled: bool = True) -> torch.optim.AdamW:
    """AdamW over all parameters of ``model``; weight decay on matrices only, experts in groups of their own.

    Biases and norms are the tensors with one dimension, plus the stacked biases of experts, which have two. Their
    moments are fp32 whatever ``config.optimizer_name`` says: they are few, and differ too much in size to share scales.

    DeepSpeed lays a group's parameters out one after the other. Those of odd sizes come last in their group, so that
    all others begin at multiples of 16 bytes: compiled code, which layers share, takes the first layer's alignment for
    that of all.

    Args:
        model: on its device.
        config: of the run.
        compiled: whether torch.compile may be used, on a GPU.
    """
    decay, no_decay = [], []
    for name, parameter in model.named_parameters():
        is_expert = getattr(parameter, "is_expert", False)
        if is_expert:
            mark_expert(parameter)
        (decay if parameter.dim() - is_expert >= 2 else no_decay).append((name, parameter))
    decay, no_decay = (sorted(named, key=lambda entry: entry[1].numel() % 8 != 0) for named in (decay, no_decay))
    groups = [
        {
            "params": [p for _, p in decay],
            "weight_decay": config.weight_decay,
            "name": "decay",
            "eight_bit": config.optimizer_name == "adamw8bit",
        },
        {"params": [p for _, p in no_decay], "weight_decay": 0.0, "name": "no_decay"},
    ]
    split = split_expert_groups([group for group in groups if group["params"]])
    options = {"lr": 0.0, "betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_eps, "fused": True}
    if config.optimizer_name == "adamw8bit":  # the learning rate is set before every step
        return AdamW8bit(split, compiled=compiled, **options)
    return torch.optim.AdamW(split, **options)
