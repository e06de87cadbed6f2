"""The figures of a training step by which to see that training becomes unstable, of all processes together."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from megatron.engine.base import AsyncTensor
from megatron.model.gpt import GPTModel
from megatron.model.layer import TransformerLayer
from megatron.model.monitors import (
    KINDS,
    LayerSamples,
    hidden_keys,
    max_attention_logit,
    parameter_kind,
    router_figures,
    sampled_queries,
)
from megatron.moe.layer import MoELayer
from megatron.parallel.initialize import Topology


class Monitors:
    """Measures training steps.

    Two small all-reduces over all processes, and no waiting for the device.

    Args:
        model: or this process's stage of it.
        topology: of this process.

    Attributes:
        samples: what the layers of the step took in; active while a step is to be measured.
        kinds: the parameters of each kind.
    """

    def __init__(self, model: GPTModel, topology: Topology) -> None:
        experts = model.moe.experts_per_layer(model.config.num_layers)
        self.samples = LayerSamples(model)
        self._model = model
        self._copies = topology.tensor_parallel_size * topology.data_parallel_size  # processes with the same layers
        self._layers = len(experts)
        self._moe_layers = [layer for layer, count in enumerate(experts) if count > 1]
        self.kinds: dict[str, set[torch.nn.Parameter]] = {
            kind: set() for kind in KINDS if self._moe_layers or kind not in ("router", "experts")
        }
        for name, parameter in model.named_parameters():
            self.kinds[parameter_kind(name)].add(parameter)
        self._measured: AsyncTensor | None = None

    def begin(self, wanted: bool) -> None:
        """Get ready for a step, which is to be measured or not."""
        self.samples.active, self._measured = wanted, None

    @property
    def wanted(self) -> bool:
        """Whether the step that has begun is to be measured, and has not been yet."""
        return self.samples.active

    @torch.no_grad()
    def measure(self, squares: Mapping[str, torch.Tensor]) -> None:
        """Measure the step. All processes call it, when gradients are there and weights are as before.

        Args:
            squares: the sum of the squares of the gradients of each of ``kinds``, a scalar; over all processes each
                element of the model's gradient counts once.
        """
        kept, self.samples.kept, self.samples.active = self.samples.kept, {}, False
        device = next(iter(squares.values())).device
        nothing, lowest = (torch.full((), value, dtype=torch.float64, device=device) for value in (0.0, -math.inf))
        attention, router = [lowest] * self._layers, [(lowest, nothing, nothing)] * self._layers
        queries_Q = hidden_QS = None  # the same in all layers
        for name, layer in self._model.layers.items():
            assert isinstance(layer, TransformerLayer)
            x_BSH, cu_seqlens = kept[layer]
            if queries_Q is None or hidden_QS is None:
                group = layer.attention.tensor_group
                length = x_BSH.size(1) * (group.size if group.sequence_parallel else 1)
                queries_Q = sampled_queries(length, device)
                hidden_QS = hidden_keys(queries_Q, length, cu_seqlens)
            normed_BSH = layer.input_layernorm(x_BSH)
            attention[int(name)] = max_attention_logit(layer.attention, normed_BSH, queries_Q, hidden_QS)
            if isinstance(layer.mlp, MoELayer):
                router[int(name)] = router_figures(layer.mlp.router, kept[layer.mlp].x)
        of_moe = [router[layer] for layer in self._moe_layers]
        largest = torch.stack([x.double() for x in [*attention, *(figures[0] for figures in of_moe)]])
        sums = torch.stack([x.double() for figures in of_moe for x in figures[1:]] + [squares[k] for k in self.kinds])
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        dist.all_reduce(sums)
        self._measured = AsyncTensor(torch.cat([largest, sums]))

    def reader(self) -> Callable[[], dict[str, Any]] | None:
        """What reads the figures of the step; None if it was not to be measured."""
        if self._measured is None:
            return None
        return functools.partial(
            figures, self._measured, self._layers, len(self._moe_layers), self._copies, tuple(self.kinds)
        )


def figures(measured: AsyncTensor, layers: int, moe_layers: int, copies: int, kinds: tuple[str, ...]) -> dict[str, Any]:
    """The figures of a step by name, from what :meth:`Monitors.measure` has added up.

    * ``max_attention_logit``: of each layer, the largest q k / sqrt(D) that the softmax of attention sees.
    * ``max_router_logit``: of each MoE layer, the largest absolute value of the router's logits.
    * ``router_logit_std``: their standard deviation over the experts of a token, root mean square over tokens.
    * ``router_entropy``: the entropy of the router's softmax in nats, mean over tokens; log(experts) is uniform.
    * ``grad_norm``: the gradient norm, before clipping, of each kind of parameters: ``attention``, ``router``,
      ``experts``, ``embedding``, ``rest``. The sum of their squares is the square of the whole norm.

    The first four are of the first sequence of each rank's last micro-batch: attention of
    :data:`megatron.model.monitors.QUERIES` queries and all keys, routers of about
    :data:`megatron.model.monitors.TOKENS` tokens.
    """
    largest, means, squares = measured.wait().split([layers + moe_layers, 2 * moe_layers, len(kinds)])
    attention, router = largest.split([layers, moe_layers])
    variance, entropy = (means / copies).view(moe_layers, 2).unbind(1)
    of_routers = {
        "max_router_logit": router.tolist(),
        "router_logit_std": variance.sqrt().tolist(),
        "router_entropy": entropy.tolist(),
    }
    return {
        "max_attention_logit": attention.tolist(),
        **(of_routers if moe_layers else {}),
        "grad_norm": dict(zip(kinds, squares.sqrt().tolist(), strict=True)),
    }
