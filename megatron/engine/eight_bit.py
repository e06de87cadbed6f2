"""AdamW with moments of 8 bits a number, for the flat fp32 pieces that ZeRO gives to an optimizer.

The arithmetic and the number format are torchao's (``torchao.optim.AdamW8bit``): blocks of 256 numbers share an fp32
scale, the largest absolute value among them, and each number is one of 256 levels that are dense around zero (Dettmers
et al., 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861). The update itself is computed in fp32. A second
moment below 1.6e-7 of the largest in its block becomes zero, the first one only below 2.8e-7 of its largest.

A flat piece is cut into chunks, so that what an update needs beside its result does not grow with the model, and one
compilation serves all chunks of a size. Moments are read and filled in stretches: a checkpoint holds them in fp32.
"""

import bisect
import contextlib
import functools
import itertools
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from megatron.checkpoint import Box, Deferred

logger = logging.getLogger(__name__)

BLOCK = 256  # numbers that share a scale
FEWEST = 4096  # a piece of fewer numbers keeps fp32 moments: torchao's rule too
TOO_LARGE = 0.01  # of a block's largest moment: smaller ones that cannot fall are worth a warning
COMPILED_CHUNK, EAGER_CHUNK = (
    2**26,
    2**22,
)  # numbers an update handles at once: eagerly it needs about 60 bytes for each
PART = 2**22  # numbers that are decoded or encoded at once


def _torchao() -> tuple[Any, Any]:
    """torchao's AdamW8bit and its 8-bit tensor, without remarks on operators and a cache that nothing here uses."""
    warnings.filterwarnings("ignore", message="OptimState8bit does not implement _stable_hash_for_caching")
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [theirs.level for theirs in loggers]
    for theirs in loggers:
        theirs.setLevel(logging.ERROR)
    try:
        from torchao.optim import AdamW8bit as TorchaoAdamW8bit
        from torchao.optim.subclass_8bit import OptimState8bit
    finally:
        for theirs, level in zip(loggers, levels, strict=True):
            theirs.setLevel(level)
    return TorchaoAdamW8bit, OptimState8bit


def cannot_fall(beta: float, signed: bool) -> float:
    """Moments below which share of the largest one in their block stay as they are, however small gradients become.

    A moment falls to beta times its level, and is rounded to the nearest one: if (1 - beta) times the level is less
    than half the distance to the next lower one, it is where it was. (If the block's largest number falls, all others
    fall with it, for levels are relative to that.)

    Args:
        beta: decay of the moment.
        signed: the first moment; the second one has all levels above 0, and so finer ones.
    """
    _, state_8bit = _torchao()
    levels = state_8bit.zeros((BLOCK,), signed, BLOCK, "cpu", torch.float32).qmap.double()
    levels = levels[levels >= 0].sort().values
    lower, level = levels[:-1], levels[1:]
    stays = (1 - beta) * level < (level - lower) / 2
    return float(level[int(stays.int().cumprod(0).sum()) - 1]) if stays[0] else 0.0


def warn_of_slow_decay(betas: tuple[float, float]) -> None:
    """Log a warning if 8-bit moments of these betas are far from fp32 ones."""
    shares = [(f"--adam-beta{number} {beta}", cannot_fall(beta, number == 1)) for number, beta in enumerate(betas, 1)]
    slow = [f"{share:.2g} with {flag}" for flag, share in shares if share > TOO_LARGE]
    if slow:
        logger.warning(
            "--optimizer adamw8bit: moments below this share of the largest one in their block of %d cannot fall: %s."
            " Weights whose gradients have become small then take steps of a wrong size; use betas of 0.9 and 0.95, or"
            " --optimizer adamw with --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16",
            BLOCK,
            "; ".join(slow),
        )


class Stretch:
    """Consecutive numbers of a :class:`Moment`, which stand there encoded."""

    dtype = torch.float32  # once decoded

    def __init__(self, moment: "Moment", start: int, numel: int) -> None:
        self._moment, self._start, self._numel = moment, start, numel

    def numel(self) -> int:
        """How many there are."""
        return self._numel

    def boxes(self, cut: Callable[[torch.Tensor], list[Box]]) -> list[Box]:
        """The boxes that ``cut`` makes of these numbers in one dimension, each decoded when it is written."""
        outline = torch.empty(self._numel, device="meta")
        return [
            Box(offsets, Deferred(part.shape, part.dtype, functools.partial(self._read, part)))
            for offsets, part in cut(outline)
        ]

    def _read(self, part: torch.Tensor) -> torch.Tensor:
        first = part.storage_offset()
        span = 1 + sum((size - 1) * stride for size, stride in zip(part.shape, part.stride(), strict=True))
        return self._moment.decode(self._start + first, span).as_strided(part.shape, part.stride())

    def to_fill(self) -> torch.Tensor:
        """fp32 numbers in CPU memory in place of these, until :meth:`AdamW8bit.take_filled` encodes them."""
        return self._moment.to_fill().narrow(0, self._start, self._numel)


