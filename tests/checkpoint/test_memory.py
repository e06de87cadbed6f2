"""What memory a save needs beside the tensors themselves."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron.checkpoint import AsyncSaver, Box, Deferred, ShardedTensor, load, save

MB = 1 << 20
SHARD, PIECE = 384 * MB, 48 * MB  # what this rank keeps of a model, in tensors of this size
ROOM = 24 * MB  # for buffers and the interpreter


def memory(field: str) -> int:
    """Bytes of this process's memory, as Linux tells."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024


def extra(step: Callable[[], object]) -> int:
    """By how many bytes memory grows at most during ``step``."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except OSError:
        pytest.skip("this kernel does not let a process reset its peak memory")
    before = memory("VmRSS")
    step()
    return memory("VmHWM") - before


def shard() -> list[ShardedTensor]:
    count = PIECE // 4
    tensors = {f"layers.{n}": torch.full((count,), float(n)) for n in range(SHARD // PIECE)}
    return [ShardedTensor(name, (count,), torch.float32, [Box((0,), x)]) for name, x in tensors.items()]


def test_a_save_copies_nothing(tmp_path):
    entries = shard()
    save(tmp_path / "warm-up", 1, entries[:1], {})
    assert extra(lambda: save(tmp_path / "run", 1, entries, {})) < ROOM


def test_a_save_in_the_background_copies_one_shard(tmp_path):
    entries, saver = shard(), AsyncSaver()
    save(tmp_path / "warm-up", 1, entries[:1], {})

    def in_background() -> None:
        saver.save(tmp_path / "run", 1, entries, {})
        saver.wait()

    grown = extra(in_background)
    assert SHARD - ROOM < grown < SHARD + ROOM


def test_what_is_made_when_it_is_written_is_in_memory_one_tensor_at_a_time(tmp_path):
    count = PIECE // 4
    names = [f"layers.{number}" for number in range(SHARD // PIECE)]

    def deferred(number: int) -> Deferred:
        return Deferred(torch.Size([count]), torch.float32, lambda: torch.full((count,), float(number)))

    boxes = [[Box((0,), deferred(number))] for number in range(len(names))]
    entries = [ShardedTensor(n, (count,), torch.float32, b) for n, b in zip(names, boxes, strict=True)]
    save(tmp_path / "warm-up", 1, entries[:1], {})
    assert extra(lambda: save(tmp_path / "run", 1, entries, {})) < PIECE + ROOM
    last = torch.empty(count)
    load(tmp_path / "run", [ShardedTensor(names[-1], (count,), torch.float32, [Box((0,), last)])], strict=False)
    assert torch.equal(last, torch.full((count,), float(len(names) - 1)))
