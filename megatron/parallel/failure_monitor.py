"""Ends every rank of a run when one of them dies, fails or hangs, and names that rank.

    with monitor_failures(launch, store, timeout, advice):
        ...  # everything that needs the other ranks

Each rank keeps one TCP connection to a monitor thread on rank 0 and sends a goodbye before it exits normally. When a
process dies, the kernel closes its connection, so the monitor learns of a death at once, whatever caused it; a slow,
busy or stopped process keeps its connection and is never mistaken for a dead one. A node that is down or cut off fails
TCP's keep-alive after ``KEEPALIVE_SECONDS``. The monitor then notifies all ranks. A listener thread on each rank prints
one line and ends the process without cleaning up, because cleaning up could wait for the dead rank.

A rank whose watchdog finds a hang reports it to the monitor, which asks all ranks for their progress
(:mod:`megatron.parallel.hang_report`) and then ends them.

The listener thread needs the GIL. Python code yields it within milliseconds, and waiting collectives do not hold it. A
call into foreign code that holds the GIL delays the exit until it returns.
"""

import contextlib
import dataclasses
import ipaddress
import json
import os
import resource
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch.distributed as dist

from megatron.parallel.hang_report import RankState, describe_hang
from megatron.parallel.launch import Launch

KEEPALIVE_SECONDS = 30  # a node that does not answer for this long counts as gone
SIMULTANEOUS_SECONDS = 0.02  # deaths within this time are reported together; the launcher takes longer to end the rest
FAILURE_GRACE_SECONDS = 0.2  # a failure may turn out to follow from a death that is seen within this time
EXIT_SECONDS = 4  # a process that must exit is killed after this time
REPORT_SECONDS = 8  # every rank has this long to write its stacks and report its progress

_STORE_KEY = "failure_monitor"
_MAX_MESSAGE_BYTES = 65536  # longer messages do not come from this module


@dataclasses.dataclass(frozen=True)
class RankProcess:
    """A process of the run."""

    rank: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, process {self.pid})"


@contextlib.contextmanager
def monitor_failures(
    launch: Launch,
    store: dist.Store,
    timeout: float,
    advice: Callable[[], str],
    is_stopping: Callable[[], bool] = lambda: False,
) -> Iterator["FailureMonitor | None"]:
    """End this process when another rank dies or fails, and the other ranks when this one does.

    An exception that leaves the block is reported to all ranks. If it follows from the earlier death or failure of
    another rank, the process ends here with a line that names that rank. Otherwise the exception propagates, and the
    process has ``EXIT_SECONDS`` to exit. A run of a single process starts nothing and gets None.

    Args:
        launch: this process's rank and world size.
        store: shared by all ranks.
        timeout: seconds within which all ranks must connect.
        advice: returns what the user can do next; called on one rank when the run ends.
        is_stopping: returns whether this process is being stopped. Other ranks are then stopped too, and the end of
            one of them is not an error.
    """
    if launch.world_size == 1:
        yield None
        return
    process = RankProcess(launch.rank, socket.gethostname(), os.getpid())
    server = None
    if launch.rank == 0:
        server = _MonitorServer(launch.world_size, timeout)
        server.start()
        store.set(_STORE_KEY, json.dumps(server.endpoint(launch) | {"first": dataclasses.asdict(process)}))
    monitor = FailureMonitor(process, json.loads(store.get(_STORE_KEY)), advice, is_stopping)
    try:
        yield monitor
    except BaseException as error:
        monitor.report_failure(error)
        raise
    monitor.close(server)


