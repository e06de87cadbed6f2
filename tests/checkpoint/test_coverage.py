"""A checkpoint whose files do not hold what its index says is found by its headers."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import saved_model
import torch

from megatron.checkpoint import Box, CheckpointError, Deferred, ShardedTensor, save
from megatron.checkpoint.coverage import coverage_problems
from megatron.checkpoint.storage import read_index, write_safetensors
from megatron.conversion.inspect import inspect


@pytest.fixture
def checkpoint(tmp_path):
    parts = [Box((0, 0), torch.zeros(2, 3)), Box((2, 0), torch.ones(2, 2)), Box((2, 2), torch.ones(2, 1))]
    entries = [
        ShardedTensor("cut", (4, 3), torch.float32, parts),
        ShardedTensor("scalar", (), torch.bfloat16, [Box((), torch.tensor(1.0, dtype=torch.bfloat16))]),
    ]
    return save(tmp_path, 1, entries, {}, None)


def edit_index(checkpoint: Path, name: str, **changes: object) -> None:
    """Change what the index says of a tensor; the manifest fits it again, as if it had been written so."""
    path = checkpoint / "index.json"
    content = json.loads(path.read_bytes())
    content["tensors"][name] |= changes
    data = json.dumps(content).encode()
    path.write_bytes(data)
    manifest = json.loads((checkpoint / "manifest.json").read_bytes())
    manifest.pop("sha256")
    manifest["files"]["index.json"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def test_what_a_run_saves_is_covered(checkpoint):
    assert coverage_problems(checkpoint, read_index(checkpoint)) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float16"}, r"cut@0,0 is \(\[2, 3\], 'F32'\) in data-00000.safetensors, expected .*'F16'"),
        ({"shape": [5, 3]}, "the boxes of cut do not cover its 15 elements once each"),
        ({"shape": [3, 4]}, "the boxes of cut do not cover its 12 elements once each"),
        ({"boxes": [[[0, 0], [2, 3], 0], [[2, 0], [2, 2], 0]]}, "do not cover its 12 elements"),
        ({"boxes": [[[0, 0], [3, 2], 0], [[2, 0], [2, 3], 0]]}, "do not cover its 12 elements"),  # twice and never
        ({"boxes": [[[0, 0], [2, 3], 0], [[2, 0], [2, 3], 0]]}, r"cut@2,0 is \(\[2, 2\], 'F32'\)"),
        ({"boxes": [[[0, 0], [1, 3], 0], [[1, 0], [3, 3], 0]]}, "cut@1,0 is missing in data-00000.safetensors"),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_named(checkpoint, changes, message):
    edit_index(checkpoint, "cut", **changes)
    assert re.search(message, "; ".join(coverage_problems(checkpoint, read_index(checkpoint))))


def test_a_file_that_is_no_safetensors_file_is_named(checkpoint):
    file = checkpoint / "data-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    (problem,) = coverage_problems(checkpoint, read_index(checkpoint))
    assert problem.startswith("data-00000.safetensors cannot be read: ")


@pytest.mark.parametrize("made", [torch.zeros(3, dtype=torch.float32), torch.zeros(4, dtype=torch.bfloat16)], ids=str)
def test_data_that_is_not_as_announced_is_not_written(tmp_path, made):
    deferred = Deferred(torch.Size((3,)), torch.bfloat16, lambda: made)
    with pytest.raises(CheckpointError, match=r"w is (float32 \[3\]|bfloat16 \[4\]), but was announced as"):
        write_safetensors(tmp_path / "file.safetensors", [("w", deferred)])
    with pytest.raises(CheckpointError, match="was announced as"):
        save(tmp_path / "run", 1, [ShardedTensor("w", (3,), torch.bfloat16, [Box((0,), deferred)])], {}, None)
    assert not list((tmp_path / "run").glob("step_*"))


def test_the_inspection_verifies_that_a_checkpoint_can_be_read(tmp_path):
    folder = saved_model.save_model(tmp_path).folder
    assert inspect(str(folder), verify=True)["verified"]
    checkpoint = folder / "step_00000003"
    (checkpoint / "data-00007.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"data-00007\.safetensors is not in its manifest"):
        inspect(str(folder), verify=True)
    (checkpoint / "data-00007.safetensors").unlink()
    edit_index(checkpoint, "model.layers.1.mlp.experts.w1", dtype="bfloat16")
    assert inspect(str(folder), verify=False)["tensors"]["model.layers.1.mlp.experts.w1"]["dtype"] == "bfloat16"
    with pytest.raises(CheckpointError, match=r"experts.w1@0,0,0 is .*'F32'\) in data-00000.*expected .*'BF16'"):
        inspect(str(folder), verify=True)