class Moment:
    """A moment of a flat piece, one chunk after another: 8-bit ones of whole blocks, then fp32 for the rest."""

    def __init__(self, chunks: list[torch.Tensor]) -> None:
        self.chunks = chunks
        *self._begins, self.numel = itertools.accumulate((chunk.numel() for chunk in chunks), initial=0)
        self._filled: torch.Tensor | None = None

    def narrow(self, dim: int, start: int, numel: int) -> Stretch:
        """As :meth:`torch.Tensor.narrow` of the whole moment; it has one dimension, 0."""
        if dim != 0:
            raise ValueError(f"dimension {dim}, but a moment has one dimension only; use 0")
        self._check(start, numel)
        return Stretch(self, start, numel)

    def _check(self, start: int, numel: int) -> None:
        if not 0 <= start <= start + numel <= self.numel:
            raise ValueError(f"numbers [{start}, {start + numel}) are not among the moment's {self.numel} numbers")

    def decode(self, start: int, numel: int) -> torch.Tensor:
        """``numel`` numbers from ``start`` on, in fp32, on the moment's device."""
        self._check(start, numel)
        out = torch.empty(numel, device=self.chunks[0].device)
        for at, blocks, skipped, count in self._parts(start, start + numel):
            numbers = blocks if type(blocks) is torch.Tensor else blocks.dequantize()
            out[at - start : at - start + count] = numbers[skipped : skipped + count]
        return out

    def to_fill(self) -> torch.Tensor:
        """The whole moment as fp32 zeros in CPU memory, for :meth:`take_filled`."""
        if self._filled is None:
            self._filled = torch.zeros(self.numel)
        return self._filled

    @torch.no_grad()
    def take_filled(self) -> None:
        """Encode what was filled in since :meth:`to_fill`, and give its memory back."""
        if self._filled is None:
            return
        for at, blocks, _, count in self._parts(0, self.numel):
            blocks.copy_(self._filled[at : at + count].to(blocks.device))
        self._filled = None

    def _parts(self, start: int, end: int) -> Iterator[tuple[int, torch.Tensor, int, int]]:
        """[start, end) bit by bit: where a part begins, the blocks it is in, and its place and length among them."""
        at = start
        while at < end:
            number = bisect.bisect_right(self._begins, at) - 1
            chunk, begin = self.chunks[number], self._begins[number]
            stop = min(end, begin + chunk.numel(), at + PART)
            low, high = (at - begin) // BLOCK * BLOCK, -((begin - stop) // BLOCK) * BLOCK
            yield at, chunk[low : min(high, chunk.numel())], at - begin - low, stop - at
            at = stop


class AdamW8bit(torch.optim.AdamW):
    """AdamW whose moments are 8-bit numbers in the groups that say ``eight_bit``, and fp32 in the others.

    It is for flat pieces: a group's parameters are one-dimensional fp32 tensors when :meth:`new_state` is called.

    Args:
        groups: as :class:`torch.optim.AdamW` takes them.
        compiled: let torch.compile fuse an update, on GPUs.
        options: of :class:`torch.optim.AdamW`.
    """

    def __init__(self, groups: list[dict], *, compiled: bool, **options: Any) -> None:
        super().__init__(groups, **options)
        self._compiled = compiled
        self._inner: dict[torch.Tensor, torch.optim.Optimizer] = {}

    def new_state(self, flat: torch.Tensor, group: dict) -> dict[str, Any]:
        """Moments of zero for a piece of an ``eight_bit`` group, in the form of an optimizer's state."""
        inner, state_8bit = _torchao()
        whole = flat.numel() // BLOCK * BLOCK if flat.numel() >= FEWEST else 0
        size = COMPILED_CHUNK if self._compiled and flat.is_cuda else EAGER_CHUNK
        ends = [
            *range(size, whole, size),
            *([whole] if whole else []),
            *([flat.numel()] if whole < flat.numel() else []),
        ]
        chunks = [nn.Parameter(flat.detach()[a:b]) for a, b in itertools.pairwise([0, *ends])]
        optimizer = inner(
            chunks, lr=0.0, betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"], block_size=BLOCK
        )
        for chunk in chunks:
            eight = chunk.numel() % BLOCK == 0 and chunk.numel() <= whole
            moments = [
                state_8bit.zeros(chunk.shape, signed, BLOCK, flat.device, torch.float32)
                if eight
                else torch.zeros_like(chunk, requires_grad=False)
                for signed in (True, False)
            ]
            optimizer.state[chunk] = dict(zip(("exp_avg", "exp_avg_sq"), moments, strict=True), step=torch.zeros(()))
        self._inner[flat] = optimizer
        states = [optimizer.state[chunk] for chunk in chunks]
        moments = {name: Moment([state[name] for state in states]) for name in ("exp_avg", "exp_avg_sq")}
        return {"step": torch.zeros(()), **moments}

    def take_filled(self) -> None:
        """Encode the moments that were filled through :meth:`Stretch.to_fill`."""
        for state in self.state.values():
            for moment in state.values():
                if isinstance(moment, Moment):
                    moment.take_filled()

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        """One update of all groups that ``param_groups`` names now; DeepSpeed names one at a time."""
        if closure is not None:
            raise ValueError("a closure is not supported; compute gradients before step()")
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group.get("eight_bit")]
        try:
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group.get("eight_bit"):
                for flat in group["params"]:
                    self._update(flat, group["lr"])

    def _update(self, flat: torch.Tensor, lr: float) -> None:
        if flat.grad is None:
            return
        optimizer, step = self._inner[flat], self.state[flat]["step"]
        (inner,) = optimizer.param_groups
        inner["lr"].fill_(lr)
        begin = 0
        for chunk in inner["params"]:
            chunk.grad = flat.grad[begin : begin + chunk.numel()]
            optimizer.state[chunk]["step"].copy_(step)  # which a checkpoint may have set
            begin += chunk.numel()
        compiled = self._compiled and flat.is_cuda
        with contextlib.nullcontext() if compiled else torch.compiler.set_stance("force_eager"):
            optimizer.step()
        optimizer.zero_grad()
        step += 1
