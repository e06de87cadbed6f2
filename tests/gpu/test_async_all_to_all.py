"""On a GPU an all-to-all runs beside other work, and nobody reads or reuses its memory too early."""

import torch

from megatron.parallel.async_all_to_all import AsyncAllToAll

SLEEP = 20_000_000  # clock cycles, about 10 ms


class SlowCopy:
    """A step of one process that takes long to begin."""

    def output_rows(self, rows: int) -> int:
        return rows

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        torch.cuda._sleep(SLEEP)
        return out.copy_(x)

    def inverse(self) -> "SlowCopy":
        return self


def there_and_back(x: torch.Tensor) -> torch.Tensor:
    """x^2 in chunks; memory that was let go is overwritten at once."""

    def litter() -> None:
        for _ in range(8):
            torch.full_like(x[:1000], torch.nan)

    there = []
    for chunk in x.split(1000):
        there.append(AsyncAllToAll(chunk + 1, [SlowCopy()]))
        litter()
    back = []
    for handle in there:
        back.append(AsyncAllToAll((handle.wait() - 1).square(), [SlowCopy()]))
        litter()
    return torch.cat([handle.wait() for handle in back])


def test_rows_and_gradients_are_whole():
    for recompute in (False, True):
        x = torch.rand(4000, 64, device="cuda").double().requires_grad_()
        if recompute:
            y = torch.utils.checkpoint.checkpoint(there_and_back, x, use_reentrant=False)
        else:
            y = there_and_back(x)
        y.sum().backward()
        torch.testing.assert_close(y, x.square())
        torch.testing.assert_close(x.grad, 2 * x.detach())


def test_other_work_goes_on():
    x = torch.ones(10, device="cuda")
    milliseconds = []
    for beside in (False, True, False, True):  # the first two warm up
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        handle = AsyncAllToAll(x, [SlowCopy()])
        if beside:
            torch.cuda._sleep(SLEEP)
        handle.wait()
        end.record()
        torch.cuda.synchronize()
        milliseconds.append(start.elapsed_time(end))
    alone, together = milliseconds[2:]
    assert together < 1.5 * alone
