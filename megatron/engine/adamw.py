"""AdamW as the kernels do it, in plain torch: clip, update moments and fp32 weights, write the model's weights."""

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Rates:
    """What one update does to every weight of a group.

    ``scalars`` is fp32 [3] on the device, so that the host need not know it: what gradients are multiplied by, the
    learning rate over the first moment's bias correction, and the root of the second moment's bias correction. If the
    first is NaN nothing changes: some gradient was not finite.
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
    exp_avg: torch.Tensor  # moments, fp32 or bf16; bf16 ones are rounded to nearest
    exp_avg_sq: torch.Tensor
    weight: torch.Tensor  # bf16; gets the new weights


def update(piece: Piece, rates: Rates) -> None:
    """One AdamW update in place (Loshchilov and Hutter 2019), in plain torch; waits for the device."""
    factor, step_size, root = rates.scalars.tolist()
    if factor != factor:
        return
    master, g = piece.master, piece.gradient.to(piece.master.dtype) * factor
    m = piece.exp_avg.to(master.dtype).lerp_(g, 1 - rates.beta1)  # in place if it is fp32 already
    v = piece.exp_avg_sq.to(master.dtype).mul_(rates.beta2).addcmul_(g, g, value=1 - rates.beta2)
    master.mul_(1 - rates.lr * rates.weight_decay).addcdiv_(m, (v.sqrt() / root).add_(rates.eps), value=-step_size)
    piece.exp_avg.copy_(m)
    piece.exp_avg_sq.copy_(v)
    piece.weight.copy_(master)


def square_sum(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The sum of the squares of all elements, a float64 scalar."""
    norms = torch._foreach_norm(tensors, 2, dtype=torch.float32)
    return torch.stack(norms).double().square().sum()