class FailureMonitor:
    """A rank's connection to the monitor on rank 0.

    Attributes:
        on_hang: called with the reason of a hang; returns this rank's state. None if nothing can be reported.
    """

    on_hang: Callable[[str], RankState] | None = None

    def __init__(
        self,
        process: RankProcess,
        endpoint: dict[str, Any],
        advice: Callable[[], str],
        is_stopping: Callable[[], bool],
    ) -> None:
        self._process, self._advice, self._is_stopping = process, advice, is_stopping
        self._first = RankProcess(**endpoint["first"])
        self._is_cause, self._closed = threading.Event(), False
        self._stderr = os.dup(2)  # libraries redirect 2 temporarily, as DeepSpeed does while it tries a compiler
        self._socket = _connect(endpoint["addresses"], endpoint["port"])
        os.register_at_fork(after_in_child=self._socket.close)  # or a forked child would keep the connection open
        self._send(token=endpoint["token"], process=dataclasses.asdict(process))
        self._thread = threading.Thread(target=self._listen, name="failure monitor", daemon=True)
        self._thread.start()

    def report_failure(self, error: BaseException) -> None:
        """Report that this rank fails. Returns only if no other rank died or failed before."""
        message = next(iter(str(error).splitlines()), "") or type(error).__name__
        signal.alarm(EXIT_SECONDS)
        self._send(failed=message[:500])
        self._is_cause.wait(EXIT_SECONDS / 2)

    def report_hang(self, reason: str) -> None:
        """Have all ranks report their progress and exit. Returns at once."""
        self._send(hang=reason)

    def close(self, server: "_MonitorServer | None") -> None:
        """Say goodbye. Rank 0, which runs the server, waits for the goodbyes of all ranks."""
        self._closed = server is None
        self._send(goodbye=True)
        if server is not None:
            server.join()
            if server.ended_run:
                self._thread.join()  # which ends the process
            self._closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _send(self, **message: Any) -> None:
        with contextlib.suppress(OSError):  # the listener thread sees the broken connection too
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def _listen(self) -> None:
        """Wait for the message that ends the run, or for rank 0's death; answer requests for this rank's state."""
        messages, reason = _MessageReader(), f"{self._first} died"
        try:
            while data := self._socket.recv(4096):
                for message in messages.feed(data):
                    if "hang" in message:
                        self._report_state(message["hang"])
                    elif self._process.rank in message["ranks"]:
                        return self._is_cause.set()
                    else:
                        self._exit(message["reason"], with_advice=self._process.rank == 0)
        except OSError as error:
            if not isinstance(error, ConnectionError):
                reason = f"{self._first} did not answer for {KEEPALIVE_SECONDS} s ({error.strerror})"
        if not self._closed:
            self._exit(reason, with_advice=self._process.rank == 1)

    def _report_state(self, reason: str) -> None:
        signal.alarm(REPORT_SECONDS + EXIT_SECONDS)  # this process ends in any case, and the file system may block
        self._send(state=None if self.on_hang is None else dataclasses.asdict(self.on_hang(reason)))

    def _exit(self, reason: str, with_advice: bool) -> None:
        if self._is_stopping():
            os._exit(0)
        signal.alarm(EXIT_SECONDS)  # the output or the file system may block
        try:
            os.write(self._stderr, f"error on rank {self._process.rank}: {reason}; ending\n".encode())
            sys.stdout.flush()
            if with_advice:
                os.write(self._stderr, f"{self._advice()}\n".encode())
        finally:
            os._exit(1)


