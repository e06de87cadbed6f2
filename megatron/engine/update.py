"""From a bf16 model's gradients to its new weights, in as few passes over memory as there can be.

DeepSpeed lays out the flat bf16 weights, fp32 weights and fp32 gradients of each optimizer group (its BF16_Optimizer,
ZeRO-1); what it does with them takes about 60 bytes a weight, of which AdamW needs 30. For a GPU with many experts
whatever passes over every weight counts, so the following takes the place of the rest:

1. A micro-batch's gradient goes into the fp32 sum in one pass. If there is only one micro-batch, and no other process
   has the same weights, it stays where it is, in bf16, and there is no sum.
2. Sums are reduce-scattered, for each process needs its piece alone.
3. The norm is one number for the whole world, on the device: every process adds the squares of its pieces.
4. One kernel clips, updates moments and fp32 weights, and writes bf16 weights; if the norm is not finite it does
   nothing. The host waits for nothing, and reads the norm when it wants to.
5. The new weights are gathered.
"""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import nn

from megatron.config import OptimizerConfig
from megatron.engine import adamw
from megatron.engine.deepspeed_internals import is_tied_replica
from megatron.moe.kernels import usable
from megatron.parallel.initialize import Topology
from megatron.parallel.sharding import shards_of

MANY = 1 << 16  # elements of a group's mean parameter above which its gradients are worth a kernel each


class Group:
    """One of the optimizer's groups, and this process's piece of it."""

    def __init__(self, optimizer: BF16_Optimizer, number: int, tensor_rank: int) -> None:
        self.options = optimizer.optimizer.param_groups[number]
        self.parameters: list[nn.Parameter] = optimizer.bf16_groups[number]
        self.peers: dist.ProcessGroup = optimizer.real_dp_process_group[number]
        self.size, rank = dist.get_world_size(self.peers), dist.get_rank(self.peers)
        self.flat: torch.Tensor = optimizer.fp32_groups_flat_partition[number]  # what the optimizer updates
        self.master = self.flat.detach()
        self.state = optimizer.optimizer.state[self.flat]
        self.weights = _forget_history(optimizer, number)
        self.sums: torch.Tensor = optimizer.fp32_groups_gradients_flat[number]
        self.sums_of: list[torch.Tensor] = optimizer.fp32_groups_gradients[number]
        self.piece = slice(rank * self.master.numel(), (rank + 1) * self.master.numel())
        self.begins, begin = [], 0
        for parameter in self.parameters:
            self.begins.append(begin)
            begin += parameter.numel()
        self.counts = [not is_tied_replica(p) and (tensor_rank == 0 or _differs(p)) for p in self.parameters]
        self.padding = begin  # the elements from here on belong to no parameter
        self.large = begin >= MANY * len(self.parameters)
        self.direct = False
        self.taken = [False] * len(self.parameters)  # has this update's gradient been seen?
        self.sums.untyped_storage().resize_(0)  # until there is a sum

    def prepare(self, direct: bool) -> None:
        """Get ready for an update; ``direct``: of one micro-batch, whose gradients need not be added to anything."""
        self.direct = direct and self.large and self.size == 1
        self.taken = [False] * len(self.parameters)
        if not self.direct and self.sums.untyped_storage().size() == 0:
            self.sums.untyped_storage().resize_(self.sums.numel() * self.sums.element_size())
            self.sums[self.padding :].zero_()

    def take(self, number: int) -> None:
        """A micro-batch's gradient of a parameter is there."""
        parameter = self.parameters[number]
        if self.direct or parameter.grad is None:
            return
        sum_ = self.sums_of[number]
        new = parameter.grad.view(sum_.shape)
        if self.taken[number]:
            sum_.add_(new)
        else:
            sum_.copy_(new)
        parameter._hp_grad, self.taken[number] = sum_, True  # the pipeline adds up tied parameters by this name
        parameter.grad = None

    def reduce(self, dtype: torch.dtype) -> None:
        """Add up the piece's gradients over the processes that have the same weights."""
        if self.direct:
            return
        for sum_, taken in zip(self.sums_of, self.taken, strict=True):
            if not taken:  # what stands there is of an earlier update
                sum_.zero_()
        if self.size > 1:
            whole = self.sums.to(dtype)
            mine = whole[self.piece]
            dist.reduce_scatter_tensor(mine, whole, group=self.peers)
            if dtype != self.sums.dtype:
                self.sums[self.piece].copy_(mine)

    def counted(self) -> Iterator[torch.Tensor]:
        """The gradients of this process's piece that count in the norm; all processes' are every gradient once."""
        if self.direct:
            known = zip(self.parameters, self.counts, strict=True)
            yield from (p.grad.contiguous() for p, counts in known if counts and p.grad is not None)
            return
        begin = end = self.piece.start  # of a stretch of parameters that count
        for parameter, start, counts in zip(self.parameters, self.begins, self.counts, strict=True):
            first = min(max(start, self.piece.start), self.piece.stop)
            last = min(max(start + parameter.numel(), self.piece.start), self.piece.stop)
            if not counts:
                continue
            if first > end:
                yield self.sums[begin:end]
                begin = first
            end = max(end, last)
        yield self.sums[begin:end]

    def pieces(self) -> Iterator[adamw.Piece]:
        """All weights of this process's piece with their gradients."""
        moments = self.state["exp_avg"], self.state["exp_avg_sq"]
        if not self.direct:
            yield adamw.Piece(self.master, self.sums[self.piece], *moments, self.weights[self.piece])
            return
        for parameter, start in zip(self.parameters, self.begins, strict=True):
            at = slice(start, start + parameter.numel())
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.contiguous()
            yield adamw.Piece(self.master[at], gradient.view(-1), *(m[at] for m in moments), self.weights[at])


