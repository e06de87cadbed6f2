"""When a rank dies or fails, every rank learns which one and ends.

    with lifeline(launch, store, timeout, advice):
        ...  # all that needs the other ranks

Each rank holds one TCP connection to a monitor, a thread of rank 0, and says goodbye on it when it ends well. The
kernel closes the connections of a process that dies, whatever it was doing and whatever killed it, so a death shows at
once; and a slow, busy or stopped process, whose connections stand, is never taken for a dead one. A node that is gone,
or cut off, fails TCP's keep-alive after ``SILENCE`` seconds. The monitor tells every rank, whose listening thread
prints one line and ends the process without any clean-up, since that could wait for the dead rank.

A rank whose watchdog finds that the run stands still asks the monitor, which asks all ranks how far they have come and
then tells all to end.

The listening thread needs the GIL, which Python code yields in milliseconds and waiting collectives do not hold. A call
of foreign code that keeps it delays the end until it returns.
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

from megatron.parallel.launch import Launch
from megatron.parallel.stall import Place, verdict

SILENCE = 30  # s without an answer after which a node counts as gone
TOGETHER = 0.02  # s in which the processes of a node die together; shorter than the starter takes to end the others
DOUBT = 0.2  # s in which a failure may turn out to be due to a death
ENDING = 4  # s after which a process that was told to end is killed if it has not ended
ANSWERING = 8  # s in which every rank must have said how far it has come, stacks written

_KEY = "lifeline"
_LONGEST = 65536  # bytes of a message; more is not one of ours


@dataclasses.dataclass(frozen=True)
class Member:
    """A process of the run."""

    rank: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, process {self.pid})"


@contextlib.contextmanager
def lifeline(
    launch: Launch,
    store: dist.Store,
    timeout: float,
    advice: Callable[[], str],
    ends_anyway: Callable[[], bool] = lambda: False,
) -> Iterator["Line | None"]:
    """End this process when another rank dies or fails, and the others when this one does.

    An exception that leaves the block is told to all ranks. If another rank had died or failed before, which is then
    the reason of this exception, the process ends here with the line that names that rank. Otherwise the exception goes
    on, and the process has ``ENDING`` seconds to end. Nothing is started for a run of one process, which gets None.

    Args:
        launch: this process among all.
        store: reaches all ranks.
        timeout: seconds in which all ranks must have come.
        advice: what to tell the user when the run ends by a death; asked on one rank.
        ends_anyway: whether this process was told to end, as the others then are; their end is no failure to it.
    """
    if launch.world_size == 1:
        yield None
        return
    me = Member(launch.rank, socket.gethostname(), os.getpid())
    monitor = None
    if launch.rank == 0:
        monitor = _Monitor(launch.world_size, timeout)
        monitor.start()
        store.set(_KEY, json.dumps(monitor.whereabouts(launch) | {"first": dataclasses.asdict(me)}))
    line = Line(me, json.loads(store.get(_KEY)), advice, ends_anyway)
    try:
        yield line
    except BaseException as error:
        line.fail(error)
        raise
    line.leave(monitor)


class Line:
    """A rank's end of its connection. ``on_stall`` is what this rank does and answers when it is asked where it is."""

    on_stall: Callable[[str], Place] | None = None

    def __init__(
        self, me: Member, monitor: dict[str, Any], advice: Callable[[], str], ends_anyway: Callable[[], bool]
    ) -> None:
        self._me, self._advice, self._ends_anyway = me, advice, ends_anyway
        self._first = Member(**monitor["first"])
        self._blamed, self._left = threading.Event(), False
        self._errors = os.dup(2)  # libraries turn 2 away for moments, DeepSpeed while it tries out a compiler
        self._socket = _connect(monitor["addresses"], monitor["port"])
        os.register_at_fork(after_in_child=self._socket.close)  # or a forked helper's copy would keep the line open
        self._send(token=monitor["token"], member=dataclasses.asdict(me))
        self._thread = threading.Thread(target=self._listen, name="lifeline", daemon=True)
        self._thread.start()

    def fail(self, error: BaseException) -> None:
        """Tell that this rank fails. Returns if it is the first to."""
        told = next(iter(str(error).splitlines()), "") or type(error).__name__
        signal.alarm(ENDING)
        self._send(failed=told[:500])
        self._blamed.wait(ENDING / 2)

    def ask(self, reason: str) -> None:
        """Have all ranks say how far they have come, and end. Returns at once."""
        self._send(stalled=reason)

    def leave(self, monitor: "_Monitor | None") -> None:
        """Say goodbye. Rank 0 stays until all have."""
        self._left = monitor is None
        self._send(goodbye=True)
        if monitor is not None:
            monitor.join()
            if monitor.told:
                self._thread.join()  # which ends the process
            self._left = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _send(self, **message: Any) -> None:
        with contextlib.suppress(OSError):  # the listening thread learns of it too
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def _listen(self) -> None:
        """Wait for the last message, why to end, maybe after the question how far this rank is; or for rank 0's end."""
        peer, lost = _Peer(), f"{self._first} died"
        try:
            while data := self._socket.recv(4096):
                for news in peer.messages(data):
                    if "question" in news:
                        self._answer(news["question"])
                    elif self._me.rank in news["ranks"]:
                        return self._blamed.set()
                    else:
                        self._end(news["told"], speaks=self._me.rank == 0)
        except OSError as error:
            if not isinstance(error, ConnectionError):
                lost = f"{self._first} did not answer for {SILENCE} s ({error.strerror})"
        if not self._left:
            self._end(lost, speaks=self._me.rank == 1)

    def _answer(self, question: str) -> None:
        signal.alarm(ANSWERING + ENDING)  # the end follows in any case, and the file system may block
        place = None if self.on_stall is None else dataclasses.asdict(self.on_stall(question))
        self._send(place=place)

    def _end(self, told: str, speaks: bool) -> None:
        if self._ends_anyway():
            os._exit(0)
        signal.alarm(ENDING)  # the output, or the file system, may block
        try:
            os.write(self._errors, f"error on rank {self._me.rank}: {told}; ending\n".encode())
            sys.stdout.flush()
            if speaks:
                os.write(self._errors, f"{self._advice()}\n".encode())
        finally:
            os._exit(1)


