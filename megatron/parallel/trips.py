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

from megatron.parallel.routes import Route, follow, undo


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
    """A trip in one direction."""

    def __init__(self, route: Route) -> None:
        self.route = route
        self.back: _Leg | None = None  # of the gradient, once that has left
        self._rows: torch.Tensor | None = None  # not to be read before the event
        self._done: torch.cuda.Event | None = None

    def start(self, x: torch.Tensor) -> None:
        if not x.is_cuda:
            self._rows = follow(self.route, x)
            return
        side = _side_stream(x.device)
        side.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(side):
            self._rows = follow(self.route, x)
            self._done = side.record_event()
        x.record_stream(side)  # so that its memory is not used anew before it was read, whoever lets go of it

    def finish(self) -> torch.Tensor:
        rows, self._rows = self._rows, None
        if self._done is not None:
            here = torch.cuda.current_stream(rows.device)
            here.wait_event(self._done)
            rows.record_stream(here)
        return rows


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which all of a device's trips run, one after another."""
    return torch.cuda.Stream(device)


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
