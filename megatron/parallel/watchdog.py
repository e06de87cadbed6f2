"""Ends a run that hangs, after every rank has written the stacks of its threads.

    watchdog.begin(1, "update 1")      # a step lasts until the next call
    with watchdog.paused(): ...        # neither timed nor limited

On every rank a thread compares the duration of the current step with the median of the steps before. The first rank to
find it too long asks all ranks, through the failure monitor (:mod:`megatron.parallel.failure_monitor`), to write their
stacks and to report their state. All ranks then exit with a line that names the stragglers
(:mod:`megatron.parallel.hang_report`). A rank that can neither ask nor answer, because foreign code holds the GIL, is
killed by a separate process (:mod:`megatron.parallel.kill_timer`), with its stacks on its standard error.
"""

import contextlib
import faulthandler
import os
import socket
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from megatron.parallel.failure_monitor import EXIT_SECONDS, REPORT_SECONDS, FailureMonitor
from megatron.parallel.hang_report import RankState
from megatron.parallel.initialize import Topology
from megatron.parallel.kill_timer import KillTimer

WARMUP_STEPS = 3  # of a process; neither timed nor limited, because they compile
MIN_TIMED_STEPS = 3  # before there is a median
MEDIAN_WINDOW = 128  # steps
JOINT_EXIT_SECONDS = 30.0  # for the ranks to exit together; after that each exits by itself
KILL_MARGIN_SECONDS = REPORT_SECONDS + EXIT_SECONDS  # after the limit, for a rank to report the hang or answer
_TICK_SECONDS = 0.2
_SUSPENDED_SECONDS = 5.0  # a longer time between two ticks means that the process was suspended; it does not count
_PACKAGE = str(Path(__file__).parents[1]) + os.sep


