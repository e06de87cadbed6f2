"""save and load on one process: what is refused, what is noticed, the background saver."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from megatron.checkpoint import (
    AsyncSaver,
    Box,
    CheckpointError,
    ShardedTensor,
    flat_boxes,
    load,
    read_meta,
    save,
    saving,
)

ROOT = Path(__file__).parents[2]


def whole(name: str, tensor: torch.Tensor) -> ShardedTensor:
    return ShardedTensor(name, tuple(tensor.shape), tensor.dtype, [Box((0,) * tensor.dim(), tensor)])


def cut(name: str, tensor: torch.Tensor, *starts: int) -> ShardedTensor:
    """The tensor in flat pieces that begin at ``starts``."""
    boxes = []
    for start, end in zip((0, *starts), (*starts, tensor.numel()), strict=True):
        for offsets, sizes, at in flat_boxes(tensor.shape, start, end - start):
            count = torch.Size(sizes).numel()
            boxes.append(Box(offsets, tensor.view(-1)[start + at : start + at + count].view(sizes)))
    return ShardedTensor(name, tuple(tensor.shape), tensor.dtype, boxes)


def test_cut_one_way_saved_cut_another_way_loaded(tmp_path):
    w, b = torch.randn(5, 7, 3), torch.randn(11)
    save(tmp_path, 7, [cut("w", w, 20, 61), cut("b", b, 4)], {"step": 7, "nested": {"list": [1, 2.5, None, "x"]}})
    copy_w, copy_b = torch.zeros(5, 7, 3), torch.zeros(11)
    meta = load(tmp_path, [cut("b", copy_b, 1, 2, 3), cut("w", copy_w, 1, 33, 34, 100)])
    assert torch.equal(w, copy_w)
    assert torch.equal(b, copy_b)
    assert meta == read_meta(tmp_path) == read_meta(tmp_path / "step_00000007")
    assert meta == {"step": 7, "nested": {"list": [1, 2.5, None, "x"]}}


def test_a_part_of_the_tensors_needs_strict_false(tmp_path):
    save(tmp_path, 1, [whole("model.w", torch.ones(4)), whole("exp_avg.w", torch.ones(4))], {})
    copy = torch.zeros(4)
    with pytest.raises(CheckpointError, match=r"1 in it but not wanted \(exp_avg.w\).*Nothing was loaded"):
        load(tmp_path, [whole("model.w", copy)])
    assert not copy.any()
    load(tmp_path, [whole("model.w", copy)], strict=False)
    assert copy.all()


def test_tensors_that_do_not_fit_are_named(tmp_path):
    save(tmp_path, 1, [whole(f"w{i}", torch.ones(4)) for i in range(10)], {})
    copies = [torch.zeros(4) for _ in range(10)]
    wanted = [whole(f"v{i}", copies[i]) for i in range(8)] + [whole("w8", copies[8]), whole("w9", torch.zeros(5))]
    with pytest.raises(CheckpointError) as raised:
        load(tmp_path, wanted)
    message = str(raised.value)
    assert "8 missing from it (v0; v1; v2; v3; v4; and 3 more)" in message
    assert "8 in it but not wanted (w0; w1; w2; w3; w4; and 3 more)" in message
    assert "1 of another shape or type (w9 is [4], wanted [5])" in message
    assert not any(copy.any() for copy in copies)
    with pytest.raises(CheckpointError, match="w0 is float32, wanted int64"):
        load(tmp_path, [whole("w0", torch.zeros(4, dtype=torch.int64))], strict=False)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([cut("w", torch.ones(4, 3), 5)], None),
        (
            [ShardedTensor("w", (4, 3), torch.float32, [Box((0, 0), torch.ones(3, 3))])],
            "w has 12 elements, its boxes 9",
        ),
        ([ShardedTensor("w", (4, 3), torch.float32, [])], "w has 12 elements, its boxes 0"),
        (
            [ShardedTensor("w", (4,), torch.float32, [Box((0,), torch.ones(3)), Box((2,), torch.ones(1))])],
            "Failed to validate",  # an overlap and a hole that together have the right size
        ),
        ([whole("w", torch.ones(3)), whole("w", torch.ones(4))], "w is named twice"),
    ],
)
def test_boxes_must_cover_each_tensor_once(tmp_path, entries, message):
    save(tmp_path, 1, [whole("w", torch.zeros(2))], {})
    if message is None:
        save(tmp_path, 2, entries, {})
        return
    with pytest.raises(CheckpointError, match=f"step 2 was not saved in .*earlier ones are as they were.*{message}"):
        save(tmp_path, 2, entries, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001"]
    load(tmp_path, [whole("w", torch.zeros(2))])


def test_meta_that_is_not_json_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(CheckpointError, match="Tensor is not JSON serializable"):
        save(tmp_path / "new", 1, [whole("w", torch.zeros(2))], {"x": torch.zeros(1)})
    assert not (tmp_path / "new").exists()


FILES = ["data-00000.safetensors", "index.json", "meta.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["truncated", "longer", "flipped", "missing"])
def test_damage_is_named_and_nothing_is_loaded(tmp_path, name, kind):
    old, new, copy = torch.ones(50), torch.full((50,), 2.0), torch.zeros(50)
    save(tmp_path, 100, [whole("w", old)], {"step": 100})
    path = save(tmp_path, 200, [whole("w", new)], {"step": 200}) / name
    data = bytearray(path.read_bytes())
    if kind == "missing":
        path.unlink()
    else:
        data[len(data) // 2] ^= 0x10 if kind == "flipped" else 0
        path.write_bytes(data[:-1] if kind == "truncated" else data + b"x" * (kind == "longer"))
    wrong = {"missing": "is missing", "flipped": "another SHA-256"}.get(kind, rf"bytes instead of {len(data)}")
    message = rf"step_00000200 is damaged: {name} .*{wrong}.*Load .*step_00000100 instead"
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, [whole("w", copy)])
    assert not copy.any()
    if name == "meta.json":
        with pytest.raises(CheckpointError, match=message):
            read_meta(tmp_path)
    assert load(tmp_path / "step_00000100", [whole("w", copy)]) == {"step": 100}
    assert torch.equal(copy, old)


def test_damage_without_another_checkpoint(tmp_path):
    (save(tmp_path, 1, [whole("w", torch.ones(3))], {}) / "index.json").unlink()
    with pytest.raises(CheckpointError, match=r"There is no other complete checkpoint in .*; restore the files"):
        load(tmp_path, [whole("w", torch.ones(3))])


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        small = torch.arange(1000.0)
        save(tmp_path, 1, [whole("w", small)], {})
        with pytest.raises(CheckpointError, match=r"step 2 was not saved.*No space left on device"):
            save(tmp_path, 2, [whole("w", torch.randn(1 << 19))], {})
        copy = torch.zeros(1000)
        load(tmp_path, [whole("w", copy)])
        assert torch.equal(copy, small)
        save(tmp_path, 2, [whole("w", small)], {})  # the failed save gave its space back
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_the_saver_writes_what_was_there_when_it_was_called(tmp_path, monkeypatch):
    go = threading.Event()
    commit = saving.state_dict_saver.save
    monkeypatch.setattr(
        saving.state_dict_saver, "save", lambda *args, **options: go.wait(30) and commit(*args, **options)
    )
    w, meta = torch.ones(100), {"losses": [1.0]}
    saver = AsyncSaver()
    saver.wait()
    path = saver.save(tmp_path, 5, [whole("w", w)], meta)
    assert path == tmp_path / "step_00000005"
    w.zero_()
    meta["losses"].append(2.0)
    assert not path.exists(), "save must not wait for the disk"
    go.set()
    saver.wait()
    copy = torch.zeros(100)
    assert load(tmp_path, [whole("w", copy)]) == {"losses": [1.0]}
    assert copy.all()


def test_a_second_save_waits_for_the_first_and_keep_last_counts(tmp_path):
    saver = AsyncSaver()
    for step in range(1, 6):
        saver.save(tmp_path, step, [whole("w", torch.full((1000,), float(step)))], {"step": step}, keep_last=2)
    saver.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000004", "step_00000005"]
    assert read_meta(tmp_path) == {"step": 5}


def test_the_savers_error_is_raised_once(tmp_path):
    saver = AsyncSaver()
    bad = ShardedTensor("w", (4,), torch.float32, [Box((2,), torch.ones(1))])
    saver.save(tmp_path, 1, [bad], {})
    with pytest.raises(CheckpointError, match="its boxes 1"):
        saver.wait()
    saver.wait()
    saver.save(tmp_path, 1, [bad], {})
    with pytest.raises(CheckpointError, match="its boxes 1"):
        saver.save(tmp_path, 2, [whole("w", torch.ones(4))], {})
    saver.save(tmp_path, 2, [whole("w", torch.ones(4))], {})
    saver.wait()
    assert read_meta(tmp_path) == {}


AT_EXIT = """
import sys, torch
from megatron.checkpoint import AsyncSaver, Box, ShardedTensor
entries = [ShardedTensor("w", (1 << 20,), torch.float32, [Box((0,), torch.ones(1 << 20))])]
AsyncSaver().save(sys.argv[1], 1, entries, {"done": True})
AsyncSaver().save(sys.argv[2], 1, entries, {"done": True})
"""

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def test_a_program_that_ends_waits_for_its_saver(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    done = subprocess.run(
        [sys.executable, "-c", AT_EXIT, tmp_path / "good", blocked],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert read_meta(tmp_path / "good") == {"done": True}
    assert "CheckpointError: the checkpoint of step 1 was not saved" in done.stderr, "a failure must not stay unseen"
