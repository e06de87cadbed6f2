"""The mixture-of-experts layer: router -> dispatcher -> experts.

Shapes: H hidden, E experts.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from megatron.config import ModelConfig, MoEConfig
from megatron.moe.dispatcher import CapacityDispatcher, Dispatcher, DroplessDispatcher
from megatron.moe.experts import Experts
from megatron.moe.initialization import fill_normal, named_generator, residual_output_std
from megatron.moe.mlp import MLP
from megatron.moe.operations import OperationChoice
from megatron.moe.router import Router
from megatron.moe.spec import LayerSpec
from megatron.moe.tensor_parallel_dispatcher import TensorParallelDispatcher
from megatron.parallel.groups import ALONE, LOCAL_EXPERTS, ExpertGroup, TensorGroup
from megatron.parallel.sharding import collect_layouts
from megatron.parallel.tensor_collectives import sum_gradients


class MoEStats(NamedTuple):
    """What an MoE layer tells of one micro-batch beside its output. The losses are not scaled by coefficients."""

    aux_loss: torch.Tensor  # scalar, fp32 (float64 for float64 input), load balancing
    z_loss: torch.Tensor  # scalar likewise, router z-loss
    counts_E: torch.Tensor  # int64, this micro-batch's tokens routed to each expert, before dropping
    dropped: torch.Tensor  # int64 scalar, this micro-batch's dropped assignments


class MoELayer(nn.Module):
    """Feed-forward in which each token passes through ``moe.topk`` of ``num_experts`` experts.

    In training every expert has a buffer of fixed size and tokens beyond it are dropped, unless
    ``moe.moe_token_dropping`` is off. In evaluation nothing is dropped, unless ``moe.moe_eval_capacity_factor`` is set,
    and nothing is random. Any number of tokens will do, one or none included. What makes routing random in training
    (see :class:`megatron.moe.router.Router`) draws from torch's default generator of the device.

    The residual form (``moe.mlp_type`` "residual"; Rajbhandari et al. 2022, section 4.1) adds a dense feed-forward:
    y = experts(x) * c_0 + mlp(x) * c_1 with c = softmax(coefficient(x)).

    Args:
        model: gives the widths and the scale of initial values.
        moe: how tokens are routed.
        num_experts: E of this layer.
        expert_group: the processes that share the experts. In capacity mode all must pass in equally many tokens.
        tensor_group: the processes that share every layer's matrices. All pass in the same tokens, or with sequence
            parallelism a piece of each sequence.
        seed: initial values follow from this, ``layer`` and each expert's number.
        layer: number of this layer in the model, from 0.

    Raises:
        ValueError: the processes do not divide the experts, or ``moe.topk`` is not between 1 and E.
    """

    def __init__(
        self,
        model: ModelConfig,
        moe: MoEConfig,
        num_experts: int,
        expert_group: ExpertGroup = LOCAL_EXPERTS,
        tensor_group: TensorGroup = ALONE,
        *,
        seed: int = 0,
        layer: int = 0,
    ) -> None:
        super().__init__()
        self.tensor_group = tensor_group
        self.operations = {
            training: OperationChoice(LayerSpec(model, moe, num_experts, expert_group, tensor_group, training))
            for training in (True, False)
        }
        self.router = Router(model.hidden_size, num_experts, moe, tensor_group, self.operations)
        self.experts = Experts(
            model.hidden_size, model.ffn_size, num_experts, expert_group, tensor_group, self.operations
        )
        self._dispatchers = {
            training: make_dispatcher(factor is None, expert_group, tensor_group, self.operations[training])
            for training, factor in ((True, self.router.train_factor), (False, self.router.eval_factor))
        }
        self.mlp: MLP | None = None
        if moe.mlp_type == "residual":
            self.mlp = MLP(model, tensor_group)
            self.coefficient = nn.Linear(model.hidden_size, 2)
        if not self.router.weight.is_meta:
            self._initialize(model, moe, seed, layer)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, MoEStats]:
        """Map [..., H] to [..., H]. Experts add nothing to a token whose assignments were all dropped.

        With several processes, all of the group must call this together.
        """
        # Computed when first asked for: while tokens are on their way to the experts, if a dispatcher sends them.
        dense = None if self.mlp is None else functools.cache(functools.partial(self.mlp, x))
        top1_layer = self.operations[self.training].top1_layer(x, self.router.weight, self.experts.w1)
        if top1_layer is not None:  # the next two steps as one function
            y, routing = top1_layer(self.router, self.experts, x)
        else:
            routing = self.router(x)
            y = self.dispatcher(x, routing.plan, self.experts, overlap=dense)
        if dense is not None:
            y = self._blend(x, y, dense())
        return y, MoEStats(routing.aux_loss, routing.z_loss, routing.plan.counts_E, routing.plan.dropped)

    @property
    def dispatcher(self) -> Dispatcher:
        """The dispatcher of the present mode, training or evaluation: they may differ in whether tokens are dropped."""
        return self._dispatchers[self.training]

    def _blend(self, x: torch.Tensor, y: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
        """The residual form: experts and dense feed-forward, weighted."""
        weight, bias = self.coefficient.weight, self.coefficient.bias
        if self.tensor_group.sequence_parallel:
            weight, bias = sum_gradients(self.tensor_group, weight, bias)
        c = F.linear(x, weight, bias).softmax(-1)
        return y * c[..., :1] + dense * c[..., 1:]

    @torch.no_grad()
    def _initialize(self, model: ModelConfig, moe: MoEConfig, seed: int, layer: int) -> None:
        """Weights are normal(0, std), into the residual stream normal(0, std / sqrt(2 layers)); biases are 0.

        The router's are normal(0, std * moe_router_init_mult).
        """
        std = model.init_method_std
        output_std = residual_output_std(std, model.num_layers)
        self.experts.initialize(std, output_std, seed, layer)
        fill_normal(self.router.weight, std * moe.moe_router_init_mult, named_generator(seed, f"layer {layer}/router"))
        if self.mlp is not None:
            for name, linear, scale in (
                ("mlp.fc1", self.mlp.fc1, std),
                ("mlp.fc2", self.mlp.fc2, output_std),
                ("coefficient", self.coefficient, std),
            ):
                shards = collect_layouts(linear)["weight"].shards
                fill_normal(linear.weight, scale, named_generator(seed, f"layer {layer}/{name}"), shards)
                linear.bias.zero_()


def make_dispatcher(
    dropless: bool, expert_group: ExpertGroup, tensor_group: TensorGroup, operations: OperationChoice
) -> Dispatcher:
    """The dispatcher of a layer in one mode."""
    dispatcher = (DroplessDispatcher if dropless else CapacityDispatcher)(expert_group, operations)
    if tensor_group.size == 1:
        return dispatcher
    return TensorParallelDispatcher(dispatcher, tensor_group, dropless=dropless)
