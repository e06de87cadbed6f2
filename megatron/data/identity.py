"""What a dataset is: a digest of all that it holds, and the range of its tokens.

A path says little: a corpus grows or is rewritten under it, and two projects use the same relative one. What the cache
and checkpoints know a corpus by is its content. Finding that out reads the .bin once, shared by all ranks; it is
remembered in the cache, under the checksum of the .idx with the size, the time and sampled blocks of the .bin.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

from megatron.data.files import sha256, write_whole
from megatron.data.index_cache import writing_to
from megatron.data.index_file import read_index
from megatron.data.tokenizer import Tokenizer

_CHUNK = 1 << 24  # bytes; part of the definition of a digest
_BLOCKS, _BLOCK = 64, 4096  # sampled of a .bin, and bytes of each
_TOLD_FROM = 1 << 32  # bytes from which reading takes long enough to be shown
_Chunk = tuple[str, int, int]  # digest, lowest and highest token


@dataclasses.dataclass(frozen=True)
class Identity:
    """What is known of a dataset once it has been read."""

    content: str
    """SHA-256 over the .idx and the digests of the chunks of the .bin."""
    lowest: int
    highest: int
    """The smallest and the largest token; -1 both where there is none."""


def identify(prefixes: Iterable[str], cache: Path) -> dict[str, Identity]:
    """Identities of datasets that can be opened. With torch.distributed initialised every rank must call it.

    Raises:
        DataError: an .idx cannot be read, or the cache cannot be written; on the rank that finds it.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    prefixes = list(dict.fromkeys(prefixes))
    keys: dict[str, tuple[str, str, Identity | None]] = {}  # checksum of the .idx, name in the cache, what that holds
    if rank == 0:
        for prefix in prefixes:
            index = sha256(f"{prefix}.idx")
            path = cache / f"corpus-{_key(prefix, index)}.json"
            keys[prefix] = index, str(path), _remembered(path)
    if world > 1:
        broadcast = [keys]
        dist.broadcast_object_list(broadcast, src=0)
        keys = broadcast[0]
    found = {}
    for prefix in prefixes:
        index, path, identity = keys[prefix]
        if identity is None:
            identity = _combine(index, _read_shared(prefix, rank, world))
            if rank == 0:
                _remember(Path(path), identity)
        found[prefix] = identity
    return found


def identify_alone(prefix: str) -> Identity:
    """The identity of one dataset, read by this process and not remembered."""
    return _combine(sha256(f"{prefix}.idx"), _read(prefix, 0, 1))


def vocabulary_problems(prefix: str, identity: Identity, tokenizer: Tokenizer, flag: str = "--data-path") -> list[str]:
    """Why tokens of ``prefix`` are not in the vocabulary; rows that only pad it are not part of it."""
    if not (identity.highest >= tokenizer.vocab_size or identity.lowest < 0):
        return []
    wrong = identity.highest if identity.highest >= tokenizer.vocab_size else identity.lowest
    return [
        f"{flag} {prefix}: holds token {wrong}, but the vocabulary of this run's {tokenizer.kind} ends at "
        f"{tokenizer.vocab_size - 1}. Give the tokenizer that the data was made with"
    ]


def _key(prefix: str, index: str) -> str:
    """What a dataset is remembered under, without reading all of it."""
    stat = os.stat(f"{prefix}.bin")
    digest = hashlib.sha256(f"{index} {stat.st_size} {stat.st_mtime_ns}".encode())
    with open(f"{prefix}.bin", "rb") as file:
        for number in range(_BLOCKS):
            file.seek(number * max(stat.st_size - _BLOCK, 0) // (_BLOCKS - 1))
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:32]


def _remembered(path: Path) -> Identity | None:
    try:
        return Identity(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _remember(path: Path, identity: Identity) -> None:
    with writing_to(path.parent):
        write_whole({path: json.dumps(dataclasses.asdict(identity)).encode()})


def _read_shared(prefix: str, rank: int, world: int) -> list[_Chunk]:
    """All chunks, of which each rank reads every ``world``-th."""
    mine = _read(prefix, rank, world)
    if world == 1:
        return mine
    gathered: list[list[_Chunk]] = [[] for _ in range(world)]
    dist.all_gather_object(gathered, mine)
    return [gathered[number % world][number // world] for number in range(sum(map(len, gathered)))]


def _read(prefix: str, first: int, step: int) -> list[_Chunk]:
    dtype, path = read_index(prefix).dtype, f"{prefix}.bin"
    size = os.path.getsize(path)
    starts = range(first * _CHUNK, size, step * _CHUNK)

    def read(start: int) -> _Chunk:
        data = np.fromfile(path, dtype, min(_CHUNK, size - start) // dtype.itemsize, offset=start)
        return hashlib.sha256(data.data).hexdigest(), int(data.min()), int(data.max())

    threads = max((os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)
    with (
        ThreadPoolExecutor(min(threads, 8)) as pool,
        tqdm(
            total=len(starts) * _CHUNK, desc=f"reading {prefix}.bin, once", unit="B", unit_scale=True,
            mininterval=10, disable=first > 0 or size < _TOLD_FROM,
        ) as bar,
    ):  # fmt: skip
        found = []
        for chunk in pool.map(read, starts):
            found.append(chunk)
            bar.update(_CHUNK)
        return found


def _combine(index: str, chunks: Sequence[_Chunk]) -> Identity:
    content = hashlib.sha256(json.dumps([index, [digest for digest, _, _ in chunks]]).encode()).hexdigest()
    return Identity(
        content, min((low for _, low, _ in chunks), default=-1), max((high for _, _, high in chunks), default=-1)
    )
