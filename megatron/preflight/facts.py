"""What one rank finds out about its node: device, versions, clock, disk, data."""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import secrets
import shutil
import socket
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.cuda.nccl
import torch.distributed as dist

from megatron.config import RunConfig
from megatron.data.corpora import find_corpora
from megatron.data.dataset_checks import open_problems
from megatron.data.index_file import read_index
from megatron.parallel.initialize import Topology, device_name
from megatron.preflight.speed import LinkSpeeds

TAKEN = 0.1  # share of a GPU's memory that may be in use before the run; a CUDA context takes less
_ROUNDS = 5  # of comparing clocks
_PACKAGES = ("torch", "deepspeed", "megatron-core", "triton", "numpy", "tokenizers")


@dataclasses.dataclass
class Facts:
    """Of one rank. What concerns a whole node is found by the node's first rank and is empty for the others."""

    rank: int
    node: int
    local_rank: int
    host: str
    device: str
    versions: Mapping[str, str]
    problems: list[str] = dataclasses.field(default_factory=list)
    clock: float = 0.0  # s ahead of rank 0's
    disk_free: float | None = None  # bytes where checkpoints go
    data: dict[str, int] = dataclasses.field(default_factory=dict)  # file -> bytes
    crowded: bool = False  # another program holds memory of the GPU
    computes: bool = True  # the device gave the right product
    tflops: float = 0.0
    inside: LinkSpeeds | None = None  # of the node
    pairs: dict[int, LinkSpeeds] = dataclasses.field(default_factory=dict)  # other node -> links of both together
    everywhere: LinkSpeeds | None = None

    @property
    def name(self) -> str:
        """For messages."""
        return f"rank {self.rank} (host {self.host}, {'GPU' if self.device != 'cpu' else 'process'} {self.local_rank})"


def look(config: RunConfig, topology: Topology, first_of_node: bool) -> Facts:
    """What this rank sees without the others."""
    launch, device = topology.launch, topology.device
    facts = Facts(launch.rank, launch.node, launch.local_rank, socket.gethostname(), device_name(device), versions())
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        facts.crowded = total - free > TAKEN * total
        if facts.crowded:
            facts.problems.append(
                f"{(total - free) / 1e9:.1f} of the GPU's {total / 1e9:.1f} GB are in use before the run; another "
                "program runs there, or the rest of one: nvidia-smi shows it"
            )
    if first_of_node:
        with _recording_problems(facts):
            facts.data, problems = read_data(config)
            facts.problems += problems
        if config.checkpoint.save is not None:
            with _recording_problems(facts):
                facts.disk_free = free_space(Path(config.checkpoint.save))
    return facts


def versions() -> dict[str, str]:
    """Of all that must be equal on all ranks."""
    found = {"python": platform.python_version(), "this code": code_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    if torch.cuda.is_available():
        found["CUDA"] = str(torch.version.cuda)
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    with contextlib.suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text()
        if match := re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", text):
            found["driver"] = match.group(1)
    return found


@functools.cache
def code_version() -> str:
    """Twelve letters that change with any line of this package."""
    digest, root = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if name.parts[0] != "core":  # megatron-core's, if it is installed into the same folder; it has a version
            digest.update(str(name).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def read_data(config: RunConfig) -> tuple[dict[str, int], list[str]]:
    """Sizes of all files of the data, the first and last document of each dataset having been read, and problems."""
    sizes, problems = {}, []
    for prefix, flag in find_corpora(config.data).prefixes().items():
        found = open_problems(prefix, flag)
        problems += found
        if found:
            continue
        for suffix in (".bin", ".idx"):
            sizes[prefix + suffix] = os.path.getsize(prefix + suffix)
        try:
            index = read_index(prefix)
            for number in (0, -1):  # read, not mapped: a mapped file that cannot be read ends the process
                length, start = int(index.lengths[number]), int(index.offsets[number])
                np.fromfile(f"{prefix}.bin", index.dtype, length, offset=start)
        except (OSError, ValueError) as error:
            problems.append(f"{flag} {prefix}: its documents cannot be read: {type(error).__name__}: {error}")
    return sizes, problems


def free_space(folder: Path) -> float:
    """Bytes free where ``folder`` is or will be, after a file could be written there if it exists."""
    there = folder
    while not there.exists():
        there = there.parent
    trial = there / f".preflight-{socket.gethostname()}-{os.getpid()}"
    trial.write_bytes(b"0" * 4096)
    trial.unlink()
    return float(shutil.disk_usage(there).free)


def compare_clocks(facts: Facts, topology: Topology) -> None:
    """Set ``clock``. All ranks read their clocks when they leave a barrier; what they differ by least is the skew."""
    gathered: list = [None] * topology.launch.world_size
    readings = []
    for _ in range(_ROUNDS):
        dist.barrier(group=topology.control_group)
        readings.append(time.time())
    dist.all_gather_object(gathered, readings, group=topology.control_group)
    middle = [statistics.median_low(times) for times in zip(*gathered, strict=True)]
    facts.clock = min((time - other for time, other in zip(readings, middle, strict=True)), key=abs)


def check_shared(config: RunConfig, facts: Facts, topology: Topology, first_of_node: bool) -> None:
    """Whether all nodes see the same ``--save`` folder: checkpoints are written by all into one."""
    if config.checkpoint.save is None:
        return
    folder, marker = Path(config.checkpoint.save), [None]
    if topology.is_first:
        with _recording_problems(facts):
            name = f".preflight-{secrets.token_hex(8)}"  # new, so that no network file system remembers its absence
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
            marker = [name]
    dist.broadcast_object_list(marker, src=0, group=topology.control_group)
    if first_of_node and marker[0] is not None and not (folder / marker[0]).exists():
        facts.problems.append(
            f"--save {folder}: does not hold here what rank 0 has written there; give a folder on a file system that "
            "all nodes share"
        )
    dist.barrier(group=topology.control_group)
    if topology.is_first and marker[0] is not None:
        (folder / marker[0]).unlink(missing_ok=True)


@contextlib.contextmanager
def _recording_problems(facts: Facts) -> Iterator[None]:
    """Add an error that is raised inside to the problems."""
    try:
        yield
    except (OSError, ValueError) as error:
        facts.problems.append(str(error))
