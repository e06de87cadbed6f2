"""Rows under way between processes, while this one computes something else; gradients travel likewise.

    trip = Trip(x, route)       # x leaves
    ...                         # other work
    y = trip.finish()           # y has arrived

On a GPU the trip runs on a stream of its own, which waits for what was queued before it started; ``finish`` makes the
current stream wait for it, and never the host. On a CPU rows have arrived when ``Trip`` returns.

A trip is two nodes in autograd's graph, joined by a scalar that only says which comes first. In the backward pass the
second node sends the gradient off, and the first one waits for it. Autograd runs what is ready in the reverse order of
the forward pass, so what was computed during several trips is again, in its backward pass, between the start of their
gradients' trips and the end.
"""

import functools

import torch

from megatron.parallel.routes import Route, follow, landing, undo


class Trip:
    """Rows ``x`` on ``route``. Every process of the route must make the trip, and the one back if gradients flow."""

    def __init__(self, x: torch.Tensor, route: Route) -> None:
        self._leg = _Leg(route)
        self._started: torch.Tensor | None = _Depart.apply(x, self._leg) if route else x

    def finish(self) -> torch.Tensor:
        """The rows that arrive here; to be called once."""
        started, self._started = self._started, None
        return _Arrive.apply(started, self._leg) if self._leg.route else started


class _Leg:
    """A trip in one direction. It holds its tensors, which belong to the current stream, until that has waited for it.

    So their memory is used anew in the order of that stream. (With ``record_stream`` it would be when the host sees the
    trip's end, which is late for a host that runs ahead.)
    """

    def __init__(self, route: Route) -> None:
        self.route = route
        self.back: _Leg | None = None  # of the gradient, once that has left
        self._tensors: tuple[torch.Tensor, ...] = ()  # what leaves and what arrives, not to be read before the event
        self._done: torch.cuda.Event | None = None

    def start(self, x: torch.Tensor) -> None:
        y = landing(self.route, x)
        self._tensors = (x, y)
        if not x.is_cuda:
            follow(self.route, x, y)
            return
        side = _side_stream(x.device)
        side.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(side):
            follow(self.route, x, y)
            self._done = side.record_event()

    def finish(self) -> torch.Tensor:
        (_, y), self._tensors = self._tensors, ()
        if self._done is not None:
            torch.cuda.current_stream(y.device).wait_event(self._done)
        return y

    def __del__(self) -> None:
        # Never finished: activation checkpointing stops recomputing as soon as it has what it needs.
        for tensor in self._tensors:
            if tensor.is_cuda:
                tensor.record_stream(_side_stream(tensor.device))


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which all of a device's trips run, one after another, before what waits for a free processor."""
    return torch.cuda.Stream(device, priority=-1)


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, leg):
        ctx.leg = leg
        leg.start(x)
        return x.new_zeros(())

    @staticmethod
    def backward(ctx, grad):
        return _Arrive.apply(grad, ctx.leg.back), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, started, leg):
        ctx.leg = leg
        return leg.finish()

    @staticmethod
    def backward(ctx, grad):
        ctx.leg.back = _Leg(undo(ctx.leg.route))
        return _Depart.apply(grad, ctx.leg.back), None
