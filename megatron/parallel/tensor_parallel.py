"""Layers whose matrices several processes share. For one process each is the plain layer of torch.

Shapes: B batch, S sequence (of all tokens), H hidden, I inputs and O outputs of a matrix, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import nn

from megatron.parallel.groups import ALONE, TensorGroup
from megatron.parallel.randomness import own_randomness
from megatron.parallel.sharding import ParamLayout, Shard
from megatron.parallel.tensor_collectives import enter_tensor_region, leave_tensor_region, sum_gradients
from megatron.parallel.vocabulary import check_ids


class ColumnParallelLinear(nn.Module):
    """x @ weight^T + bias, of which each process computes some of the outputs (Shoeybi et al. 2019, section 3).

    Takes the residual stream, whole or cut along the sequence, and gives [..., S, O / size]. ``weight`` is
    [O / size, I]. The outputs may consist of several equal ``parts``, such as Q, K and V, each of which is shared.

    Raises:
        ValueError: a part of the outputs cannot be shared evenly.
    """

    def __init__(self, inputs: int, outputs: int, group: TensorGroup = ALONE, parts: int = 1) -> None:
        super().__init__()
        self.group = group
        rows = parts * group.shard_size(outputs // parts, "outputs of a matrix:")
        self.parts = parts
        self.weight = nn.Parameter(torch.empty(rows, inputs))
        self.bias = nn.Parameter(torch.empty(rows))

    def param_layouts(self) -> dict[str, ParamLayout]:
        """Both parameters are sharded along the outputs, each of their parts by itself."""
        layout = ParamLayout((Shard(0, self.group.size, self.group.rank, self.parts),))
        return {"weight": layout, "bias": layout}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map the residual stream to this process's outputs, for all tokens."""
        return F.linear(enter_tensor_region(x, self.group), self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """x @ weight^T + bias, where each process has some of the inputs; takes what a column-parallel layer gives.

    ``weight`` is [O, I / size]. Each process computes a part of the sum; the bias is added once, after it.

    Raises:
        ValueError: the inputs cannot be shared evenly.
    """

    def __init__(self, inputs: int, outputs: int, group: TensorGroup = ALONE) -> None:
        super().__init__()
        self.group = group
        self.weight = nn.Parameter(torch.empty(outputs, group.shard_size(inputs, "inputs of a matrix:")))
        self.bias = nn.Parameter(torch.empty(outputs))

    def param_layouts(self) -> dict[str, ParamLayout]:
        """The weight is sharded along the inputs."""
        return {"weight": ParamLayout((Shard(1, self.group.size, self.group.rank),))}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map this process's inputs [..., S, I / size] to the residual stream."""
        if self.group.size == 1:
            return F.linear(x, self.weight, self.bias)
        bias = sum_gradients(self.group, self.bias)[0] if self.group.sequence_parallel else self.bias
        return leave_tensor_region(F.linear(x, self.weight), self.group) + bias


class VocabParallelEmbedding(nn.Module):
    """A table of vectors of which each process holds a range of rows.

    Raises:
        ValueError: the rows cannot be shared evenly.
    """

    def __init__(self, rows: int, hidden_size: int, group: TensorGroup = ALONE) -> None:
        super().__init__()
        self.group = group
        self.rows = group.shard_size(rows, "a vocabulary of")
        self.weight = nn.Parameter(torch.empty(self.rows, hidden_size))

    def param_layouts(self) -> dict[str, ParamLayout]:
        """The table is sharded along its rows."""
        return {"weight": ParamLayout((Shard(0, self.group.size, self.group.rank),))}

    def forward(self, ids_BS: torch.Tensor) -> torch.Tensor:
        """The vectors of ``ids_BS`` (global numbers), [B, S, H], in the form of the residual stream.

        Raises:
            IndexError: an id outside of the table; on GPUs see :func:`megatron.parallel.vocabulary.check_ids`.
        """
        check_ids(ids_BS, self.rows * self.group.size)
        if self.group.size == 1:
            return F.embedding(ids_BS, self.weight)
        local_BS = ids_BS - self.group.rank * self.rows
        elsewhere_BS = (local_BS < 0) | (local_BS >= self.rows)
        found_BSH = F.embedding(local_BS.masked_fill(elsewhere_BS, 0), self.weight)
        return leave_tensor_region(found_BSH.masked_fill(elsewhere_BS[..., None], 0.0), self.group)

    def logits(self, x_BSH: torch.Tensor) -> torch.Tensor:
        """The residual stream's products with this process's rows, [B, S, V / size], for all tokens."""
        return F.linear(enter_tensor_region(x_BSH, self.group), self.weight)


class Dropout(nn.Dropout):
    """torch's dropout on the residual stream: equal where processes hold the same tokens, different where not."""

    def __init__(self, probability: float, group: TensorGroup = ALONE) -> None:
        super().__init__(probability)
        self.group = group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Zero elements at random in training and scale up the others."""
        if not (self.group.sequence_parallel and self.training and self.p > 0):
            return super().forward(x)
        with own_randomness(self.group, x.device):
            return super().forward(x)
