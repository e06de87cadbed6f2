"""Stopping a run from outside: signals and time limits end it after a checkpoint, on all ranks together.

Imports nothing heavy, so that a process can heed the signals from its first moments.
"""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.parallel.initialize import Topology

HANDLED = (signal.SIGTERM, signal.SIGUSR1)
DELIVERY = 0.5  # s in which a signal to all ranks reaches each


def process_age() -> float:
    """Seconds since this process began, imports included (``starttime`` in proc_pid_stat(5))."""
    after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(after_name[19]) / os.sysconf("SC_CLK_TCK")


class StopSignals:
    """Remembers SIGTERM and SIGUSR1, which do not kill this process inside the block and from there to its end.

        with StopSignals() as signals:  # before anything slow
            ...

    Until :meth:`rendezvous_done`, a rank may be waiting for one that has died. The launcher ends waiting ranks with
    SIGTERM, so SIGTERM then ends the process at once, with status 0: nothing has been trained, and nothing is lost.
    """

    def __init__(self) -> None:
        self.received = 0  # the number of the last signal
        self._met = False

    def __enter__(self) -> "StopSignals":
        # a thread hears of a signal even while the main thread waits in foreign code
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=_forget_wakeup)
        threading.Thread(target=self._listen, args=(reader,), name="signals", daemon=True).start()
        for number in HANDLED:
            signal.signal(number, self._remember)
            signal.siginterrupt(number, False)  # or system calls of foreign code would fail
        return self

    def __exit__(self, *error: Any) -> None:
        for number in HANDLED:
            signal.signal(number, signal.SIG_IGN)  # unlike a handler it lasts until the interpreter is gone

    def rendezvous_done(self) -> None:
        """Say that all ranks have joined: from here on a signal is only remembered."""
        self._met = True

    @property
    def interrupted_rendezvous(self) -> bool:
        """Whether this process is about to end because SIGTERM came before all ranks had joined."""
        return self.received == signal.SIGTERM and not self._met

    def _remember(self, number: int, frame: FrameType | None = None) -> None:
        self.received = number

    def _listen(self, reader: int) -> None:
        while True:
            for number in os.read(reader, 64):
                if number in HANDLED:
                    self._remember(number)
            if self.interrupted_rendezvous:
                time.sleep(DELIVERY)  # an earlier end would look like a death to ranks that the signal has yet to reach
                if self.interrupted_rendezvous:
                    if _is_first():
                        os.write(2, b"SIGTERM before training began: nothing is lost; ending\n")
                    os._exit(0)


def _forget_wakeup() -> None:
    with contextlib.suppress(ValueError):  # not the main thread
        signal.set_wakeup_fd(-1)


def _is_first() -> bool:
    return (os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0") == "0"


class StopRequest:
    """Whether to stop, because a signal came or time is up; :meth:`agreed` makes it common to all ranks.

    Time is up ``minutes`` after the process began: what a scheduler counts is not training only.
    """

    def __init__(self, signals: StopSignals, topology: "Topology", minutes: float | None = None) -> None:
        self._signals, self._topology = signals, topology
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes - process_age()

    def agreed(self) -> str | None:
        """Why to stop, or None; the same answer on every rank. Every rank must call it at the same point."""
        timed_out = self._deadline is not None and time.monotonic() >= self._deadline
        code = self._topology.agree_max(self._signals.received or (1000 if timed_out else 0))
        if code == 0:
            return None
        return "the time limit" if code == 1000 else signal.Signals(code).name
