"""The update of a bf16 model, from its gradients to its new weights, in as few passes over memory as possible.

DeepSpeed lays out the flat bf16 weights, fp32 weights and fp32 gradients of each parameter group (its BF16_Optimizer,
ZeRO-1). Its own update moves about 60 bytes a weight, of which AdamW needs 30. On a GPU with many experts every pass
over all weights is felt, so this takes its place:

1. A micro-batch's gradient is added to the fp32 sum in one pass. With a single micro-batch, and no other process that
   has the same weights, it stays where it is, in bf16, and there is no sum.
2. Sums are reduce-scattered: each process needs its shard only.
3. The norm is one number for all processes, on the device: each adds the squares of its shards.
4. The optimizer clips, updates its states and fp32 weights, and writes bf16 weights, in one kernel where it has one; if
   the norm is not finite nothing changes. The host does not wait, and reads the norm when it wants to.
5. The new weights are all-gathered.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import nn

from megatron.config import OptimizerConfig
from megatron.engine.deepspeed_internals import is_tied_replica
from megatron.engine.optim.base import ParameterSlice, ShardedOptimizer
from megatron.moe.kernels import usable
from megatron.parallel.initialize import Topology
from megatron.parallel.sharding import ParamLayout

HP_GRAD = "_hp_grad"  # DeepSpeed's pipeline adds up gradients of tied parameters under this name
MANY = 1 << 16  # elements of a group's mean parameter above which its gradients are worth a kernel each


class ParameterGroup:
    """One of the optimizer's parameter groups, and this process's shard of it."""

    def __init__(
        self, optimizer: BF16_Optimizer, number: int, layouts: Mapping[nn.Parameter, ParamLayout], tensor_rank: int
    ) -> None:
        self.options = optimizer.optimizer.param_groups[number]
        self.parameters: list[nn.Parameter] = optimizer.bf16_groups[number]
        peers: Any = optimizer.real_dp_process_group[number]
        self.peers: dist.ProcessGroup = peers
        self.size, rank = dist.get_world_size(self.peers), dist.get_rank(self.peers)
        self.flat: torch.Tensor = optimizer.fp32_groups_flat_partition[number]  # what the optimizer updates
        self.master = self.flat.detach()
        self.state = optimizer.optimizer.state[self.flat]
        self.weights = _forget_history(optimizer, number)
        self.sums: torch.Tensor = optimizer.fp32_groups_gradients_flat[number]
        self.sums_of: list[torch.Tensor] = optimizer.fp32_groups_gradients[number]
        self.shard = slice(rank * self.master.numel(), (rank + 1) * self.master.numel())
        self.begins, begin = [], 0
        for parameter in self.parameters:
            self.begins.append(begin)
            begin += parameter.numel()
        self.counts = [
            not is_tied_replica(p) and (tensor_rank == 0 or layouts[p].model_parallel) for p in self.parameters
        ]
        self.padding = begin  # the elements from here on belong to no parameter
        self.large = begin >= MANY * len(self.parameters)
        self.direct = False
        self.accumulated = [False] * len(self.parameters)  # is there a gradient of this update?
        self.sums.untyped_storage().resize_(0)  # until there is a sum

    def prepare(self, direct: bool) -> None:
        """Get ready for an update; with ``direct`` it has one micro-batch, whose gradients need no sum."""
        self.direct = direct and self.large and self.size == 1
        self.accumulated = [False] * len(self.parameters)
        if not self.direct and self.sums.untyped_storage().size() == 0:
            self.sums.untyped_storage().resize_(self.sums.numel() * self.sums.element_size())
            self.sums[self.padding :].zero_()

    def accumulate(self, number: int) -> None:
        """Add a micro-batch's gradient of a parameter, which the backward pass has just made, to its sum."""
        parameter = self.parameters[number]
        if self.direct or parameter.grad is None:
            return
        sum_ = self.sums_of[number]
        new = parameter.grad.view(sum_.shape)
        if self.accumulated[number]:
            sum_.add_(new)
        else:
            sum_.copy_(new)
        setattr(parameter, HP_GRAD, sum_)
        self.accumulated[number] = True
        parameter.grad = None

    def reduce(self, dtype: torch.dtype) -> None:
        """Add up the shard's gradients over the processes that have the same weights."""
        if self.direct:
            return
        for sum_, accumulated in zip(self.sums_of, self.accumulated, strict=True):
            if not accumulated:  # it holds an earlier update's
                sum_.zero_()
        if self.size > 1:
            whole = self.sums.to(dtype)
            mine = whole[self.shard]
            dist.reduce_scatter_tensor(mine, whole, group=self.peers)
            if dtype != self.sums.dtype:
                self.sums[self.shard].copy_(mine)

    def counted(self, among: Collection[nn.Parameter] | None = None) -> Iterator[torch.Tensor]:
        """The gradients of this process's shard, of some parameters or all, that count in the norm; over all processes
        each counts once."""
        counts_of = self.counts
        if among is not None:
            counts_of = [counts and p in among for p, counts in zip(self.parameters, self.counts, strict=True)]
        if self.direct:
            known = zip(self.parameters, counts_of, strict=True)
            yield from (p.grad.contiguous() for p, counts in known if counts and p.grad is not None)
            return
        begin = end = self.shard.start  # of consecutive parameters that count
        for parameter, start, counts in zip(self.parameters, self.begins, counts_of, strict=True):
            first = min(max(start, self.shard.start), self.shard.stop)
            last = min(max(start + parameter.numel(), self.shard.start), self.shard.stop)
            if not counts:
                continue
            if first > end:
                yield self.sums[begin:end]
                begin = first
            end = max(end, last)
        yield self.sums[begin:end]

    def slices(self, names: Iterable[str]) -> Iterator[ParameterSlice]:
        """All weights of this process's shard with their gradients and the optimizer's states of these names."""
        states: dict[str, torch.Tensor] = {name: self.state[name] for name in names}
        if not self.direct:
            yield ParameterSlice(self.master, self.sums[self.shard], self.weights[self.shard], states)
            return
        for parameter, start in zip(self.parameters, self.begins, strict=True):
            at = slice(start, start + parameter.numel())
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.contiguous()
            states_here = {name: state[at] for name, state in states.items()}
            yield ParameterSlice(self.master[at], gradient.view(-1), self.weights[at], states_here)


