"""Initial values of the model's parameters, the same on any device and in any parallel layout."""

import torch
from torch import nn

from megatron.moe.initialization import fill_normal, named_generator, residual_output_std
from megatron.moe.layer import MoELayer
from megatron.parallel.sharding import collect_layouts

# Weights that write into the residual stream.
RESIDUAL_OUTPUTS = ("attention.dense.weight", "mlp.fc2.weight")


@torch.no_grad()
def initialize(model: nn.Module, std: float, num_layers: int, seed: int) -> None:
    """Set every parameter outside MoE layers, which set their own at construction.

    Weights are normal(0, std), those that write into the residual stream normal(0, std / sqrt(2 num_layers)); biases
    are 0; norms scale by 1. Values depend on the seed and the parameter's name only, not on the device or the layout.
    Parameters on the meta device stay as they are.
    """
    experts = tuple(name + "." for name, module in model.named_modules() if isinstance(module, MoELayer))
    layouts = collect_layouts(model)
    for name, parameter in model.named_parameters():
        if parameter.is_meta or name.startswith(experts):
            continue
        if name.endswith(".bias"):
            parameter.zero_()
        elif parameter.dim() == 1:  # the scale of a norm
            parameter.fill_(1.0)
        else:
            scale = residual_output_std(std, num_layers) if name.endswith(RESIDUAL_OUTPUTS) else std
            fill_normal(parameter, scale, named_generator(seed, name), layouts[name].shards)
