"""AdamW as the kernels do it, in plain torch: clip, update moments and fp32 weights, write the model's weights.

bf16 moments are rounded up or down at random, with chances that make the mean right. Rounded to nearest, one with a
slow decay could not fall: half the distance to the next number is a 512th to a 256th of a bf16 number, and with beta
0.999 a moment falls by a 1000th. From beta 0.9981 on it would stay where it is for ever, from 0.9961 on at some
numbers, and with lower ones stop within a 256th / (1 - beta) of what it should be: 8% with 0.95, 4% with 0.9.

The random bits are a hash of the weight, before its update, and of the number of the update. So they need no state, and
are the same on all processes that hold a copy of a weight, in any layout, and in a resumed run.
"""

import dataclasses

import torch

from megatron.moe.order import mix

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


@dataclasses.dataclass(frozen=True)
class Piece:
    """A stretch of weights with all that belongs to it: contiguous tensors with equally many elements."""

    master: torch.Tensor  # fp32
    gradient: torch.Tensor  # fp32 or bf16
    exp_avg: torch.Tensor  # moments, fp32 or bf16; bf16 ones are rounded stochastically
    exp_avg_sq: torch.Tensor
    weight: torch.Tensor  # bf16; gets the new weights


def update(piece: Piece, rates: Rates) -> None:
    """One AdamW update in place (Loshchilov and Hutter 2019), in plain torch; waits for the device."""
    factor, step_size, root, step = rates.scalars.tolist()
    if factor != factor:
        return
    random = None
    if torch.bfloat16 in (piece.exp_avg.dtype, piece.exp_avg_sq.dtype):
        random = random_bits(piece.master, int(step))
    master, g = piece.master, piece.gradient.to(piece.master.dtype) * factor
    m = piece.exp_avg.to(master.dtype).lerp_(g, 1 - rates.beta1)  # in place if it is fp32 already
    v = piece.exp_avg_sq.to(master.dtype).mul_(rates.beta2).addcmul_(g, g, value=1 - rates.beta2)
    master.mul_(1 - rates.lr * rates.weight_decay).addcdiv_(m, (v.sqrt() / root).add_(rates.eps), value=-step_size)
    for moment, exact, shift in ((piece.exp_avg, m, 16), (piece.exp_avg_sq, v, 0)):
        moment.copy_(round_to_bf16(exact, random >> shift) if moment.dtype == torch.bfloat16 else exact)
    piece.weight.copy_(master)


def random_bits(master: torch.Tensor, step: int) -> torch.Tensor:
    """32 random bits for each fp32 weight and an update's number, in int64."""
    return mix(master.view(torch.int32).long(), step * SPREAD & 0xFFFFFFFF)


def round_to_bf16(x: torch.Tensor, random: torch.Tensor) -> torch.Tensor:
    """Round fp32 ``x`` up or down to a bf16 number at random, so that the mean is ``x`` (stochastic rounding).

    Args:
        random: integers of which the lowest 16 bits are random.

    Returns:
        fp32 numbers that bf16 can hold.
    """
    bits = x.view(torch.int32) + (random & 0xFFFF).int()  # carries into the upper half as often as it should
    return (bits & -0x10000).view(torch.float32)


def square_sum(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The sum of the squares of all elements, a float64 scalar."""
    norms = torch._foreach_norm(tensors, 2, dtype=torch.float32)
    return torch.stack(norms).double().square().sum()
