"""AdamW with moments of 8 bits a number.

The arithmetic and the number format are torchao's (``torchao.optim.AdamW8bit``): blocks of 256 numbers share an fp32
scale, the largest absolute value among them, and each number is one of 256 levels that are dense around zero (Dettmers
et al., 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861). The update itself is computed in fp32. A second
moment below 1.6e-7 of the largest in its block becomes zero, the first one only below 2.8e-7 of its largest.

A shard is cut into chunks, so that what an update needs beside its result does not grow with the model, and one
compilation serves all chunks of a size. A checkpoint holds fp32 moments, which are decoded and encoded slice by slice.
"""

import bisect
import contextlib
import functools
import itertools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from megatron.config import OptimizerConfig
from megatron.engine.optim.base import ShardedOptimizer

if TYPE_CHECKING:
    from megatron.checkpoint import Box

logger = logging.getLogger(__name__)

BLOCK = 256  # numbers that share a scale
FEWEST = 4096  # a shard of fewer numbers keeps fp32 moments: torchao's rule too
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


class QuantizedSlice:
    """Consecutive numbers of a :class:`QuantizedState`."""

    dtype = torch.float32  # once decoded

    def __init__(self, state: "QuantizedState", start: int, numel: int) -> None:
        self._state, self._start, self._numel = state, start, numel

    def numel(self) -> int:
        """Number of elements."""
        return self._numel

    def boxes(self, cut: "Callable[[torch.Tensor], list[Box]]") -> "list[Box]":
        """The boxes that ``cut`` makes of these numbers in one dimension, each decoded when it is written."""
        from megatron.checkpoint import Box, Deferred

        outline = torch.empty(self._numel, device="meta")
        return [
            Box(box.offsets, Deferred(box.tensor.shape, box.tensor.dtype, functools.partial(self._read, box.tensor)))
            for box in cut(outline)
            if isinstance(box.tensor, torch.Tensor)
        ]

    def _read(self, part: torch.Tensor) -> torch.Tensor:
        first = int(part.storage_offset())
        span = 1 + sum((size - 1) * stride for size, stride in zip(part.shape, part.stride(), strict=True))
        return self._state.decode(self._start + first, span).as_strided(part.shape, part.stride())

    def load_buffer(self) -> torch.Tensor:
        """fp32 numbers in CPU memory that :meth:`AdamW8bit.finish_loading` encodes in place of these."""
        return self._state.load_buffer().narrow(0, self._start, self._numel)


class QuantizedState:
    """A moment of a shard, one chunk after another: 8-bit ones of whole blocks, then fp32 for the rest."""

    def __init__(self, chunks: list[torch.Tensor]) -> None:
        self.chunks = chunks
        *self._begins, self.numel = itertools.accumulate((chunk.numel() for chunk in chunks), initial=0)
        self._loaded: torch.Tensor | None = None

    def narrow(self, dim: int, start: int, numel: int) -> QuantizedSlice:
        """As :meth:`torch.Tensor.narrow` of the whole moment; it has one dimension, 0."""
        if dim != 0:
            raise ValueError(f"dimension {dim}, but a moment has one dimension only; use 0")
        self._check(start, numel)
        return QuantizedSlice(self, start, numel)

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

    def load_buffer(self) -> torch.Tensor:
        """The whole moment as fp32 zeros in CPU memory, to load into before :meth:`finish_loading`."""
        if self._loaded is None:
            self._loaded = torch.zeros(self.numel)
        return self._loaded

    @torch.no_grad()
    def finish_loading(self) -> None:
        """Encode what was loaded since :meth:`load_buffer`, and give its memory back."""
        if self._loaded is None:
            return
        for at, blocks, _, count in self._parts(0, self.numel):
            blocks.copy_(self._loaded[at : at + count].to(blocks.device))
        self._loaded = None

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