class Watchdog:
    """Watches one rank.

    Args:
        factor: a step may take this many times the median. None sets no limit, unless ``always``.
        min_seconds: a step may take this long in any case.
        folder: gets ``stacks/STEP/rank_RANK.txt``; None writes to standard error.
        topology: of this rank.
        monitor: this rank's failure monitor; None in a run of a single process.
        always: every step, from the first, may take ``min_seconds``, whatever the others took.
    """

    def __init__(
        self,
        factor: float | None,
        min_seconds: float,
        folder: Path | None,
        topology: Topology,
        monitor: FailureMonitor | None,
        always: bool = False,
    ) -> None:
        self._enabled = factor is not None or always
        self._factor, self._min_seconds, self._folder = factor, min_seconds, folder
        self._topology, self._monitor = topology, monitor
        self._durations: deque[float] = deque(maxlen=MEDIAN_WINDOW)
        self._steps_begun = 0
        self._step, self._title = 0, "the start"
        self._since: float | None = None  # None: nothing is timed now
        self._limit = min_seconds if always else None
        self._closed = threading.Event()
        self._main_thread = threading.main_thread().ident
        self._kill_timer = KillTimer(f"rank {topology.launch.rank}") if self._enabled else None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if self._enabled:
            if monitor is not None:
                monitor.on_hang = self.report
            self._thread.start()

    def begin(self, step: int, title: str) -> None:
        """Begin a step, and end the one before."""
        if not self._enabled:
            return
        now = time.monotonic()
        if self._since is not None and self._steps_begun > WARMUP_STEPS:
            self._durations.append(now - self._since)
        self._steps_begun += 1
        self._step, self._title, self._since = step, title, now
        if self._factor is not None and len(self._durations) >= MIN_TIMED_STEPS:
            self._limit = max(self._min_seconds, self._factor * statistics.median(self._durations))
        self._restart_kill_timer()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Neither time nor limit what happens inside."""
        if not self._enabled:
            yield
            return
        since, self._since = self._since, None
        began = time.monotonic()
        self._restart_kill_timer()
        try:
            yield
        finally:
            self._since = None if since is None else since + time.monotonic() - began
            self._restart_kill_timer()

    def close(self) -> None:
        """Stop watching."""
        if not self._enabled:
            return
        self._closed.set()
        self._since = None
        self._restart_kill_timer()
        if self._monitor is not None:
            self._monitor.on_hang = None
        self._thread.join()
        if self._kill_timer is not None:
            self._kill_timer.close()

    def report(self, reason: str) -> RankState:
        """Write this rank's stacks, and return its state."""
        self._set_kill_timer(None)  # the failure monitor ends this process in any case
        self._write_stacks(reason)
        return RankState(self._step, self._collectives(), self._location())

    # ------------------------------------------------------------------------------------------------------ watching

    def _restart_kill_timer(self) -> None:
        """Have this process killed, even without the GIL, if it does not ask or answer in time."""
        since, limit = self._since, self._limit
        if since is None or limit is None:
            self._set_kill_timer(None)
        else:
            self._set_kill_timer(max(since + limit - time.monotonic(), 0) + KILL_MARGIN_SECONDS)

    def _set_kill_timer(self, seconds: float | None) -> None:
        if self._kill_timer is not None:
            self._kill_timer.set(seconds)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(_TICK_SECONDS):
            since_last, last = time.monotonic() - last, time.monotonic()
            if since_last > _SUSPENDED_SECONDS and self._since is not None:
                self._since += since_last
            since, limit = self._since, self._limit
            if since is None or limit is None or (elapsed := time.monotonic() - since) <= limit:
                continue
            allowed = f"{self._min_seconds:g}"
            if self._factor is not None:
                median = statistics.median(self._durations)
                allowed = (
                    f"--watchdog-factor {self._factor:g} times the median of {median:.3g} s "
                    f"and --watchdog-min-seconds {self._min_seconds:g}"
                )
            self._end_run(f"{self._title} has taken {elapsed:.3g} s, more than {allowed}")

    def _end_run(self, reason: str) -> None:
        self._set_kill_timer(JOINT_EXIT_SECONDS + EXIT_SECONDS)
        if self._monitor is not None:
            self._monitor.report_hang(f"{reason}; {self._destination()}")
            time.sleep(JOINT_EXIT_SECONDS)
            reason += "; rank 0 did not answer"  # otherwise this process would have ended by now
        self._write_stacks(reason)
        print(
            f"error on rank {self._topology.launch.rank}: {reason}; {self._destination()}; ending",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    def _destination(self) -> str:
        return "stacks: " + ("standard error" if self._folder is None else str(self._stacks_folder(self._folder)))

    # ----------------------------------------------------------------------------------------------------- reporting

    def _stacks_folder(self, folder: Path) -> Path:
        return folder / "stacks" / f"{self._step:08d}"

    def _write_stacks(self, reason: str) -> None:
        rank = self._topology.launch.rank
        head = f"rank {rank}, host {socket.gethostname()}, process {os.getpid()}, {time.ctime()}: {reason}\n"
        if self._folder is not None:
            with contextlib.suppress(OSError):
                stacks = self._stacks_folder(self._folder)
                stacks.mkdir(parents=True, exist_ok=True)
                with (stacks / f"rank_{rank:05d}.txt").open("w", encoding="utf-8") as file:
                    file.write(head)
                    file.flush()
                    faulthandler.dump_traceback(file)
                return
        print(head, file=sys.stderr, end="", flush=True)
        faulthandler.dump_traceback(sys.stderr)

    def _collectives(self) -> dict[str, int]:
        """How many collectives this rank has started in each of its groups."""
        groups = {
            "all": dist.group.WORLD,
            "control": self._topology.control_group,
            "tensor": self._topology.tensor_parallel_group,
            "data": self._topology.data_parallel_group,
            "model": self._topology.model_parallel_group,
            **{f"expert {degree}": group for degree, group in self._topology.expert_parallel_groups.items()},
            **{f"expert data {degree}": group for degree, group in self._topology.expert_data_groups.items()},
        }
        counts = {}
        for kind, group in groups.items():
            if group is None:
                continue
            with contextlib.suppress(RuntimeError):  # a backend that does not count
                first = dist.get_process_group_ranks(group)[0]
                counts[f"{kind} of rank {first}"] = int(group._get_sequence_number_for_group())
        return counts

    def _location(self) -> str:
        """Where the main thread is: the innermost line of this package."""
        frame = sys._current_frames().get(self._main_thread or 0)
        innermost = frame
        while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
            frame = frame.f_back
        frame = frame or innermost
        if frame is None:
            return "an unknown location"
        name = frame.f_code.co_filename.removeprefix(_PACKAGE)
        return f"{name}:{frame.f_lineno} {frame.f_code.co_name}"