class BF16Update:
    """Takes over from DeepSpeed's BF16_Optimizer.

    Args:
        optimizer: its ``step`` and what leads to it are replaced.
        layouts: of all parameters that it updates.
        config: clipping, and in what format gradients are added up over processes.
        topology: of this process.

    Attributes:
        norm: of the last update's gradient, before clipping.
        on_reduced: called in each update when gradients are reduced, and weights are as before.
    """

    def __init__(
        self,
        optimizer: BF16_Optimizer,
        layouts: Mapping[nn.Parameter, ParamLayout],
        config: OptimizerConfig,
        topology: Topology,
    ) -> None:
        rank, groups = topology.tensor_parallel_rank, range(len(optimizer.bf16_groups))
        self._groups = [ParameterGroup(optimizer, number, layouts, rank) for number in groups]
        self._clip = config.clip_grad or float("inf")
        self._reduced = torch.bfloat16 if config.grad_reduce_in_bf16 else torch.float32
        self._shares = topology.data_parallel_size  # gradients are means over these, sums until the update
        self._one_stage = topology.pipeline_parallel_size == 1
        self.norm = torch.zeros((), device=topology.device)
        self.on_reduced: Callable[[], None] = lambda: None
        self._optimizer: ShardedOptimizer = optimizer.optimizer
        self._square_sum = square_sum
        if usable(self._groups[0].master):
            from megatron.engine.kernels import adamw as kernels

            self._square_sum = kernels.square_sum
        for group in self._groups:
            for number, parameter in enumerate(group.parameters):
                parameter.register_post_accumulate_grad_hook(_accumulator(group, number))
        replaced = {"step": self.step, "get_grads_for_reduction": lambda: ([], {})}
        unneeded = ("update_hp_grads", "clear_hp_grads", "clear_lp_grads")
        for name, method in (replaced | dict.fromkeys(unneeded, lambda *_, **__: None)).items():
            setattr(optimizer, name, method)

    def begin(self, micro_batches: int) -> None:
        """Get ready for the gradients of so many micro-batches."""
        direct = micro_batches == 1 and self._one_stage and self._optimizer.updates_slices
        for group in self._groups:
            group.prepare(direct)

    @torch.no_grad()
    def step(self) -> None:
        """The update. ``norm`` is the gradients' afterwards, before clipping; not finite: nothing has changed."""
        for group in self._groups:
            group.reduce(self._reduced)
        self.on_reduced()
        squares = self._squares(None)
        dist.all_reduce(squares)
        self.norm = squares.sqrt() / self._shares
        finite = self.norm.isfinite()
        factor = (self._clip / (self.norm + 1e-6)).clamp(max=1.0) / self._shares
        factor = factor.where(finite, torch.nan)
        if not self._optimizer.updates_slices:
            self._step(factor)
        for group in self._groups:
            if self._optimizer.updates_slices:
                slices = group.slices(self._optimizer.states)
                self._optimizer.update_slices(group.options, slices, factor, finite)
            if group.size > 1:
                dist.all_gather_into_tensor(group.weights, group.weights[group.shard], group=group.peers)
            for parameter in group.parameters:
                parameter.grad = None

    def squares_of(self, parameters: Collection[nn.Parameter]) -> torch.Tensor:
        """This process's part of the squared gradient norm of ``parameters``; to be called by ``on_reduced``."""
        return self._squares(parameters) / self._shares**2

    def _squares(self, parameters: Collection[nn.Parameter] | None) -> torch.Tensor:
        """The sum of squares of this process's shards of gradients, of some parameters or all, a float64 scalar."""
        counted = [gradient for group in self._groups for gradient in group.counted(parameters)]
        return self._square_sum(counted) if counted else self.norm.new_zeros((), dtype=torch.float64)

    def _step(self, factor: torch.Tensor) -> None:
        """The optimizer's ``step()``, for one that does not update slices; waits for the device."""
        if factor.isnan():
            return
        for group in self._groups:
            group.flat.grad = group.sums[group.shard].mul_(factor)
        self._optimizer.step()
        for group in self._groups:
            group.flat.grad = None
            group.weights[group.shard].copy_(group.master)


