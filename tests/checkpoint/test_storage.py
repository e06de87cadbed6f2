"""The files themselves, and what we rely on in torch.distributed.checkpoint."""

import inspect
import json
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron.checkpoint import Box, CheckpointError, ShardedTensor, load, save, storage
from megatron.checkpoint.folder import _digest, hash_file
from megatron.checkpoint.storage import write_safetensors
from megatron.checkpoint.tensors import DTYPES

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def random_tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    if dtype.is_floating_point:
        return torch.randn(shape).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 100, shape).to(dtype)


def whole(name: str, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> ShardedTensor:
    return ShardedTensor(name, tuple(tensor.shape), dtype or tensor.dtype, [Box((0,) * tensor.dim(), tensor)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (5, 3), (2, 3, 4)])
def test_every_type_and_rank_survives(tmp_path, dtype, shape):
    tensor, copy = random_tensor(dtype, *shape), torch.zeros(shape, dtype=dtype)
    save(tmp_path, 1, [whole("x", tensor)], {})
    load(tmp_path, [whole("x", copy)])
    assert torch.equal(tensor, copy)


def test_the_files_are_plain_safetensors(tmp_path):
    tensors = {str(dtype): random_tensor(dtype, 3, 5) for dtype in DTYPES}
    record = write_safetensors(tmp_path / "x", list(tensors.items()))
    read = load_file(tmp_path / "x")
    assert all(torch.equal(read[key], tensor) for key, tensor in tensors.items())
    assert (record.size, record.sha256) == ((tmp_path / "x").stat().st_size, hash_file(tmp_path / "x"))


def test_views_are_saved_as_they_look(tmp_path):
    base = torch.randn(6, 8)
    save(tmp_path, 1, [whole("t", base.t()), whole("part", base[1:4, 2:5]), whole("flat", base.view(-1)[7:9])], {})
    file = load_file(tmp_path / "step_00000001" / "data-00000.safetensors")
    assert torch.equal(file["t@0,0"], base.t())
    assert torch.equal(file["part@0,0"], base[1:4, 2:5])
    assert file["flat@0"].numel() == 2
    assert (tmp_path / "step_00000001" / "data-00000.safetensors").stat().st_size < 1000


def test_destinations_are_cast_and_may_be_views_and_parameters(tmp_path):
    tensor = torch.randn(4, 6)
    save(tmp_path, 1, [whole("x", tensor)], {})
    base = torch.zeros(6, 4)
    parameter = torch.nn.Parameter(torch.zeros(4, 6, dtype=torch.bfloat16))
    load(tmp_path, [whole("x", base.t(), torch.float32)])
    load(tmp_path, [whole("x", parameter, torch.float32)])
    assert torch.equal(base.t(), tensor)
    assert torch.equal(parameter, tensor.bfloat16())


class Bomb:
    def __reduce__(self):
        return exec, (f"import pathlib; pathlib.Path({str(self.path)!r}).touch()",)


@pytest.mark.parametrize("victim", ["data-00000.safetensors", "index.json", "meta.json", "manifest.json", "latest"])
def test_no_pickle_is_ever_run(tmp_path, victim):
    """Neither a pickle where torch would look for one, nor one in place of our files, even with a matching manifest."""
    bomb = Bomb()
    bomb.path = tmp_path / "exploded"
    checkpoint = save(tmp_path, 1, [whole("x", torch.ones(3))], {})
    for name in (".metadata", "__0_.metadata", "__0_0.distcp"):
        (checkpoint / name).write_bytes(pickle.dumps(bomb))
    load(tmp_path, [whole("x", torch.zeros(3))])
    path = tmp_path / victim if victim == "latest" else checkpoint / victim
    path.write_bytes(pickle.dumps(bomb))
    if victim not in ("latest", "manifest.json"):
        content = json.loads((checkpoint / "manifest.json").read_text())
        content.pop("sha256")
        content["files"][victim] = {"size": path.stat().st_size, "sha256": hash_file(path)}
        content["sha256"] = _digest(content)
        (checkpoint / "manifest.json").write_text(json.dumps(content))
    destination = torch.zeros(3)
    if victim == "latest":
        with pytest.warns(UserWarning, match="the newest complete"):
            load(tmp_path, [whole("x", destination)])
    else:
        with pytest.raises(CheckpointError):
            load(tmp_path, [whole("x", destination)])
        assert not destination.any()
    assert not bomb.path.exists()
    pickle.loads(pickle.dumps(bomb))
    assert bomb.path.exists(), "the bomb would have gone off"


def test_reading_takes_only_what_is_wanted(tmp_path, monkeypatch):
    save(tmp_path, 1, [whole("x", torch.arange(10_000.0).view(100, 100)), whole("y", torch.ones(10))], {})
    taken = []
    read = storage._read

    def counting(file, item):
        taken.append(read(file, item))
        return taken[-1]

    monkeypatch.setattr(storage, "_read", counting)
    part = torch.zeros(2, 3)
    load(tmp_path, [ShardedTensor("x", (100, 100), torch.float32, [Box((50, 7), part)])], strict=False)
    assert part.tolist() == [[5007, 5008, 5009], [5107, 5108, 5109]]
    assert [tensor.shape for tensor in taken] == [part.shape]


def test_dcp_still_plans_shards_and_drops_replicas():
    """DefaultSavePlanner.create_global_plan: of equal boxes one is written, and the metadata lists each."""

    def item(start: int) -> dcp.planner.WriteItem:
        chunk = dcp.ChunkStorageMetadata(torch.Size([start]), torch.Size([2]))
        data = TensorWriteData(chunk, TensorProperties(dtype=torch.float32), torch.Size([4]))
        return dcp.planner.WriteItem(MetadataIndex("w", [start]), WriteItemType.SHARD, tensor_data=data)

    planner = dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    plans, metadata = planner.create_global_plan([dcp.SavePlan([item(0), item(2)]), dcp.SavePlan([item(0), item(2)])])
    assert sorted(i.index.offset[0] for plan in plans for i in plan.items) == [0, 2]
    assert sorted(chunk.offsets[0] for chunk in metadata.state_dict_metadata["w"].chunks) == [0, 2]
    overlapping = dcp.ChunkStorageMetadata(torch.Size([1]), torch.Size([2]))
    data = TensorWriteData(overlapping, TensorProperties(dtype=torch.float32), torch.Size([4]))
    other = dcp.planner.WriteItem(MetadataIndex("w", [1]), WriteItemType.SHARD, tensor_data=data)
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with pytest.raises(ValueError, match="Failed to validate global plan"):
        planner.create_global_plan([dcp.SavePlan([item(0), item(2)]), dcp.SavePlan([other])])


def test_dcp_still_computes_overlaps():
    """create_read_items_for_chunk_list: where a wanted box and a stored one overlap, in coordinates of each."""
    stored = dcp.TensorStorageMetadata(
        TensorProperties(),
        torch.Size([4, 4]),
        [
            dcp.ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2, 4])),
            dcp.ChunkStorageMetadata(torch.Size([2, 0]), torch.Size([2, 4])),
        ],
    )
    wanted = [dcp.ChunkStorageMetadata(torch.Size([1, 1]), torch.Size([2, 2]))]
    items = sorted(create_read_items_for_chunk_list("w", stored, wanted), key=lambda i: tuple(i.storage_index.offset))
    assert [tuple(i.storage_index.offset) for i in items] == [(0, 0), (2, 0)]
    assert [tuple(i.storage_offsets) for i in items] == [(1, 1), (0, 1)]
    assert [tuple(i.dest_offsets) for i in items] == [(0, 0), (1, 0)]
    assert [tuple(i.lengths) for i in items] == [(1, 2), (1, 2)]
    assert all(tuple(i.dest_index.offset) == (1, 1) for i in items)


def test_dcp_still_has_the_interface_we_implement():
    for function, names in (
        (dcp.save, ("storage_writer", "planner", "process_group", "no_dist")),
        (dcp.load, ("storage_reader", "planner", "process_group", "no_dist")),
    ):
        assert set(names) <= set(inspect.signature(function).parameters)
