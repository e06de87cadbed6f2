"""Ends a process that stands still in foreign code which keeps the GIL, so that no thread of its own can.

    reaper = Reaper("rank 3")
    reaper.allow(300.0)  # s from now; a later call replaces it
    reaper.allow(None)   # as long as it likes
    reaper.close()

The reaper is a process of its own. When the time is over it has the other one write the stacks of its threads to its
standard error (SIGUSR2, which :mod:`faulthandler` answers without the GIL), and kills it. It counts the time itself, so
that time in which one of the two or both are suspended does not count.
"""

import contextlib
import faulthandler
import math
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

TICK = 0.2  # s
WRITING = 2.0  # s for the stacks
STACKS = signal.SIGUSR2


class Reaper:
    """This process's end. ``name`` is what its last message calls it."""

    def __init__(self, name: str) -> None:
        faulthandler.register(STACKS, file=sys.__stderr__, all_threads=True)
        command = [sys.executable, "-I", "-S", __file__, name]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        os.set_blocking(self._process.stdin.fileno(), False)

    def allow(self, seconds: float | None) -> None:
        """Let this process live so long, unless told again; None: for ever."""
        with contextlib.suppress(OSError):  # somebody killed the reaper, or keeps it from reading
            os.write(self._process.stdin.fileno(), b"%f\n" % (math.inf if seconds is None else seconds))

    def close(self) -> None:
        """End the reaper."""
        self._process.kill()  # closing the pipe does not tell it, if processes that were forked from this one hold it
        self._process.communicate()
        faulthandler.unregister(STACKS)


def reap(name: str) -> None:
    """The reaper's whole life. The times come on standard input, which ends with the process that is watched."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # they may be sent to all processes of a job
    watched, left = os.getppid(), math.inf
    while left > 0:
        if select.select([0], [], [], TICK)[0]:
            words = os.read(0, 65536).split()
            if not words:
                return
            left = float(words[-1])
        elif os.getppid() != watched:  # gone, and one that it forked holds the pipe
            return
        elif not _suspended(watched):
            left -= TICK
    print(f"error on {name}: stuck in foreign code that keeps Python from running; its threads:", file=sys.stderr)
    sys.stderr.flush()
    for number, seconds in ((STACKS, WRITING), (signal.SIGKILL, 0)):
        if os.getppid() == watched:
            os.kill(watched, number)
            time.sleep(seconds)


def _suspended(pid: int) -> bool:
    """Whether a process is stopped, by a signal or a debugger (``state`` in proc_pid_stat(5))."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "tT"
    except OSError:
        return False


if __name__ == "__main__":
    reap(sys.argv[1])