def _forget_history(optimizer: BF16_Optimizer, number: int) -> torch.Tensor:
    """A group's flat bf16 weights, as a tensor that autograd knows nothing of.

    DeepSpeed concatenates and cuts parameters in sight of autograd, which keeps the node of each parameter's gradient
    alive, with the stream on which it was made. A backward pass on another stream, such as one that a CUDA graph is
    recorded on, would then have to wait for that stream.
    """
    for parameter in optimizer.bf16_groups[number]:
        if parameter._hp_mapping is not None:
            parameter._hp_mapping.lp_fragment = parameter._hp_mapping.lp_fragment.detach()
    optimizer.bf16_groups_flat[number] = optimizer.bf16_groups_flat[number].detach()
    optimizer.bf16_partitioned_groups[number] = [p.detach() for p in optimizer.bf16_partitioned_groups[number]]
    return optimizer.bf16_groups_flat[number]


def square_sum(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The sum of the squares of all elements, a float64 scalar."""
    norms = [torch.linalg.vector_norm(x, dtype=torch.float32) for x in tensors]
    return torch.stack(norms).double().square().sum()


def _accumulator(group: ParameterGroup, number: int) -> Callable[[nn.Parameter], None]:
    def accumulate(_: nn.Parameter) -> None:
        with torch.no_grad():
            group.accumulate(number)

    return accumulate
