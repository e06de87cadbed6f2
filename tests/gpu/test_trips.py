"""On a GPU a trip runs beside other work, and nobody reads or reuses its memory too early."""

import torch

from megatron.parallel.trips import Trip

SLEEP = 20_000_000  # clock cycles, about 10 ms


class SlowCopy:
    """A step of one process that takes long to begin."""

    def arriving(self, rows: int) -> int:
        return rows

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        torch.cuda._sleep(SLEEP)
        return y.copy_(x)

    def undo(self) -> "SlowCopy":
        return self


def there_and_back(x: torch.Tensor) -> torch.Tensor:
    """x^2 in chunks; memory that was let go is overwritten at once."""

    def litter() -> None:
        for _ in range(8):
            torch.full_like(x[:1000], torch.nan)

    there = []
    for chunk in x.split(1000):
        there.append(Trip(chunk + 1, [SlowCopy()]))
        litter()
    back = []
    for trip in there:
        back.append(Trip((trip.finish() - 1).square(), [SlowCopy()]))
        litter()
    return torch.cat([trip.finish() for trip in back])


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
        trip = Trip(x, [SlowCopy()])
        if beside:
            torch.cuda._sleep(SLEEP)
        trip.finish()
        end.record()
        torch.cuda.synchronize()
        milliseconds.append(start.elapsed_time(end))
    alone, together = milliseconds[2:]
    assert together < 1.5 * alone
