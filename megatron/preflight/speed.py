"""How fast a device multiplies, and how fast the links of a group of ranks are."""

import dataclasses
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

_REPEATS = 5  # the fastest counts


@dataclasses.dataclass(frozen=True)
class LinkSpeeds:
    """Bus bandwidth of a group of n ranks in GB/s: what each link carries, whatever n is.

    An all-reduce of B bytes in t seconds: 2 (n - 1) / n B / t. An all-to-all of B bytes a rank: (n - 1) / n B / t.
    """

    all_reduce: float
    all_to_all: float


def measure_products(device: torch.device) -> tuple[float, bool]:
    """TFLOP/s of a square matrix product, bf16 on a GPU and fp32 on a CPU, and whether the product was right."""
    on_gpu = device.type == "cuda"
    size, dtype, times = (8192, torch.bfloat16, 20) if on_gpu else (256, torch.float32, 2)
    left = torch.ones(size, size, dtype=dtype, device=device)
    right = torch.ones(size, size, dtype=dtype, device=device)
    out = torch.empty_like(left)

    def work() -> None:
        for _ in range(times):
            torch.matmul(left, right, out=out)

    seconds = _best(work, device)
    return 2.0 * size**3 * times / seconds / 1e12, bool((out == size).all())


def measure_links(group: dist.ProcessGroup, device: torch.device) -> LinkSpeeds:
    """The speed of a group's links. All its ranks call it together."""
    ranks = dist.get_world_size(group)
    wanted = 256 << 20 if device.type == "cuda" else 1 << 20  # bytes
    count = -(-wanted // 4 // ranks) * ranks
    sent, got = torch.ones(count, device=device), torch.zeros(count, device=device)
    share = (ranks - 1) / ranks * 4 * count / 1e9
    reduce = _best(lambda: dist.all_reduce(got, group=group), device)
    exchange = _best(lambda: dist.all_to_all_single(got, sent, group=group), device)
    return LinkSpeeds(2 * share / reduce, share / exchange)


def _best(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest repetition, after one that is not timed."""
    times = []
    for _ in range(1 + _REPEATS):
        _wait(device)
        begin = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
