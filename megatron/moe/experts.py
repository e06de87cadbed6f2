"""The experts of one layer that live on this rank: stacked feed-forwards.

Shapes: E experts, L experts on this rank, H hidden, F FFN hidden (of this rank), C rows of each expert, R rows of all.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from megatron.moe.initialization import fill_normal, named_generator
from megatron.moe.operations import PLAIN_TORCH, OperationChoice
from megatron.parallel.groups import ALONE, ExpertGroup, TensorGroup
from megatron.parallel.sharding import ParamLayout, Shard

Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # w1, b1, w2, b2


class Experts(nn.Module):
    """L feed-forwards gelu(x @ w1 + b1) @ w2 + b2, with GELU in its tanh form as in GPT-2.

    Parameters are stacked: ``w1`` [L, H, F], ``b1`` [L, F], ``w2`` [L, F, H], ``b2`` [L, H]. Row i is expert
    ``expert_group.rank * L + i`` of the layer.

    A ``tensor_group`` that shards experts shards the F inner units, and the outputs are then partial: their sum over
    the group counts. It shards ``b2`` too, [L, H / size]: each process adds its shard to its outputs' columns.

    Raises:
        ValueError: E is not a multiple of the size of ``expert_group``, or F and H of that of ``tensor_group``.
    """

    def __init__(
        self,
        hidden_size: int,
        ffn_size: int,
        num_experts: int,
        expert_group: ExpertGroup,
        tensor_group: TensorGroup = ALONE,
        operations: Mapping[bool, OperationChoice] = PLAIN_TORCH,
    ) -> None:
        super().__init__()
        self.operations = operations  # in training, and in evaluation
        if num_experts % expert_group.size:
            raise ValueError(
                f"{num_experts} experts cannot be spread evenly over {expert_group.size} processes: "
                f"{num_experts} / {expert_group.size} is not whole; choose an expert-parallel size that divides it"
            )
        L = num_experts // expert_group.size
        self.expert_group = expert_group
        self.first_expert = expert_group.rank * L
        self.cut = cut = tensor_group if tensor_group.shard_experts else ALONE
        ffn_size = cut.shard_size(ffn_size, "inner units of an expert:")
        outputs = cut.shard_size(hidden_size, "outputs of an expert:")
        self.b2_margin = (cut.rank * outputs, (cut.size - cut.rank - 1) * outputs)  # columns before and after b2's
        self.w1 = nn.Parameter(torch.empty(L, hidden_size, ffn_size))
        self.b1 = nn.Parameter(torch.empty(L, ffn_size))
        self.w2 = nn.Parameter(torch.empty(L, ffn_size, hidden_size))
        self.b2 = nn.Parameter(torch.empty(L, outputs))

    def param_layouts(self) -> dict[str, ParamLayout]:
        """Sharded along the experts and, with a tensor group that shards experts, along F (``b2`` along H)."""
        experts = Shard(0, self.expert_group.size, self.expert_group.rank)
        dims = {"w1": 2, "b1": 1, "w2": 1, "b2": 1}
        return {
            name: ParamLayout((experts, Shard(dim, self.cut.size, self.cut.rank)), self.expert_group.size)
            for name, dim in dims.items()
        }

    @torch.no_grad()
    def initialize(self, w1_std: float, w2_std: float, seed: int, layer: int) -> None:
        """Draw each expert's weights from a generator of its own; biases are 0.

        The generator follows from (seed, layer, expert number in the layer), so experts differ from each other and do
        not depend on how many processes share them. Values are drawn on the CPU in fp32, the same for every device.
        """
        self.b1.zero_()
        self.b2.zero_()
        for row, (w1_HF, w2_FH) in enumerate(zip(self.w1, self.w2, strict=True)):
            generator = named_generator(seed, f"layer {layer}/expert {self.first_expert + row}")
            fill_normal(w1_HF, w1_std, generator, [Shard(1, self.cut.size, self.cut.rank)])
            fill_normal(w2_FH, w2_std, generator, [Shard(0, self.cut.size, self.cut.rank)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Expert outputs [L, ..., H] for equally many rows for each expert."""
        return self.operations[self.training].of("expert_mlp", x, self.w1).expert_mlp(x, self.weights())

    def forward_sorted(self, x_RH: torch.Tensor, counts_L: torch.Tensor) -> torch.Tensor:
        """Expert outputs [R, H] for rows sorted by expert, of which expert i has ``counts_L[i]``."""
        operations = self.operations[self.training].of("expert_mlp_sorted", x_RH, self.w1)
        return operations.expert_mlp_sorted(x_RH, self.weights(), counts_L)

    def weights(self) -> Weights:
        """w1, b1, w2 and b2 of this process, of which b2 is [L, H] in any case: 0 where others add theirs."""
        return self.w1, self.b1, self.w2, self.b2 if self.cut.size == 1 else F.pad(self.b2, self.b2_margin)