class _MonitorServer(threading.Thread):
    """The monitor thread on rank 0. It finishes when all ranks have said goodbye, or when it has ended the run."""

    def __init__(self, world_size: int, timeout: float) -> None:
        super().__init__(name="failure monitor server", daemon=True)
        self.ended_run = False
        self._world_size, self._timeout = world_size, timeout
        self._token = secrets.token_hex()  # tells the ranks of this run from anything else that connects to the port
        _allow_files(world_size)
        self._listener = _listening_socket(world_size)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._connections: list[_Connection] = []
        self._connected: set[int] = set()
        self._finished: set[int] = set()
        self._died: dict[int, str] = {}  # rank -> what happened
        self._failed: dict[int, str] = {}
        self._hang: str | None = None  # the reason, in the words of the rank that reported it
        self._states: dict[int, RankState | None] = {}  # of the ranks that have answered
        os.register_at_fork(after_in_child=self._close_sockets)

    def endpoint(self, launch: Launch) -> dict[str, Any]:
        """What a rank needs to connect."""
        return {"addresses": _addresses(launch), "port": self._listener.getsockname()[1], "token": self._token}

    def run(self) -> None:
        """Watch the connections."""
        deadline = time.monotonic() + self._timeout
        while len(self._finished) < self._world_size:
            incomplete = len(self._connected) < self._world_size
            self._poll(max(0, deadline - time.monotonic()) if incomplete else None)
            if incomplete and time.monotonic() >= deadline:
                for rank in set(range(self._world_size)) - self._connected:
                    self._died[rank] = f"rank {rank} did not come within {self._timeout:g} s"
            if self._hang is not None:
                self._gather_states()
            if self._died or self._failed or self._hang is not None:
                self._wait_for_causes()
                self._end_run()
                return

    def _gather_states(self) -> None:
        """Ask every rank for its state and wait for the answers, or for a death."""
        self._broadcast({"hang": self._hang})
        deadline = time.monotonic() + REPORT_SECONDS
        while len(self._states) < len(self._connections) and not self._died:
            if (left := deadline - time.monotonic()) <= 0:
                break
            self._poll(left)

    def _wait_for_causes(self) -> None:
        """Wait briefly for the death that made a rank fail, and for deaths at the same time."""
        deadline = time.monotonic() + (FAILURE_GRACE_SECONDS if self._hang is None else 0)
        while not self._died and (left := deadline - time.monotonic()) > 0:
            self._poll(left)
        deadline = time.monotonic() + SIMULTANEOUS_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            self._poll(left)

    def _poll(self, timeout: float | None) -> None:
        """Wait for events on any connection and handle them."""
        for key, _ in self._selector.select(timeout):
            if key.data is not None:
                self._read(key.data)
                continue
            with contextlib.suppress(OSError):
                accepted, _ = self._listener.accept()
                accepted.setblocking(False)
                _keep_alive(accepted)
                self._connections.append(_Connection(accepted))
                self._selector.register(accepted, selectors.EVENT_READ, self._connections[-1])

    def _read(self, connection: "_Connection") -> None:
        end = None
        try:
            data = connection.socket.recv(4096)
            end = None if data else "died"
            for message in connection.messages.feed(data):
                self._handle(connection, message)
        except BlockingIOError:
            return
        except ConnectionError:
            end = "died"
        except OSError as error:
            end = f"did not answer for {KEEPALIVE_SECONDS} s ({error.strerror})"
        except (ValueError, KeyError, TypeError):
            end = "sent an invalid message"
        if end is None:
            return
        self._selector.unregister(connection.socket)
        self._connections.remove(connection)
        connection.socket.close()
        process = connection.process
        if process is not None and process.rank not in self._finished | self._failed.keys():
            self._died[process.rank] = f"{process} {end}"

    def _handle(self, connection: "_Connection", message: dict[str, Any]) -> None:
        if connection.process is None:
            if message["token"] != self._token:
                raise ValueError("not a rank of this run")
            connection.process = RankProcess(**message["process"])
            self._connected.add(connection.process.rank)
            if len(self._connected) == self._world_size:
                self._selector.unregister(self._listener)
                self._listener.close()
            return
        rank = connection.process.rank
        if "failed" in message:
            self._failed[rank] = f"{connection.process} failed: {message['failed']}"
        elif "hang" in message:
            self._hang = self._hang or message["hang"]
        elif "state" in message:
            self._states[rank] = RankState.from_json(message["state"])
        elif "goodbye" in message:
            self._finished.add(rank)

    def _end_run(self) -> None:
        """End all ranks. Names only the deaths, if there are any: the other ranks then fail because of them."""
        self.ended_run = True
        causes = self._died or self._failed
        reasons = list(causes.values())
        if len(reasons) > 8:
            reasons[8:] = [f"and {len(reasons) - 8} others"]
        if not causes:
            names = {rank: str(connection.process) for rank, connection in self._by_rank()}
            reasons = [f"{self._hang}; {describe_hang({rank: self._states.get(rank) for rank in names}, names)}"]
        self._broadcast({"reason": ", ".join(reasons), "ranks": list(causes)})

    def _broadcast(self, content: dict[str, Any]) -> None:
        message = json.dumps(content).encode() + b"\n"
        for _, connection in reversed(self._by_rank()):  # this process last: it may end on receiving the message
            with contextlib.suppress(OSError):
                connection.socket.send(message)

    def _by_rank(self) -> list[tuple[int, "_Connection"]]:
        found = {each.process.rank: each for each in self._connections if each.process is not None}
        return sorted(found.items())

    def _close_sockets(self) -> None:
        for each in (self._listener, *(connection.socket for connection in self._connections)):
            each.close()


