"""Plain torch or Triton kernels: the one place that decides which of them an MoE layer uses.

The operations are in two modules with the same signatures, :mod:`megatron.moe.torch_ops` and
:mod:`megatron.moe.triton_ops`, which compute the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, Protocol

import torch

from megatron.moe import kernels, torch_ops
from megatron.moe.kernels.support import supported_kernels
from megatron.moe.spec import LayerSpec

if TYPE_CHECKING:
    from megatron.moe.experts import Experts, Weights
    from megatron.moe.plan import Routing, RoutingPlan
    from megatron.moe.router import Router

Operation = Literal["route", "permutation", "reorder", "expert_mlp", "expert_mlp_sorted"]
Top1Layer = Callable[["Router", "Experts", torch.Tensor], "tuple[torch.Tensor, Routing]"]


class Permutation(Protocol):
    """The way of a routing plan's tokens into the rows of their experts, and of expert outputs back.

    Rows are those of all experts' buffers, [E * C], in the order of :meth:`RoutingPlan.buffer_row_TK`; or without a
    capacity all assignments, sorted by expert, [N]. Each row that counts is written exactly once, forward and backward,
    so results are deterministic.
    """

    def permute(self, x_TH: torch.Tensor) -> torch.Tensor:
        """Each assignment's token in its row, [R, H]; 0 in rows of none."""
        ...

    def unpermute(self, y_RH: torch.Tensor) -> torch.Tensor:
        """The sum over a token's assignments of gate * expert output, [T, H]; 0 for dropped ones."""
        ...


class Operations(Protocol):
    """What both modules define."""

    def route(self, router: Router, x: torch.Tensor) -> Routing:
        """Route the tokens of one micro-batch, [..., H]; with sequence parallelism this rank's, [..., S, H]."""
        ...

    def permutation(self, plan: RoutingPlan, chunk: int | None = None) -> Permutation:
        """The permutation of a plan whose buffers are cut into chunks of so many slots; None: in one piece."""
        ...

    def reorder(self, x_RH: torch.Tensor, index_R: torch.Tensor, inverse_R: torch.Tensor) -> torch.Tensor:
        """Row ``index_R[r]`` (int32) for each r; ``inverse_R`` is the inverse permutation."""
        ...

    def expert_mlp(self, x: torch.Tensor, weights: Weights) -> torch.Tensor:
        """Expert outputs [L, ..., H] for equally many rows for each expert."""
        ...

    def expert_mlp_sorted(self, x_RH: torch.Tensor, weights: Weights, counts_L: torch.Tensor) -> torch.Tensor:
        """Expert outputs [R, H] for rows sorted by expert, of which expert i has ``counts_L[i]``."""
        ...


class OperationChoice:
    """The choice for one layer in one mode: by its options when it is built, by the format and device of each input.

    Args:
        spec: the layer; None for plain torch in any case.
    """

    def __init__(self, spec: LayerSpec | None = None) -> None:
        self._supported: frozenset[str] = frozenset() if spec is None else supported_kernels(spec)

    def of(self, operation: Operation, x: torch.Tensor, weight: torch.Tensor | None = None) -> Operations:
        """The module whose ``operation`` takes ``x`` and the parameter ``weight`` that it is multiplied by."""
        if operation in self._supported and _runs(operation, x, weight):
            from megatron.moe import triton_ops

            return triton_ops
        return torch_ops

    def top1_layer(self, x: torch.Tensor, router_EH: torch.Tensor, w1: torch.Tensor) -> Top1Layer | None:
        """Router, permutation and experts as one function; None where they are separate steps."""
        if "top1_layer" in self._supported and x.dtype == w1.dtype and _runs("route", x, router_EH):
            from megatron.moe import triton_ops

            return triton_ops.top1_layer
        return None


def _runs(operation: Operation, x: torch.Tensor, weight: torch.Tensor | None) -> bool:
    """Whether a kernel can work on this input."""
    if x.numel() == 0 or not kernels.usable(x):
        return False
    if weight is None:
        return True
    if operation == "route":
        from megatron.moe.kernels.gate import fits

        return fits(x, weight)
    if x.dtype != weight.dtype:
        return False
    return operation != "expert_mlp_sorted" or kernels.groupable(x, *weight.shape[1:])


PLAIN_TORCH = {training: OperationChoice() for training in (True, False)}
