"""Processes that die, fail, stop or exit normally, and what the others do."""

import contextlib
import ctypes
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch.distributed as dist
from distributed.spawn import _start_server

from megatron.parallel import failure_monitor
from megatron.parallel.failure_monitor import monitor_failures
from megatron.parallel.launch import Launch


def _process(folder: str, rank: int, world_size: int, work: Callable, master: str, options: dict) -> None:
    output = os.open(f"{folder}/output-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    for name, value in options.get("constants", {}).items():
        setattr(failure_monitor, name, value)
    if "namespaces" in options:
        descriptor = os.open(f"/run/netns/{options['namespaces'][rank]}", os.O_RDONLY)
        assert ctypes.CDLL(None).setns(descriptor, 0x40000000) == 0  # CLONE_NEWNET
    launch = Launch(rank, world_size, rank, master, 29999, "launcher")
    store = dist.FileStore(f"{folder}/store", world_size)
    is_stopping = options.get("is_stopping", False)
    with monitor_failures(launch, store, options.get("timeout", 60), lambda: "advice", lambda: is_stopping):
        Path(f"{folder}/joined-{rank}").touch()
        work(rank)


class Ranks:
    """Processes that run ``work(rank)`` with their failures monitored."""

    def __init__(self, folder: Path, world_size: int, work: Callable, master: str = "127.0.0.1", **options) -> None:
        self._folder = folder
        context = _start_server()
        missing = options.pop("missing", ())
        self.processes: list[BaseProcess] = [
            context.Process(target=_process, args=(str(folder), rank, world_size, work, master, options))
            for rank in range(world_size)
            if rank not in missing
        ]
        for process in self.processes:
            process.start()

    def wait_until_joined(self) -> None:
        end = time.monotonic() + 30
        while len(list(self._folder.glob("joined-*"))) < len(self.processes):
            assert time.monotonic() < end, self.outputs()
            time.sleep(0.01)

    def signal(self, rank: int, number: int) -> None:
        os.kill(self.processes[rank].pid, number)

    def ended(self, within: float = 5.0) -> tuple[list[int], list[str]]:
        """Exit status and output of each process. All must end in time."""
        end = time.monotonic() + within
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
        late = [process.pid for process in self.processes if process.is_alive()]
        for process in self.processes:
            process.kill()
        assert not late, self.outputs()
        return [process.exitcode for process in self.processes], self.outputs()

    def outputs(self) -> list[str]:
        return [file.read_text() for file in sorted(self._folder.glob("output-*"))]

    def name(self, rank: int) -> str:
        return f"rank {rank} (host {socket.gethostname()}, process {self.processes[rank].pid})"


def busy(rank: int) -> None:
    if rank == 1:
        while True:
            pass
    time.sleep(600)


@pytest.mark.parametrize("dead", [0, 2])
def test_a_death_names_the_rank_and_ends_all(tmp_path, dead):
    ranks = Ranks(tmp_path, 3, busy)
    ranks.wait_until_joined()
    ranks.signal(dead, signal.SIGKILL)
    codes, outputs = ranks.ended()
    advisor = 1 if dead == 0 else 0
    for rank in {0, 1, 2} - {dead}:
        advice = "advice\n" if rank == advisor else ""
        assert codes[rank] == 1
        assert outputs[rank] == f"error on rank {rank}: {ranks.name(dead)} died; ending\n{advice}"


def test_a_death_is_no_error_on_a_rank_that_is_being_stopped(tmp_path):
    ranks = Ranks(tmp_path, 3, busy, is_stopping=True)
    ranks.wait_until_joined()
    ranks.signal(1, signal.SIGKILL)
    codes, outputs = ranks.ended()
    assert (codes[0], codes[2]) == (0, 0)
    assert outputs == ["", "", ""]


def fork_helpers(rank: int) -> None:
    if os.fork() == 0:
        time.sleep(20)
        os._exit(0)
    subprocess.Popen(["sleep", "20"], close_fds=False)
    time.sleep(600)


@pytest.mark.parametrize("dead", [0, 1])
def test_helper_processes_do_not_hide_a_death(tmp_path, dead):
    ranks = Ranks(tmp_path, 2, fork_helpers)
    ranks.wait_until_joined()
    time.sleep(0.2)
    ranks.signal(dead, signal.SIGKILL)
    _, outputs = ranks.ended()
    assert f"{ranks.name(dead)} died" in outputs[1 - dead]


def sleep_a_bit(rank: int) -> None:
    time.sleep(0.3 * rank)


def test_ranks_that_exit_normally_at_different_times_print_nothing(tmp_path):
    codes, outputs = Ranks(tmp_path, 3, sleep_a_bit).ended()
    assert codes == [0, 0, 0]
    assert outputs == ["", "", ""]


def sleep_two_seconds(rank: int) -> None:
    time.sleep(2)


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_process_is_not_taken_for_a_dead_one(tmp_path, stopped):
    ranks = Ranks(tmp_path, 2, sleep_two_seconds, constants={"KEEPALIVE_SECONDS": 1})
    ranks.wait_until_joined()
    ranks.signal(stopped, signal.SIGSTOP)
    time.sleep(3)
    ranks.signal(stopped, signal.SIGCONT)
    assert ranks.ended() == ([0, 0], ["", ""])


def fail_on_one(rank: int) -> None:
    if rank == 1:
        threading.Thread(target=time.sleep, args=(600,)).start()  # keeps the process, as destructors may
        raise ValueError("the disk is on fire\nand more")
    time.sleep(600)


def test_a_failure_is_reported_with_its_message_and_cannot_hang(tmp_path):
    ranks = Ranks(tmp_path, 3, fail_on_one)
    codes, outputs = ranks.ended(within=8)
    assert "ValueError: the disk is on fire" in outputs[1]
    assert codes[0] == codes[2] == 1
    assert codes[1] == -signal.SIGALRM
    assert outputs[2] == f"error on rank 2: {ranks.name(1)} failed: the disk is on fire; ending\n"


def fail_when_another_dies(rank: int) -> None:
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.1)
    raise RuntimeError("connection closed by peer")


