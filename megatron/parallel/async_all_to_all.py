"""Asynchronous all-to-all: rows are exchanged while this process computes something else, gradients likewise.

    handle = AsyncAllToAll(x, steps)    # starts
    ...                                 # other work
    y = handle.wait()                   # the received rows

On a GPU the exchange runs on a stream of its own, which waits for what was queued before it started; ``wait`` makes the
current stream wait for it, and never the host. On a CPU the exchange is over when ``AsyncAllToAll`` returns.

An asynchronous all-to-all is two nodes in autograd's graph, joined by a scalar that only says which comes first. In the
backward pass the second node starts the all-to-all of the gradient, and the first one waits for it. Autograd runs what
is ready in the reverse order of the forward pass, so what was computed while rows were exchanged is again, in its
backward pass, between the start of the gradients' all-to-all and its end.
"""

import functools

import torch

from megatron.parallel.all_to_all import Steps, all_to_all, empty_output, inverse


class AsyncAllToAll:
    """All-to-all of rows ``x``. Every process of the group must start it, and its inverse if gradients flow."""

    def __init__(self, x: torch.Tensor, steps: Steps) -> None:
        self._transfer = _Transfer(steps)
        self._started: torch.Tensor | None = _Start.apply(x, self._transfer) if steps else x

    def wait(self) -> torch.Tensor:
        """The received rows; to be called once."""
        started, self._started = self._started, None
        if started is None:
            raise RuntimeError("the rows of this all-to-all have been taken already; call wait() once")
        return _Wait.apply(started, self._transfer) if self._transfer.steps else started


class _Transfer:
    """The exchange in one direction. It holds its tensors, which belong to the current stream, until that has waited.

    So their memory is reused in the order of that stream. (With ``record_stream`` it would be when the host sees the
    exchange's end, which is late for a host that runs ahead.)
    """

    def __init__(self, steps: Steps) -> None:
        self.steps = steps
        self.gradient: _Transfer | None = None  # the gradient's transfer, once that has started
        self._tensors: tuple[torch.Tensor, ...] = ()  # input and output, not to be read before the event
        self._done: torch.Event | None = None

    def start(self, x: torch.Tensor) -> None:
        y = empty_output(self.steps, x)
        self._tensors = (x, y)
        if not x.is_cuda:
            all_to_all(self.steps, x, y)
            return
        side = _side_stream(x.device)
        side.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(side):
            all_to_all(self.steps, x, y)
            self._done = side.record_event()

    def wait(self) -> torch.Tensor:
        (_, y), self._tensors = self._tensors, ()
        if self._done is not None:
            torch.cuda.current_stream(y.device).wait_event(self._done)
        return y

    def __del__(self) -> None:
        # Never waited for: activation checkpointing stops recomputing as soon as it has what it needs.
        for tensor in self._tensors:
            if tensor.is_cuda:
                tensor.record_stream(_side_stream(tensor.device))


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all of a device's all-to-alls: one after another, and before what waits for a free processor."""
    return torch.cuda.Stream(device, priority=-1)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, transfer):
        ctx.transfer = transfer
        transfer.start(x)
        return x.new_zeros(())

    @staticmethod
    def backward(ctx, grad):
        return _Wait.apply(grad, ctx.transfer.gradient), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx, started, transfer):
        ctx.transfer = transfer
        return transfer.wait()

    @staticmethod
    def backward(ctx, grad):
        ctx.transfer.gradient = _Transfer(inverse(ctx.transfer.steps))
        return _Start.apply(grad, ctx.transfer.gradient), None