class _Monitor(threading.Thread):
    """The thread of rank 0 at which all lines end. It is over when all ranks have said goodbye, or been told to end."""

    def __init__(self, world_size: int, timeout: float) -> None:
        super().__init__(name="monitor", daemon=True)
        self.told = False
        self._world_size, self._timeout = world_size, timeout
        self._token = secrets.token_hex()  # so that whatever else connects to the port is not taken for a rank
        _allow_files(world_size)
        self._server = _serve(world_size)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)
        self._peers: dict[socket.socket, _Peer] = {}
        self._came: set[int] = set()
        self._gone: set[int] = set()
        self._died: dict[int, str] = {}  # rank -> what happened
        self._failed: dict[int, str] = {}
        self._stalled: str | None = None  # why a rank thinks so
        self._places: dict[int, Place | None] = {}  # of those who have answered
        os.register_at_fork(after_in_child=self._close)

    def whereabouts(self, launch: Launch) -> dict[str, Any]:
        """What a rank needs in order to connect."""
        return {"addresses": _addresses(launch), "port": self._server.getsockname()[1], "token": self._token}

    def run(self) -> None:
        """Watch the lines."""
        latest = time.monotonic() + self._timeout
        while len(self._gone) < self._world_size:
            waits = len(self._came) < self._world_size
            self._turn(max(0, latest - time.monotonic()) if waits else None)
            if waits and time.monotonic() >= latest:
                for rank in set(range(self._world_size)) - self._came:
                    self._died[rank] = f"rank {rank} did not come within {self._timeout:g} s"
            if self._stalled is not None:
                self._ask()
            if self._died or self._failed or self._stalled is not None:
                self._gather()
                self._tell()
                return

    def _ask(self) -> None:
        """Ask every rank how far it has come, and wait for the answers, or for a death."""
        self._send({"question": self._stalled})
        end = time.monotonic() + ANSWERING
        while len(self._places) < len(self._peers) and not self._died and (rest := end - time.monotonic()) > 0:
            self._turn(rest)

    def _gather(self) -> None:
        """Take in what belongs to the first news: the death that made a rank fail, and deaths at the same time."""
        end = time.monotonic() + (DOUBT if self._stalled is None else 0)
        while not self._died and (rest := end - time.monotonic()) > 0:
            self._turn(rest)
        end = time.monotonic() + TOGETHER
        while (rest := end - time.monotonic()) > 0:
            self._turn(rest)

    def _turn(self, timeout: float | None) -> None:
        """Wait for news on any line and take them in."""
        for key, _ in self._selector.select(timeout):
            if key.fileobj is self._server:
                with contextlib.suppress(OSError):
                    connection, _ = self._server.accept()
                    connection.setblocking(False)
                    _keep_alive(connection)
                    self._peers[connection] = _Peer()
                    self._selector.register(connection, selectors.EVENT_READ)
            else:
                self._read(key.fileobj)

    def _read(self, connection: socket.socket) -> None:
        peer, end = self._peers[connection], None
        try:
            data = connection.recv(4096)
            end = None if data else "died"
            for message in peer.messages(data):
                self._take(peer, message)
        except BlockingIOError:
            return
        except ConnectionError:
            end = "died"
        except OSError as error:
            end = f"did not answer for {SILENCE} s ({error.strerror})"
        except (ValueError, KeyError, TypeError):
            end = "sent what is no message"
        if end is None:
            return
        self._selector.unregister(connection)
        del self._peers[connection]
        connection.close()
        if peer.member and peer.member.rank not in self._gone | self._failed.keys():
            self._died[peer.member.rank] = f"{peer.member} {end}"

    def _take(self, peer: "_Peer", message: dict[str, Any]) -> None:
        if peer.member is None:
            if message["token"] != self._token:
                raise ValueError("not one of this run")
            peer.member = Member(**message["member"])
            self._came.add(peer.member.rank)
            if len(self._came) == self._world_size:
                self._selector.unregister(self._server)
                self._server.close()
        elif "failed" in message:
            self._failed[peer.member.rank] = f"{peer.member} failed: {message['failed']}"
        elif "stalled" in message:
            self._stalled = self._stalled or message["stalled"]
        elif "place" in message:
            self._places[peer.member.rank] = Place.from_json(message["place"])
        elif "goodbye" in message:
            self._gone.add(peer.member.rank)

    def _tell(self) -> None:
        """Deaths only, if there are any: ranks then fail because they miss the dead."""
        self.told = True
        what = self._died or self._failed
        told = list(what.values())
        if len(told) > 8:
            told[8:] = [f"and {len(told) - 8} others"]
        if not what:
            members = {peer.member.rank: peer.member for peer in self._peers.values() if peer.member}
            places = {rank: self._places.get(rank) for rank in members}
            told = [f"{self._stalled}; {verdict(places, {rank: str(member) for rank, member in members.items()})}"]
        self._send({"told": ", ".join(told), "ranks": list(what)})

    def _send(self, content: dict[str, Any]) -> None:
        message = json.dumps(content).encode() + b"\n"
        for connection in reversed(self._by_rank()):  # this process last, since it may end when it hears
            with contextlib.suppress(OSError):
                connection.send(message)

    def _by_rank(self) -> list[socket.socket]:
        members = {peer.member.rank: connection for connection, peer in self._peers.items() if peer.member}
        return [members[rank] for rank in sorted(members)]

    def _close(self) -> None:
        for connection in (self._server, *self._peers):
            connection.close()


