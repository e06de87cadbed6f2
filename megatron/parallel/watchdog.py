"""Ends a run that stands still, after every rank has written down where each of its threads is.

    watchdog.begin(1, "update 1")      # from here to the next call is one piece of work
    with watchdog.paused(): ...        # takes as long as it likes

On every rank a thread compares the piece of work that is under way with the median of those before. The first to find
it too long asks all ranks, over their lifelines, to write their stacks and to tell how far they have come; then all end
with a line that names who is behind (:mod:`megatron.parallel.stall`). A rank that cannot even ask or answer, because
foreign code holds the GIL, is ended by a process that needs nothing of it (:mod:`megatron.parallel.reaper`), with its
stacks on its standard error.
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

from megatron.parallel.initialize import Topology
from megatron.parallel.lifeline import ANSWERING, ENDING, Line
from megatron.parallel.reaper import Reaper
from megatron.parallel.stall import Place

SETTLING = 3  # pieces of work of a process that are neither timed nor watched: they compile
FEWEST = 3  # timed pieces before there is a median
WINDOW = 128  # pieces whose median counts
PATIENCE = 30.0  # s for the ranks to end together; after that each ends by itself
UNHEARD = ANSWERING + ENDING  # s after the limit in which a rank must have asked or been asked; else it cannot
_TICK = 0.2  # s
_ASLEEP = 5.0  # s between two ticks after which the whole process must have been stopped; they do not count
_OURS = str(Path(__file__).parents[1]) + os.sep


class Watchdog:
    """Watches one rank.

    Args:
        factor: a piece of work may take this many times the median; None watches nothing, unless ``always``.
        least: seconds that it may take anyway.
        folder: gets ``stacks/NUMBER/rank_RANK.txt``; None writes to standard error.
        topology: of this rank.
        line: its lifeline; None in a run of one process.
        always: every piece, from the first, may take ``least`` seconds, whatever the others took.
    """

    def __init__(
        self,
        factor: float | None,
        least: float,
        folder: Path | None,
        topology: Topology,
        line: Line | None,
        always: bool = False,
    ) -> None:
        self._on = factor is not None or always
        self._factor, self._least, self._folder, self._topology, self._line = factor, least, folder, topology, line
        self._times: deque[float] = deque(maxlen=WINDOW)
        self._begun = 0  # pieces of work
        self._number, self._what = 0, "the start"
        self._since: float | None = None  # None: nothing is timed now
        self._limit = least if always else None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._main = threading.main_thread().ident
        self._reaper = Reaper(f"rank {topology.launch.rank}") if self._on else None
        if self._on:
            if line is not None:
                line.on_stall = self.report
            self._thread.start()

    def begin(self, number: int, what: str) -> None:
        """A piece of work begins, and the one before, if any, is done."""
        if not self._on:
            return
        now = time.monotonic()
        if self._since is not None and self._begun > SETTLING:
            self._times.append(now - self._since)
        self._begun += 1
        self._number, self._what, self._since = number, what, now
        if self._factor is not None and len(self._times) >= FEWEST:
            self._limit = max(self._least, self._factor * statistics.median(self._times))
        self._arm()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Neither time nor watch what happens inside."""
        if not self._on:
            yield
            return
        since, self._since = self._since, None
        began = time.monotonic()
        self._arm()
        try:
            yield
        finally:
            self._since = None if since is None else since + time.monotonic() - began
            self._arm()

    def close(self) -> None:
        """Stop watching."""
        if not self._on:
            return
        self._ended.set()
        self._since = None
        self._arm()
        if self._line is not None:
            self._line.on_stall = None
        self._thread.join()
        self._reaper.close()

    def report(self, reason: str) -> Place:
        """Write this rank's stacks, and say how far it has come."""
        self._reaper.allow(None)  # the lifeline ends this process in any case
        self._write_stacks(reason)
        return Place(self._number, self._collectives(), self._line_of_work())

    # ------------------------------------------------------------------------------------------------------ watching

    def _arm(self) -> None:
        """Have this process ended, GIL or not, when it should have asked or been asked."""
        since, limit = self._since, self._limit
        watched = since is not None and limit is not None
        self._reaper.allow(max(since + limit - time.monotonic(), 0) + UNHEARD if watched else None)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._ended.wait(_TICK):
            asleep, last = time.monotonic() - last, time.monotonic()
            if asleep > _ASLEEP and self._since is not None:  # a suspended job, say
                self._since += asleep
            since, limit = self._since, self._limit
            if since is None or limit is None or (elapsed := time.monotonic() - since) <= limit:
                continue
            allowed = f"{self._least:g}"
            if self._factor is not None:
                allowed = (
                    f"--watchdog-factor {self._factor:g} times the median of {statistics.median(self._times):.3g} s "
                    f"and --watchdog-min-seconds {self._least:g}"
                )
            self._end(f"{self._what} has taken {elapsed:.3g} s, more than {allowed}")

    def _end(self, reason: str) -> None:
        self._reaper.allow(PATIENCE + ENDING)
        if self._line is not None:
            self._line.ask(f"{reason}; {self._where()}")
            time.sleep(PATIENCE)
            reason += "; rank 0 did not answer"  # or this process would be no more
        self._write_stacks(reason)
        print(
            f"error on rank {self._topology.launch.rank}: {reason}; {self._where()}; ending",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    def _where(self) -> str:
        return "stacks: " + ("standard error" if self._folder is None else str(self._stacks()))

    # ----------------------------------------------------------------------------------------------------- reporting

    def _stacks(self) -> Path:
        return (self._folder or Path()) / "stacks" / f"{self._number:08d}"

    def _write_stacks(self, reason: str) -> None:
        rank = self._topology.launch.rank
        head = f"rank {rank}, host {socket.gethostname()}, process {os.getpid()}, {time.ctime()}: {reason}\n"
        if self._folder is not None:
            with contextlib.suppress(OSError):
                self._stacks().mkdir(parents=True, exist_ok=True)
                with (self._stacks() / f"rank_{rank:05d}.txt").open("w", encoding="utf-8") as file:
                    file.write(head)
                    file.flush()
                    faulthandler.dump_traceback(file)
                return
        print(head, file=sys.stderr, end="", flush=True)
        faulthandler.dump_traceback(sys.stderr)

    def _collectives(self) -> dict[str, int]:
        """How many collectives this rank has begun in each of its groups."""
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

    def _line_of_work(self) -> str:
        """Where the main thread is: the innermost line of this package."""
        frame = sys._current_frames().get(self._main or 0)
        innermost = frame
        while frame is not None and not frame.f_code.co_filename.startswith(_OURS):
            frame = frame.f_back
        frame = frame or innermost
        if frame is None:
            return "an unknown place"
        name = frame.f_code.co_filename.removeprefix(_OURS)
        return f"{name}:{frame.f_lineno} {frame.f_code.co_name}"
