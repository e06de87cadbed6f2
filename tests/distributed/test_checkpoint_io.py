"""Checkpoints of several processes: saved by four, loaded by one to four; an error on one rank is raised on all."""

import contextlib
import multiprocessing
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoint.crashing import die_before_change
from distributed.spawn import run_distributed
from safetensors import safe_open

from megatron.checkpoint import AsyncSaver, Box, CheckpointError, ShardedTensor, flat_boxes, latest, load, save

pytestmark = pytest.mark.distributed
EXPERTS = (8, 3, 2)


def make_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "w": torch.randn(6, 5, 4, generator=generator),
        "experts": torch.randn(EXPERTS, generator=generator),
        "half": torch.randn(9, 3, generator=generator).bfloat16(),
        "replicated": torch.randn(7, generator=generator),
        "scalar": torch.tensor(2.5),
    }


def fragment(
    name: str, tensor: torch.Tensor, start: int, end: int, row: int = 0, rows: int | None = None
) -> ShardedTensor:
    """Elements [start, end) of the flattened rows [row, row + rows) of ``tensor``, partitioned as by ZeRO-1."""
    part = tensor if rows is None else tensor[row : row + rows]
    boxes = []
    for offsets, sizes, _ in flat_boxes(part.shape, start, end - start):
        region = part[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]
        boxes.append(Box((offsets[0] + row, *offsets[1:]) if offsets else (), region))
    return ShardedTensor(name, tuple(tensor.shape), tensor.dtype, boxes)