@dataclasses.dataclass
class _Peer:
    """The monitor's end of a line."""

    member: Member | None = None
    received: bytes = b""

    def messages(self, data: bytes) -> list[dict[str, Any]]:
        """The messages that ``data`` completes."""
        *lines, self.received = (self.received + data).split(b"\n")
        if len(self.received) > _LONGEST:
            raise ValueError("too long")
        return [json.loads(line) for line in lines]


def _serve(backlog: int) -> socket.socket:
    """A listening socket on all interfaces, at any free port."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog)
    return socket.create_server(("", 0), backlog=backlog)


def _addresses(launch: Launch) -> list[str]:
    """Where other nodes may reach this process, the likeliest first.

    Under torchrun the meeting point can be another node than rank 0's. The address from which this node reaches it is
    one on the network that all nodes share. If that is a loopback address, the meeting point is this node.
    """
    found = []
    with contextlib.suppress(OSError):
        meeting = socket.getaddrinfo(launch.master_addr, launch.master_port, type=socket.SOCK_DGRAM)
        for family, kind, protocol, _, address in meeting:
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.connect(address)  # sends nothing
                own = probe.getsockname()[0]
                found.append(launch.master_addr if ipaddress.ip_address(own).is_loopback else own)
    return list(dict.fromkeys([*found, socket.gethostname()]))


def _connect(addresses: Sequence[str], port: int) -> socket.socket:
    problems = []
    for address in addresses:
        try:
            connection = socket.create_connection((address, port), timeout=SILENCE)
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
    """Make the kernel end the connection when the other node has not answered for ``SILENCE`` seconds."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", max(1, SILENCE // 3)),
        ("TCP_KEEPINTVL", max(1, SILENCE // 6)),
        ("TCP_KEEPCNT", 4),
        ("TCP_USER_TIMEOUT", 1000 * SILENCE),  # ms; also ends it when sent data is not acknowledged
    ):
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _allow_files(connections: int) -> None:
    """Raise the soft limit on open files so that ``connections`` fit beside what a trainer opens."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + 1024
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
