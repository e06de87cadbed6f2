"""AdamW, and its update of bf16 models in plain torch: clip, update moments and fp32 weights, write bf16 weights.

The kernel that does the same in one pass is :mod:`megatron.engine.kernels.adamw`.

bf16 moments are rounded up or down at random, with chances that make the mean right. Rounded to nearest, one with a
slow decay could not fall: half the distance to the next number is a 512th to a 256th of a bf16 number, and with beta
0.999 a moment falls by a 1000th. From beta 0.9981 on it would stay where it is for ever, from 0.9961 on at some
numbers, and with lower ones stop within a 256th / (1 - beta) of what it should be: 8% with 0.95, 4% with 0.9.

The random bits are a hash of the weight, before its update, and of the number of the update. So they need no state, and
are the same on all processes that hold a copy of a weight, in any layout, and in a resumed run.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch

from megatron.config import OptimizerConfig
from megatron.engine.optim.base import ParameterSlice, ShardedOptimizer
from megatron.moe.kernels import usable
from megatron.moe.order import mix

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SPREAD = 0x9E3779B9  # makes keys of consecutive updates differ in many bits


@dataclasses.dataclass(frozen=True)
class Rates:
    """What one update does to every weight of a group.

    ``scalars`` is fp32 [4] on the device, so that the host need not know it: what gradients are multiplied by, the
    learning rate over the first moment's bias correction, the root of the second moment's bias correction, and the
    number of the update. If the first is NaN nothing changes: some gradient was not finite.
    """

    scalars: torch.Tensor
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


class AdamW(ShardedOptimizer, torch.optim.AdamW):
    """torch's fused AdamW; for bf16 models an update of its own, whose moments are fp32 or bf16.

    Args:
        groups: as :class:`torch.optim.AdamW` takes them.
        dtypes: of the moments, by name.
        options: of :class:`torch.optim.AdamW`.
    """

    states: ClassVar[Mapping[str, int]] = {"exp_avg": 1, "exp_avg_sq": 2}
    updates_slices = True

    def __init__(self, groups: Sequence[dict[str, Any]], dtypes: Mapping[str, torch.dtype], **options: Any) -> None:
        super().__init__(groups, **options)
        self._dtypes = dtypes
        self._update: Callable[[ParameterSlice, Rates], None] = update

    @classmethod
    def from_config(cls, groups: Sequence[dict[str, Any]], config: OptimizerConfig, compiled: bool) -> "AdamW":
        """See :meth:`ShardedOptimizer.from_config`; nothing is compiled."""
        dtypes = {name: DTYPES[kind] for name, kind in _state_dtypes(config).items()}
        return cls(
            groups, dtypes, lr=0.0, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_eps, fused=True
        )

    @classmethod
    def state_bytes(cls, config: OptimizerConfig) -> float:
        """Bytes of both moments for each weight, in memory."""
        return cls.checkpoint_bytes(config)

    @classmethod
    def checkpoint_bytes(cls, config: OptimizerConfig) -> int:
        """Bytes of both moments for each weight, in a checkpoint: in the same number formats."""
        return sum(DTYPES[kind].itemsize for kind in _state_dtypes(config).values())

    def init_state(self) -> None:
        """Make the moments, and choose what updates slices on their device."""
        super().init_state()
        if usable(self.param_groups[0]["params"][0]):
            from megatron.engine.kernels import adamw as kernel

            self._update = kernel.update

    def new_state(self, shard: torch.Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        """``step`` and both moments, in the number formats of the run."""
        step = torch.zeros((), dtype=torch.float32, device=shard.device)
        return {"step": step} | {name: torch.zeros_like(shard, dtype=kind) for name, kind in self._dtypes.items()}

    def update_slices(
        self, group: Mapping[str, Any], slices: Iterable[ParameterSlice], factor: torch.Tensor, finite: torch.Tensor
    ) -> None:
        """See :meth:`ShardedOptimizer.update_slices`."""
        (shard,) = group["params"]
        step = self.state[shard]["step"]
        step += finite
        rates = _rates(group, factor, step)
        for slice_ in slices:
            self._update(slice_, rates)


def _state_dtypes(config: OptimizerConfig) -> dict[str, str]:
    return {"exp_avg": config.exp_avg_dtype, "exp_avg_sq": config.exp_avg_sq_dtype}


def _rates(group: Mapping[str, Any], factor: torch.Tensor, step: torch.Tensor) -> Rates:
    lr, (beta1, beta2) = group["lr"], group["betas"]
    step = step.double()
    scalars = torch.stack([factor, lr / (1 - beta1**step), (1 - beta2**step).sqrt(), step]).float()
    return Rates(scalars, lr, beta1, beta2, group["eps"], group["weight_decay"])


def update(slice_: ParameterSlice, rates: Rates) -> None:
    """One AdamW update in place (Loshchilov and Hutter 2019), in plain torch; waits for the device.

    Moments (``exp_avg`` and ``exp_avg_sq``) are fp32 or bf16; bf16 ones are rounded stochastically.
    """
    exp_avg, exp_avg_sq = slice_.states["exp_avg"], slice_.states["exp_avg_sq"]
    factor, step_size, root, step = rates.scalars.tolist()
    if factor != factor:
        return
    random = torch.zeros((), dtype=torch.int64, device=slice_.master.device)
    if torch.bfloat16 in (exp_avg.dtype, exp_avg_sq.dtype):
        random = random_bits(slice_.master, int(step))
    master, g = slice_.master, slice_.gradient.to(slice_.master.dtype) * factor
    m = exp_avg.to(master.dtype).lerp_(g, 1 - rates.beta1)  # in place if it is fp32 already
    v = exp_avg_sq.to(master.dtype).mul_(rates.beta2).addcmul_(g, g, value=1 - rates.beta2)
    master.mul_(1 - rates.lr * rates.weight_decay).addcdiv_(m, (v.sqrt() / root).add_(rates.eps), value=-step_size)
    for moment, exact, shift in ((exp_avg, m, 16), (exp_avg_sq, v, 0)):
        moment.copy_(round_to_bf16(exact, random >> shift) if moment.dtype == torch.bfloat16 else exact)
    slice_.weight.copy_(master)


def random_bits(master: torch.Tensor, step: int) -> torch.Tensor:
    """32 random bits for each fp32 weight and an update's number, in int64."""
    key = torch.tensor(step * SPREAD & 0xFFFFFFFF, dtype=torch.int64, device=master.device)
    return mix(master.view(torch.int32).long(), key)


def round_to_bf16(x: torch.Tensor, random: torch.Tensor) -> torch.Tensor:
    """Round fp32 ``x`` up or down to a bf16 number at random, so that the mean is ``x`` (stochastic rounding).

    Args:
        random: integers of which the lowest 16 bits are random.

    Returns:
        fp32 numbers that bf16 can hold.
    """
    bits = x.view(torch.int32) + (random & 0xFFFF).int()  # carries into the upper half as often as it should
    return (bits & -0x10000).view(torch.float32)