class AdamW8bit(ShardedOptimizer, torch.optim.AdamW):
    """AdamW whose moments are 8-bit numbers in the groups of ``matrices``, and fp32 in the others.

    Args:
        groups: as :class:`torch.optim.AdamW` takes them.
        compiled: let torch.compile fuse an update, on GPUs.
        options: of :class:`torch.optim.AdamW`.
    """

    states: ClassVar[Mapping[str, int]] = {"exp_avg": 1, "exp_avg_sq": 2}
    library = ("torchao", "8bit")

    def __init__(self, groups: Sequence[dict[str, Any]], *, compiled: bool, **options: Any) -> None:
        super().__init__(groups, **options)
        self._compiled = compiled
        self._inner: dict[torch.Tensor, torch.optim.Optimizer] = {}

    @classmethod
    def from_config(cls, groups: Sequence[dict[str, Any]], config: OptimizerConfig, compiled: bool) -> "AdamW8bit":
        """See :meth:`ShardedOptimizer.from_config`."""
        betas = (config.adam_beta1, config.adam_beta2)
        return cls(groups, compiled=compiled, lr=0.0, betas=betas, eps=config.adam_eps, fused=True)

    @classmethod
    def state_bytes(cls, config: OptimizerConfig) -> float:
        """Bytes of both moments for each weight: 8 bits, and an fp32 scale for each block."""
        return 2 * (1 + 4 / BLOCK)

    def log_warnings(self) -> None:
        """Warn of betas with which 8-bit moments are far from fp32 ones."""
        warn_of_slow_decay(self.defaults["betas"])

    def new_state(self, shard: torch.Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        """Moments of zero: quantized in a group of ``matrices``, else fp32."""
        if not group["matrices"]:
            return super().new_state(shard, group)
        inner, state_8bit = _torchao()
        whole = shard.numel() // BLOCK * BLOCK if shard.numel() >= FEWEST else 0
        size = COMPILED_CHUNK if self._compiled and shard.is_cuda else EAGER_CHUNK
        ends = [
            *range(size, whole, size),
            *([whole] if whole else []),
            *([shard.numel()] if whole < shard.numel() else []),
        ]
        chunks = [nn.Parameter(shard.detach()[a:b]) for a, b in itertools.pairwise([0, *ends])]
        optimizer = inner(
            chunks, lr=0.0, betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"], block_size=BLOCK
        )
        for chunk in chunks:
            eight = chunk.numel() % BLOCK == 0 and chunk.numel() <= whole
            moments = [
                state_8bit.zeros(chunk.shape, signed, BLOCK, shard.device, torch.float32)
                if eight
                else torch.zeros_like(chunk, requires_grad=False)
                for signed in (True, False)
            ]
            optimizer.state[chunk] = dict(zip(self.states, moments, strict=True), step=torch.zeros(()))
        self._inner[shard] = optimizer
        states = [optimizer.state[chunk] for chunk in chunks]
        moments = {name: QuantizedState([state[name] for state in states]) for name in self.states}
        return {"step": torch.zeros(()), **moments}

    def finish_loading(self) -> None:
        """Encode the moments that were loaded through :meth:`QuantizedSlice.load_buffer`."""
        for states in self.state.values():
            for state in states.values():
                if isinstance(state, QuantizedState):
                    state.finish_loading()

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        """One update of all groups that ``param_groups`` names now; DeepSpeed names one at a time."""
        if closure is not None:
            raise ValueError("a closure is not supported; compute gradients before step()")
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["matrices"]]
        try:
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["matrices"]:
                for shard in group["params"]:
                    self._update_shard(shard, group["lr"])

    def _update_shard(self, shard: torch.Tensor, lr: float) -> None:
        if shard.grad is None:
            return
        optimizer, step = self._inner[shard], self.state[shard]["step"]
        (inner,) = optimizer.param_groups
        inner["lr"].fill_(lr)
        begin = 0
        for chunk in inner["params"]:
            chunk.grad = shard.grad[begin : begin + chunk.numel()]
            optimizer.state[chunk]["step"].copy_(step)  # which a checkpoint may have set
            begin += chunk.numel()
        compiled = self._compiled and shard.is_cuda
        with contextlib.nullcontext() if compiled else torch.compiler.set_stance("force_eager"):
            optimizer.step()
        optimizer.zero_grad()
        step += 1
