"""Parameter groups: what decays, and whose gradients are reduced over which processes."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from megatron.config import MoEConfig, OptimizerConfig
from megatron.moe.router import Router
from megatron.parallel.sharding import ParamLayout


def parameter_groups(
    model: nn.Module, layouts: Mapping[str, ParamLayout], config: OptimizerConfig, moe: MoEConfig
) -> list[dict[str, Any]]:
    """All parameters of ``model`` in groups: weight decay on matrices only, experts apart, and routers that have a
    learning rate of their own.

    Biases and norms are the tensors with one dimension, plus the stacked biases of experts, which have two.

    Gradients and norms are reduced group by group, so all processes need the same groups in the same order: those
    without experts, then experts by degree. DeepSpeed's own split would order degrees as a set of names, differently in
    each process, and cut large groups, into more of them on a pipeline stage with more experts.

    DeepSpeed lays a group's parameters out one after the other. Those of odd sizes come last in their group, so that
    all others begin at multiples of 16 bytes: compiled code, which layers share, takes the first layer's alignment for
    that of all.

    Args:
        model: on its device.
        layouts: of its parameters.
        config: of the run.
        moe: of the run.

    Returns:
        Groups as a torch optimizer takes them, which also say whether they have ``matrices``, their ``expert_degree``,
        and ``lr_mult``, their learning rate as a multiple of that of the run.
    """
    routers = {module.weight for module in model.modules() if isinstance(module, Router)}
    members: dict[tuple[int, bool, float], list[nn.Parameter]] = {}
    for name, parameter in sorted(model.named_parameters(), key=lambda entry: entry[1].numel() % 8 != 0):
        layout = layouts[name]
        is_matrix = parameter.dim() - layout.is_expert >= 2
        lr_mult = moe.moe_router_lr_mult if parameter in routers else 1.0
        members.setdefault((layout.expert_degree or 0, is_matrix, lr_mult), []).append(parameter)
    groups = []
    for degree, is_matrix, lr_mult in sorted(members, key=lambda key: (key[0], not key[1], key[2] != 1)):
        group = {
            "params": members[degree, is_matrix, lr_mult],
            "weight_decay": config.weight_decay if is_matrix else 0.0,
            "matrices": is_matrix,
            "expert_degree": degree or None,
            "lr_mult": lr_mult,
        }
        groups.append(group)
    return groups