class _MessageReader:
    """Splits received bytes into JSON messages, one per line."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """The messages that ``data`` completes."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _MAX_MESSAGE_BYTES:
            raise ValueError(f"a message of more than {_MAX_MESSAGE_BYTES} bytes")
        return [json.loads(line) for line in lines]


@dataclasses.dataclass(eq=False)
class _Connection:
    """The server's end of a rank's connection. ``process`` is None until the rank has introduced itself."""

    socket: socket.socket
    process: RankProcess | None = None
    messages: _MessageReader = dataclasses.field(default_factory=_MessageReader)


def _listening_socket(backlog: int) -> socket.socket:
    """A listening socket on all interfaces, at any free port."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog)
    return socket.create_server(("", 0), backlog=backlog)


def _addresses(launch: Launch) -> list[str]:
    """Addresses at which other nodes may reach this process, the likeliest first.

    Under torchrun the rendezvous may be on another node than rank 0. The address from which this node reaches it is on
    the network that all nodes share. If that is a loopback address, the rendezvous is on this node.
    """
    found = []
    with contextlib.suppress(OSError):
        candidates = socket.getaddrinfo(launch.master_addr, launch.master_port, type=socket.SOCK_DGRAM)
        for family, kind, protocol, _, address in candidates:
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.connect(address)  # sends nothing
                own = probe.getsockname()[0]
                found.append(launch.master_addr if ipaddress.ip_address(own).is_loopback else own)
    return list(dict.fromkeys([*found, socket.gethostname()]))


def _connect(addresses: Sequence[str], port: int) -> socket.socket:
    problems = []
    for address in addresses:
        try:
            connection = socket.create_connection((address, port), timeout=KEEPALIVE_SECONDS)
            connection.settimeout(None)
            _keep_alive(connection)
            return connection
        except OSError as error:
            problems.append(f"{address}: {error}")
    raise ConnectionError(
        f"cannot reach rank 0 at port {port} of {'; '.join(problems)}. Let the nodes of the run reach each other on "
        "all TCP ports, and set MASTER_ADDR to an address of the network that they share"
    )


def _keep_alive(connection: socket.socket) -> None:
    """Make the kernel close the connection when the other node has not answered for ``KEEPALIVE_SECONDS``."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", max(1, KEEPALIVE_SECONDS // 3)),
        ("TCP_KEEPINTVL", max(1, KEEPALIVE_SECONDS // 6)),
        ("TCP_KEEPCNT", 4),
        ("TCP_USER_TIMEOUT", 1000 * KEEPALIVE_SECONDS),  # ms; also when sent data is not acknowledged
    ):
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _allow_files(connections: int) -> None:
    """Raise the soft limit on open files so that ``connections`` fit beside what a trainer opens."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + 1024
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
