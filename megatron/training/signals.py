"""Stopping a run from outside: signals and time limits end it after a checkpoint, on all ranks together."""

import os
import signal
import time
from pathlib import Path
from types import FrameType

from megatron.parallel.initialize import Topology

HANDLED = (signal.SIGTERM, signal.SIGUSR1)


def process_age() -> float:
    """Seconds since this process began, imports included (``starttime`` in proc_pid_stat(5))."""
    after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(after_name[19]) / os.sysconf("SC_CLK_TCK")


class StopRequest:
    """Remembers that SIGTERM or SIGUSR1 came or that time is up; :meth:`agreed` makes it common to all ranks.

    Time is up ``minutes`` after the process began: what a scheduler counts is not training only.
    """

    def __init__(self, topology: Topology, minutes: float | None = None) -> None:
        self._topology = topology
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes - process_age()
        self._signal = 0
        self._previous = {number: signal.signal(number, self._remember) for number in HANDLED}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._signal = number

    def agreed(self) -> str | None:
        """Why to stop, or None; the same answer on every rank. Every rank must call it at the same point."""
        timed_out = self._deadline is not None and time.monotonic() >= self._deadline
        code = self._topology.agree_max(self._signal or (1000 if timed_out else 0))
        if code == 0:
            return None
        return "the time limit" if code == 1000 else signal.Signals(code).name

    def restore(self) -> None:
        """Put the previous signal handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