class Update:
    """Takes over from DeepSpeed's optimizer of bf16.

    Args:
        optimizer: its ``step`` and what leads to it are replaced.
        config: clipping, and in what format gradients are added up over processes.
        topology: of this process.
    """

    def __init__(self, optimizer: BF16_Optimizer, config: OptimizerConfig, topology: Topology) -> None:
        self._groups = [
            Group(optimizer, number, topology.tensor_parallel_rank) for number in range(len(optimizer.bf16_groups))
        ]
        self._clip = config.clip_grad or float("inf")
        self._reduced = torch.bfloat16 if config.grad_reduce_in_bf16 else torch.float32
        self._shares = topology.data_parallel_size  # gradients are means over these, sums until the update
        self._one_stage = topology.pipeline_parallel_size == 1
        self.norm = torch.zeros((), device=topology.device)
        self._adam = None if type(optimizer.optimizer) is torch.optim.AdamW else optimizer.optimizer
        if usable(self._groups[0].master):
            from megatron.engine.kernels.adamw import square_sum, update

            self._square_sum, self._update = square_sum, update
        else:
            self._square_sum, self._update = adamw.square_sum, adamw.update
        for group in self._groups:
            for number, parameter in enumerate(group.parameters):
                parameter.register_post_accumulate_grad_hook(_taker(group, number))
        optimizer.step = self.step
        optimizer.get_grads_for_reduction = lambda: ([], {})
        for unneeded in ("update_hp_grads", "clear_hp_grads", "clear_lp_grads"):
            setattr(optimizer, unneeded, lambda *_, **__: None)

    def begin(self, micro_batches: int) -> None:
        """Get ready for the gradients of so many micro-batches."""
        for group in self._groups:
            group.prepare(direct=micro_batches == 1 and self._one_stage and self._adam is None)

    @torch.no_grad()
    def step(self) -> None:
        """The update. ``norm`` is the gradients' afterwards, before clipping; not finite: nothing has changed."""
        for group in self._groups:
            group.reduce(self._reduced)
        counted = [gradient for group in self._groups for gradient in group.counted()]
        squares = self._square_sum(counted) if counted else self.norm.new_zeros((), dtype=torch.float64)
        dist.all_reduce(squares)
        self.norm = squares.sqrt() / self._shares
        done = self.norm.isfinite()
        factor = (self._clip / (self.norm + 1e-6)).clamp(max=1.0) / self._shares
        factor = factor.where(done, torch.nan)
        if self._adam is not None:
            self._leave_to(self._adam, factor)
        for group in self._groups:
            if self._adam is None:
                group.state["step"] += done
                rates = _rates(group.options, factor, group.state["step"])
                for piece in group.pieces():
                    self._update(piece, rates)
            if group.size > 1:
                dist.all_gather_into_tensor(group.weights, group.weights[group.piece], group=group.peers)
            for parameter in group.parameters:
                parameter.grad = None

    def _leave_to(self, adam: torch.optim.Optimizer, factor: torch.Tensor) -> None:
        """Step 4 with an optimizer that has a way of its own."""
        if factor.isnan():
            return
        for group in self._groups:
            group.flat.grad = group.sums[group.piece].mul_(factor)
        adam.step()
        for group in self._groups:
            group.flat.grad = None
            group.weights[group.piece].copy_(group.master)


def _rates(options: dict, factor: torch.Tensor, step: torch.Tensor) -> adamw.Rates:
    lr, (beta1, beta2) = options["lr"], options["betas"]
    step = step.double()
    scalars = torch.stack([factor, lr / (1 - beta1**step), (1 - beta2**step).sqrt(), step]).float()
    return adamw.Rates(scalars, lr, beta1, beta2, options["eps"], options["weight_decay"])


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


def _differs(parameter: nn.Parameter) -> bool:
    """Whether tensor-parallel processes have different pieces: a shard's, or what ZeRO-1 gives each of an expert."""
    return bool(shards_of(parameter)) or getattr(parameter, "is_expert", False)


def _taker(group: Group, number: int) -> Callable[[nn.Parameter], None]:
    def take(_: nn.Parameter) -> None:
        with torch.no_grad():
            group.take(number)

    return take
