"""From sums on the device to the figures of a log line."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from megatron.engine.base import AsyncScalar, StepResult
from megatron.model.loss import LossSums


def reduce_sums(sums: LossSums) -> LossSums:
    """Add the sums of all ranks; the result lies on the CPU.

    Ranks that hold parts of one copy of the model have equal sums, so all shares and means are those of the replicas.
    """
    flat = torch.cat([sums.losses.double(), sums.dropped.double(), *(counts.double() for counts in sums.counts)])
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(flat)
    parts = flat.cpu().split([len(sums.losses), len(sums.dropped), *(len(counts) for counts in sums.counts)])
    return LossSums(parts[0], [counts.long() for counts in parts[2:]], parts[1].long())


def mean_losses(sums: LossSums) -> dict[str, float]:
    """Mean LM loss, aux loss and z-loss over the micro-batches of reduced sums."""
    lm, aux, z, count = sums.losses.tolist()
    return {"loss": lm / count, "aux_loss": aux / count, "z_loss": z / count}


def mean_loss(sums: LossSums) -> AsyncScalar:
    """The mean LM loss over all ranks' micro-batches."""
    losses = sums.losses.double()  # a copy
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(losses)
    return AsyncScalar(losses[0] / losses[3])


def expert_balance(sums: LossSums) -> dict[str, list[float]]:
    """How evenly the experts of each MoE layer were used, one number a layer.

    ``load``: tokens of the busiest expert over the mean (1 is perfect balance); ``dropped``: share of assignments that
    found no slot; ``dead``: experts that got no token at all.
    """
    if not sums.counts:
        return {}
    return {
        "load": [float(c.max()) / max(float(c.double().mean()), 1e-9) for c in sums.counts],
        "dropped": [
            float(d) / max(float(c.sum()), 1.0) for d, c in zip(sums.dropped.tolist(), sums.counts, strict=True)
        ],
        "dead": [int((c == 0).sum()) for c in sums.counts],
    }


class PausableTimer:
    """Seconds since some moment, without those of pauses."""

    def __init__(self) -> None:
        self._paused = 0.0  # s, in pauses that are over
        self._paused_at: float | None = None

    def __call__(self) -> float:
        """The seconds; they do not advance in a pause."""
        now = time.perf_counter() if self._paused_at is None else self._paused_at
        return now - self._paused

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A pause; one inside another changes nothing."""
        if self._paused_at is not None:
            yield
            return
        self._paused_at = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - self._paused_at
            self._paused_at = None


class StepWindow:
    """Collects the updates between two log lines."""

    def __init__(
        self,
        flops_per_token: float,
        peak_tflops: float | None,
        devices: int,
        timer: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._flops_per_token = flops_per_token
        self._peak_tflops = peak_tflops
        self._devices = devices
        self._timer = timer  # in seconds
        self.clear()

    def clear(self) -> None:
        """Forget the updates since the last call of :meth:`take`."""
        self._sums: LossSums | None = None
        self._last: StepResult | None = None
        self._tokens = 0
        self._steps = 0
        self._skipped = 0
        self._start = self._timer()

    def add(self, result: StepResult, tokens: int) -> None:
        """Take in one update over ``tokens`` tokens. The losses of skipped updates are not averaged in."""
        if result.skipped:
            self._skipped += 1
        else:
            self._sums = result.sums if self._sums is None else self._sums + result.sums
        self._last = result
        self._tokens += tokens
        self._steps += 1

    def take(self) -> dict[str, Any] | None:
        """The figures of all updates since the last call, equal on every rank; None if there were none."""
        if self._last is None:
            return None
        seconds = max(self._timer() - self._start, 1e-9)
        record: dict[str, Any] = {"loss": None}
        if self._sums is not None:
            reduced = reduce_sums(self._sums)
            record.update(mean_losses(reduced))
            if balance := expert_balance(reduced):
                record["experts"] = balance
        if self._last.monitors is not None:
            record["monitors"] = self._last.monitors
        tflops = self._tokens * self._flops_per_token / seconds / self._devices / 1e12
        record |= {
            "grad_norm": self._last.grad_norm,
            "lr": self._last.lr,
            "skipped": self._skipped,
            "seconds_per_step": seconds / self._steps,
            "tokens_per_second": self._tokens / seconds,
            "tflops_per_device": tflops,
            "mfu": tflops / self._peak_tflops if self._peak_tflops else None,
            "memory_gb": memory_gb(),
        }
        self.clear()
        return record


def memory_gb() -> float:
    """Peak memory of this process in GB: of the GPU where there is one, else resident memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
