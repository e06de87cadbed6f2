"""Time and memory of a piece of GPU work, on fresh inputs; and a limit to what others may take."""

import contextlib
import signal
import statistics
import time
from collections.abc import Callable, Iterator

import torch

_FLUSH_BYTES = 256 << 20  # more than any L2 cache


def median_ms(
    step: Callable[..., object], inputs: Callable[[], tuple], *, warm_up: int = 5, repeats: int = 20
) -> tuple[float, float, float]:
    """Median, least and most milliseconds of ``step(*inputs())``; on a GPU by events, with a cold L2 cache.

    The inputs are made before the clock starts, anew for every run.
    """
    times = []
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda") if torch.cuda.is_available() else None
    for _ in range(warm_up + repeats):
        made = inputs()
        if flush is None:
            begin = time.perf_counter()
            step(*made)
            times.append(1e3 * (time.perf_counter() - begin))
            continue
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        torch.cuda._sleep(10_000_000)  # milliseconds in which the host gets ahead, as it does in training
        start.record()
        step(*made)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    times = times[warm_up:]
    return statistics.median(times), min(times), max(times)


def peak_bytes(step: Callable[..., object], *made: object) -> int:
    """Most memory that ``step`` takes beside what is there before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(*made)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Inside, work of the main thread is ended after so long, as soon as Python runs again.

    Raises:
        TimeoutError: it took longer.
    """

    def end(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