def layout_of_four(tensors: dict[str, torch.Tensor], rank: int) -> list[ShardedTensor]:
    """Uneven ZeRO partitions (rank 2 has none of w), experts on 2 ranks with 2 replicas, replicated tensors."""
    cuts = [0, 37, 75, 75, 120]
    half = 12  # of 4 experts x 3 x 2 elements
    return [
        fragment("w", tensors["w"], cuts[rank], cuts[rank + 1]),
        fragment("experts", tensors["experts"], rank // 2 * half, (rank // 2 + 1) * half, row=rank % 2 * 4, rows=4),
        fragment("half", tensors["half"], *[(0, 10), (10, 12), (12, 27), (0, 0)][rank]),
        fragment("replicated", tensors["replicated"], 0, 7),
        fragment("scalar", tensors["scalar"], 0, 1),
    ]


def even_layout(tensors: dict[str, torch.Tensor], rank: int, size: int) -> list[ShardedTensor]:
    """Every tensor flattened and partitioned evenly over ``size`` ranks."""
    return [
        fragment(name, tensor, tensor.numel() * rank // size, tensor.numel() * (rank + 1) // size)
        for name, tensor in tensors.items()
    ]


def save_with_four_load_with_fewer(folder: Path) -> list[bool]:
    tensors, rank = make_tensors(), dist.get_rank()
    path = save(folder, 10, layout_of_four(tensors, rank), {"saved by": 4})
    assert path == latest(folder)
    right = []
    for size in (1, 2, 3, 4):
        group = dist.new_group(range(size))
        if rank < size:
            mine = {name: torch.full_like(tensor, float("nan")) for name, tensor in tensors.items()}
            wanted = even_layout(mine, rank, size)
            meta = load(folder, wanted, group)
            expected = even_layout(tensors, rank, size)
            right.append(meta == {"saved by": 4})
            right += [
                torch.equal(box.tensor, other.tensor)
                for entry, same in zip(wanted, expected, strict=True)
                for box, other in zip(entry.boxes, same.boxes, strict=True)
            ]
            untouched = sum(int(tensor.isnan().sum()) for tensor in mine.values())
            total = sum(tensor.numel() for tensor in tensors.values())
            own = sum(box.tensor.numel() for entry in wanted for box in entry.boxes)
            right.append(untouched == total - own)
    return right


def test_saved_by_four_loaded_by_one_two_three_and_four(tmp_path):
    results = run_distributed(save_with_four_load_with_fewer, 4, tmp_path)
    assert all(all(result) for result in results)
    assert len(results[0]) > len(results[3]) > 5
    # one process without torch.distributed, whole tensors
    tensors = make_tensors()
    copies = {name: torch.full_like(tensor, float("nan")) for name, tensor in tensors.items()}
    load(tmp_path, [fragment(name, copy, 0, copy.numel()) for name, copy in copies.items()])
    for name, tensor in tensors.items():
        assert torch.equal(copies[name], tensor), name
    # replicas are on disk once
    written: dict[str, int] = {}
    for path in (tmp_path / "step_00000010").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                name = key.partition("@")[0]
                written[name] = written.get(name, 0) + file.get_tensor(key).numel()
    assert written == {name: tensor.numel() for name, tensor in tensors.items()}


def halves(value: float, rank: int, name: str = "w") -> list[ShardedTensor]:
    return [ShardedTensor(name, (2000,), torch.float32, [Box((1000 * rank,), torch.full((1000,), value))])]


def message(work: Callable[[], Any]) -> str:
    try:
        work()
    except CheckpointError as error:
        return str(error)
    return "no error"


@contextlib.contextmanager
def full_disk(here: bool):
    """Limits the files of this process to 2000 bytes if ``here``."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if here:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def errors_on_one_rank(folder: Path) -> dict[str, Any]:
    """The error that this rank sees when something fails on one of the two ranks."""
    rank = dist.get_rank()
    seen: dict[str, Any] = {}
    save(folder, 1, halves(1.0, rank), {"step": 1})
    with full_disk(rank == 1):
        seen["full disk"] = message(lambda: save(folder, 2, halves(2.0, rank), {}))
    with full_disk(rank == 0):
        seen["full disk at first"] = message(lambda: save(folder, 2, halves(2.0, rank), {}))
    seen["hole"] = message(lambda: save(folder, 2, halves(2.0, 0), {}))
    wrong = [ShardedTensor("w", (3000,), torch.float32, [])] if rank == 1 else halves(2.0, 0)
    seen["disagreement"] = message(lambda: save(folder, 2, wrong, {}))
    seen["bad box"] = message(lambda: save(folder, 2, halves(2.0, rank * 5), {}))

    saver = AsyncSaver(dist.group.WORLD)
    saver.save(folder, 2, halves(2.0, rank), {"lock": threading.Lock()} if rank == 1 else {})
    seen["cannot be copied"] = message(saver.wait)
    if rank == 0:
        seen["left"] = sorted(path.name for path in folder.iterdir())

    mine = torch.zeros(1000)
    destination = [ShardedTensor("w", (2000,), torch.float32, [Box((1000 * rank,), mine)])]
    other = [ShardedTensor("v", (2,), torch.float32, [])] if rank == 1 else []
    seen["missing"] = message(lambda: load(folder, destination + other))
    seen["unexpected"] = message(lambda: load(folder, []))
    load(folder, destination if rank == 1 else [])  # one rank may load what the other does not
    seen["loaded by one"] = mine.sum().item()

    path = saver.save(folder, 3, halves(3.0, rank), {"step": 3}, group=dist.group.WORLD)
    numbers = torch.ones(1)
    for _ in range(50):  # training continues on the same ranks
        dist.all_reduce(numbers)
    seen["training"] = numbers.item()
    saver.wait()
    seen["background"] = load(folder, destination), mine.sum().item()

    mine.zero_()
    dist.barrier()
    if rank == 0:
        data = bytearray((path / "data-00001.safetensors").read_bytes())
        data[-5] ^= 1
        (path / "data-00001.safetensors").write_bytes(data)
    dist.barrier()
    seen["damage"] = message(lambda: load(folder, destination))
    seen["nowhere"] = message(lambda: load(folder / "nowhere", destination))
    seen["after damage"] = mine.sum().item()
    return seen


def test_an_error_on_one_rank_is_raised_on_all(tmp_path):
    first, second = run_distributed(errors_on_one_rank, 2, tmp_path)
    for what in set(first) - {"left", "loaded by one"}:
        assert first[what] == second[what], what
    kept = "the checkpoint of step 2 was not saved in .*; earlier ones are as they were. "
    for what, pattern in {
        "full disk": kept + r"rank 1: OSError: \[Errno 27\] File too large",
        "full disk at first": kept + r"rank 0: OSError: \[Errno 27\] File too large",
        "hole": kept + "rank 0: .*w has 2000 elements, its boxes 1000",
        "disagreement": kept + r"rank 0: w is \(\(3000,\), 'float32'\) to rank 1, but \(\(2000,\)",
        "bad box": kept + r"rank 1: w: the box at \[5000\] of shape \[1000\] does not lie within",
        "cannot be copied": kept + "rank 1: TypeError: cannot pickle '_thread.lock' object",
        "missing": r"1 missing from it \(v\)",
        "unexpected": r"1 in it but not wanted \(w\)",
        "damage": r"step_00000003 is damaged: data-00001.safetensors has another SHA-256.*Load .*step_00000001 instead",
        "nowhere": "there is no checkpoint in .*nowhere",
    }.items():
        with pytest.raises(CheckpointError, match=pattern):
            raise CheckpointError(first[what])
    assert first["left"] == ["latest", "step_00000001"]
    assert (first["loaded by one"], second["loaded by one"]) == (0, 1000)
    assert first["training"] == 2.0**50
    assert first["background"] == ({"step": 3}, 3000.0)
    assert first["after damage"] == 0


def save_and_lose_a_rank(rank: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    save(folder / "run", 1, halves(1.0, rank), {"step": 1})
    if rank == 1:
        die_before_change(2)
    (folder / "error").write_text(message(lambda: save(folder / "run", 2, halves(2.0, rank), {})))


def test_a_rank_that_is_killed_during_a_save_is_an_error_on_the_other(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=save_and_lose_a_rank, args=(rank, tmp_path)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    alive = [process.is_alive() for process in processes]
    for process in processes:
        process.kill()
    assert alive == [False, False], "the other rank must not wait for the dead one"
    assert processes[1].exitcode == -9
    assert "step 2 was not saved" in (tmp_path / "error").read_text()
    assert "Rank 0 lost contact" in (tmp_path / "error").read_text()
    tensor = torch.zeros(2000)
    assert load(tmp_path / "run", [ShardedTensor("w", (2000,), torch.float32, [Box((0,), tensor)])]) == {"step": 1}
    assert (tensor == 1).all()
