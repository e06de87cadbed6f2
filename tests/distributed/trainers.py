"""Jobs of real trainer processes that start in a moment, and that can be killed at a chosen one.

    with trainers.server() as server:
        job = server.start(4, tiny_run.flags(...), dies=Death(rank=2, phase="validate"))
        job.wait()

The processes are forked from a server (trainer_server.py), which has imported all that a trainer needs. They get the
environment that a starter of processes sets, parse their flags and end with their exit status, as
``pretrain_gpt_moe.py`` does.
"""

import contextlib
import dataclasses
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import tiny_run


@dataclasses.dataclass
class Death:
    """SIGKILL for ``rank``, ``delay`` s after it enters ``phase`` for the ``call``-th time.

    The phases are the server's PHASES, and ``joined``: all ranks are connected to the failure monitor and start to
    build groups. With ``hangs`` it is no death: the rank stops "in Python" or "in C", where it holds the GIL.
    """

    rank: int
    phase: str
    call: int = 1
    delay: float = 0.0
    hangs: str = ""
    sleeps: float = 0.0  # or it goes on after so many s


class Job:
    """The processes of one run."""

    def __init__(self, server: "Server", pids: list[int], folder: Path) -> None:
        self._server, self.pids, self._folder = server, pids, folder

    def wait(self, timeout: float = 60) -> list[int]:
        """Every rank's exit status, negative for a signal, when all have ended."""
        try:
            self._server.listen_until(lambda: self._server.ended.keys() >= set(self.pids), timeout)
        except TimeoutError:
            raise TimeoutError(f"not ended after {timeout} s; output:\n{self.output()}") from None
        return [self._server.ended[pid][0] for pid in self.pids]

    def seconds_to_end(self) -> float:
        """From the end of the first process to the end of the last."""
        times = [self._server.ended[pid][1] for pid in self.pids]
        return max(times) - min(times)

    def output(self, rank: int | None = None) -> str:
        """What one rank printed, or all did."""
        ranks = range(len(self.pids)) if rank is None else (rank,)
        return "".join((self._folder / f"output-{rank}").read_text() for rank in ranks)


class Server:
    """Talks to the program."""

    def __init__(self, process: subprocess.Popen, folder: Path) -> None:
        self._process, self._folder, self._jobs = process, folder, 0
        self._joined: set[int] = set()
        self.ended: dict[int, tuple[int, float]] = {}  # pid -> status, when (s, monotonic)
        self._started: list[int] = []

    def start(
        self,
        ranks: int,
        arguments: list[str],
        dies: Death | None = None,
        faults: Mapping[int, Sequence[str]] | None = None,
        one_node_each: bool = False,
        hooks: Sequence[str] = (),
    ) -> Job:
        """Start ``ranks`` processes with these flags.

        Args:
            ranks: how many.
            arguments: flags.
            dies: what happens to one of them.
            faults: what is wrong with some ranks' nodes, in words of faults.py.
            one_node_each: each process takes itself for a node of its own.
            hooks: classes of user_hooks.py, one hook of each.
        """
        folder = self._folder / f"job-{self._jobs}"
        folder.mkdir()
        self._jobs += 1
        self._started = []
        places = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        for rank in range(ranks):
            (folder / f"output-{rank}").touch()
            local = {"GROUP_RANK": str(rank), "LOCAL_RANK": "0"} if one_node_each else {"LOCAL_RANK": str(rank)}
            order = {
                "environment": places | {"RANK": str(rank)} | local,
                "faults": (faults or {}).get(rank, ()),
                "hooks": list(hooks),
                "arguments": arguments,
                "output": str(folder / f"output-{rank}"),
                "dies": dataclasses.asdict(dies) if dies and dies.rank == rank and dies.phase != "joined" else None,
            }
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        self.listen_until(lambda: len(self._started) == ranks)
        job = Job(self, list(self._started), folder)
        if dies and dies.phase == "joined":
            self.listen_until(lambda: self._joined.issuperset(job.pids))
            time.sleep(dies.delay)
            os.kill(job.pids[dies.rank], signal.SIGKILL)
        return job

    def train(self, ranks: int, arguments: list[str]) -> Job:
        """Start ``ranks`` processes and wait until all have ended well."""
        job = self.start(ranks, arguments)
        assert job.wait() == [0] * ranks, job.output()
        return job

    def listen_until(self, condition: Callable[[], bool], timeout: float = 60) -> None:
        """Take in what the server and its children tell until ``condition()`` holds."""
        end = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > end:
                raise TimeoutError(f"waited for {timeout} s")
            ready, _, _ = select.select([self._process.stdout], [], [], 0.02)
            if not ready:
                continue
            word, pid, *rest = self._process.stdout.readline().split()
            if word == b"started":
                self._started.append(int(pid))
            elif word == b"joined":
                self._joined.add(int(pid))
            elif word == b"ended":
                self.ended[int(pid)] = int(rest[0]), float(rest[1])


@contextlib.contextmanager
def server() -> Iterator[Server]:
    """A running server, which ends with its jobs when the block does."""
    process = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("trainer_server.py")], env=tiny_run.environment(), cwd=tiny_run.ROOT,
        bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="trainers_") as folder, process:
        yield Server(process, Path(folder))
        process.stdin.close()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