def test_failures_that_follow_from_a_death_are_not_reported(tmp_path):
    ranks = Ranks(tmp_path, 3, fail_when_another_dies)
    _, outputs = ranks.ended()
    assert outputs[1] == f"error on rank 1: {ranks.name(2)} died; ending\n"
    assert outputs[0] == f"error on rank 0: {ranks.name(2)} died; ending\nadvice\n"


def test_a_rank_that_does_not_connect_is_named(tmp_path):
    codes, outputs = Ranks(tmp_path, 3, busy, timeout=1, missing=(2,)).ended()
    assert codes == [1, 1]
    assert outputs[0] == "error on rank 0: rank 2 did not come within 1 s; ending\nadvice\n"


def test_strangers_are_ignored(tmp_path):
    ranks = Ranks(tmp_path, 3, sleep_a_bit, missing=(1,))
    ranks.wait_until_joined()
    endpoint = json.loads(dist.FileStore(f"{tmp_path}/store", 3).get("failure_monitor"))
    for greeting in (b"", b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"token": "guess", "process": {}}\n', b"x" * 100_000):
        with socket.create_connection(("127.0.0.1", endpoint["port"])) as stranger:
            stranger.sendall(greeting)
    time.sleep(0.3)
    late = Ranks(tmp_path, 3, sleep_a_bit, missing=(0, 2))
    assert (*ranks.ended()[0], *late.ended()[0]) == (0, 0, 0)
    assert ranks.outputs() == ["", "", ""]


def test_one_process_starts_nothing():
    before = threading.active_count()
    with monitor_failures(Launch(0, 1, 0, "127.0.0.1", 0, "python"), None, 1.0, str):
        assert threading.active_count() == before


def monitor_many(folder: str, count: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    server = failure_monitor._MonitorServer(count, 60)
    server.start()
    endpoint = server.endpoint(Launch(0, count, 0, "127.0.0.1", 1, "launcher"))
    before = threading.active_count()
    connections = []
    for rank in range(count):
        connections.append(failure_monitor._connect(["127.0.0.1"], endpoint["port"]))
        process = {"rank": rank, "host": "h", "pid": 1}
        connections[-1].sendall(json.dumps({"token": endpoint["token"], "process": process}).encode() + b"\n")
    assert threading.active_count() == before
    connections.pop(7).close()
    for connection in connections:
        assert json.loads(connection.recv(4096)) == {"reason": "rank 7 (host h, process 1) died", "ranks": [7]}
    Path(folder, "done").touch()


def test_a_thousand_ranks_take_one_thread(tmp_path):
    process = _start_server().Process(target=monitor_many, args=(str(tmp_path), 1000))
    process.start()
    process.join(30)
    process.kill()
    assert (tmp_path / "done").exists()


@contextlib.contextmanager
def two_nodes() -> Iterator[tuple[list[str], str, Callable[[], None]]]:
    """Two connected network namespaces: their names, the address of the first, and a function that cuts the link."""
    names = [f"monitor-{number}-{os.getpid()}" for number in (0, 1)]

    def ip(words: str) -> None:
        subprocess.run(["ip", *words.split()], check=True)

    try:
        for name in names:
            ip(f"netns add {name}")
        ip(f"-n {names[0]} link add cable type veth peer name cable netns {names[1]}")
        for number, name in enumerate(names):
            ip(f"-n {name} address add 10.99.0.{number + 1}/24 dev cable")
            ip(f"-n {name} link set cable up")
            ip(f"-n {name} link set lo up")
        yield names, "10.99.0.1", lambda: ip(f"-n {names[1]} link set cable down")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False)


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="makes networks, which only root can")
@pytest.mark.parametrize("master", [0, 1])
def test_a_node_that_is_cut_off_ends_on_both_sides(tmp_path, master):
    """Also: ranks find each other over the network, wherever the rendezvous is."""
    try:
        network = two_nodes()
        names, first, cut = network.__enter__()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error}")
    with contextlib.ExitStack() as stack:
        stack.push(network.__exit__)
        address = first if master == 0 else "10.99.0.2"
        ranks = Ranks(tmp_path, 2, busy, address, namespaces=names, constants={"KEEPALIVE_SECONDS": 2})
        ranks.wait_until_joined()
        cut()
        codes, outputs = ranks.ended(within=10)
    assert codes == [1, 1]
    assert f"{ranks.name(1)} did not answer for 2 s" in outputs[0]
    assert f"{ranks.name(0)} did not answer for 2 s" in outputs[1]
