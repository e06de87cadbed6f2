"""How many parameters a model or a process has: those of the model's own modules, built without memory (on meta).

Nothing is allocated, so any size can be counted anywhere. Layers of one kind are built once.

Shapes: E experts of a layer.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch

from megatron.config import ModelConfig, MoEConfig, RunConfig
from megatron.model.gpt import GPTModel
from megatron.model.layer import TransformerLayer
from megatron.parallel.groups import ALONE, ExpertGroup, TensorGroup

Options = tuple[tuple[str, Any], ...]  # of a section of the configuration, which itself cannot be a key of a cache


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """Parameters of the whole model, over all processes."""

    total: int
    active: int  # that take part in the computation of one token: all but the experts it is not routed to
    expert: int  # inside experts, of all layers; these are divided by the expert-parallel size

    @property
    def dense(self) -> int:
        """Parameters outside the experts; every process holds all of them."""
        return self.total - self.expert


@dataclasses.dataclass(frozen=True)
class LayerParameters:
    """Parameters of one layer that a process holds, and those of them that are elements of matrices."""

    dense: int  # outside experts
    expert: int  # inside experts
    dense_matrices: int
    expert_matrices: int


def parameters_of_layer(
    model: ModelConfig, moe: MoEConfig, layer: int, degree: int = 1, tensor_group: TensorGroup = ALONE
) -> LayerParameters:
    """Count what a process holds of layer number ``layer``, whose experts ``degree`` processes share."""
    kind = vars(moe) | {"num_experts": (moe.experts_of_layer(layer),), "expert_interval": 1}
    return _count_layer(tuple(vars(model).items()), tuple(kind.items()), degree, tensor_group)


@functools.lru_cache(maxsize=1024)
def _count_layer(model: Options, moe: Options, degree: int, tensor_group: TensorGroup) -> LayerParameters:
    with torch.device("meta"):
        group = ExpertGroup(degree, 0, None)
        layer = TransformerLayer(ModelConfig(**dict(model)), MoEConfig(**dict(moe)), 0, group, 0, tensor_group)
    count: Counter[str] = Counter()
    for name, parameter in layer.named_parameters():
        part = "expert" if name.startswith("mlp.experts.") else "dense"
        count[part] += parameter.numel()
        if parameter.dim() - (part == "expert") >= 2:  # experts are stacked
            count[f"{part}_matrices"] += parameter.numel()
    return LayerParameters(count["dense"], count["expert"], count["dense_matrices"], count["expert_matrices"])


@functools.lru_cache(maxsize=1024)
def _count_ends(model: Options, vocab_size: int, tensor_group: TensorGroup, first: bool, last: bool) -> int:
    """Parameters outside layers: embedding, last norm and head."""
    config = ModelConfig(**dict(model))
    with torch.device("meta"):
        without_layers = GPTModel(
            config,
            MoEConfig(),
            vocab_size,
            tensor_group=tensor_group,
            layers=(),
            with_embedding=first,
            with_head=last,
        )
    return sum(parameter.numel() for parameter in without_layers.parameters())


def count_parameters(model: ModelConfig, moe: MoEConfig, vocab_size: int) -> ParameterCount:
    """Count the parameters of ``GPTModel(model, moe, vocab_size)``.

    Args:
        vocab_size: the padded vocabulary (:meth:`ModelConfig.padded_vocab_size`).
    """
    dense = _count_ends(tuple(vars(model).items()), vocab_size, ALONE, True, True)
    expert = routed = 0
    for layer in range(model.num_layers):
        found = parameters_of_layer(model, moe, layer)
        dense += found.dense
        expert += found.expert
        routed += moe.topk * (found.expert // moe.experts_of_layer(layer))
    return ParameterCount(total=dense + expert, active=dense + routed, expert=expert)


@dataclasses.dataclass(frozen=True)
class StageParameters:
    """Parameters that one process holds: outside experts, and inside them by degree of expert parallelism."""

    dense: int
    experts: dict[int, int]

    @property
    def total(self) -> int:
        """All of them."""
        return self.dense + sum(self.experts.values())


def parameters_of_stage(
    config: RunConfig, vocab_size: int, layers: Iterable[int], *, first: bool, last: bool
) -> StageParameters:
    """Count what a process of a pipeline stage holds, with tensor and expert parallelism.

    Args:
        vocab_size: padded.
        layers: numbers of the stage's layers.
        first: the stage has the embedding.
        last: it has the last norm and the head; the head's token table is a second one if it is not ``first`` too.
    """
    parallel = config.parallel
    tensor_group = TensorGroup(
        parallel.tensor_model_parallel_size, shard_experts=parallel.enable_expert_tensor_parallelism
    )
    dense = _count_ends(tuple(vars(config.model).items()), vocab_size, tensor_group, first, last)
    experts: dict[int, int] = {}
    for layer in layers:
        degree = config.expert_parallel_degree(layer)
        found = parameters_of_layer(config.model, config.moe, layer, degree, tensor_group)
        dense += found.dense
        if found.expert:
            experts[degree] = experts.get(degree, 0) + found.expert
    return StageParameters(dense, experts)
