"""Pieces of global tensors: what a process takes is what its boxes put back."""

import pytest
import torch
from torch import nn

from megatron.checkpoint import flat_boxes
from megatron.parallel.sharding import ParamLayout, Shard, collect_layouts, global_boxes, global_shape, take

CASES = {
    "whole": ((6, 4), lambda rank: ()),
    "rows": ((8, 3), lambda rank: (Shard(0, 4, rank),)),
    "columns": ((3, 8), lambda rank: (Shard(1, 4, rank),)),
    "q, k and v": ((24, 3), lambda rank: (Shard(0, 4, rank, parts=3),)),
    "bias of q, k and v": ((24,), lambda rank: (Shard(0, 4, rank, parts=3),)),
    "expert and inner units": ((4, 3, 6), lambda rank: (Shard(0, 2, rank // 2), Shard(2, 2, rank % 2))),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("step", [1, 5, 7, 100])
def test_flat_ranges_of_all_processes_put_the_tensor_together(case, step):
    shape, shards_of_rank = CASES[case]
    whole = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    found = torch.full(shape, float("nan"))
    written = torch.zeros(shape)
    for rank in range(4):
        shards = shards_of_rank(rank)
        local = take(whole, shards).contiguous()
        assert global_shape(local.shape, shards) == shape
        for start in range(0, local.numel(), step):  # pieces as ZeRO cuts them
            flat = local.view(-1)[start : start + step]
            for offsets, sizes, at in flat_boxes(local.shape, start, flat.numel()):
                box = flat.narrow(0, at, torch.Size(sizes).numel()).view(sizes)
                for where, data in global_boxes(offsets, box, local.shape, shards):
                    region = tuple(slice(o, o + s) for o, s in zip(where, data.shape, strict=True))
                    found[region] = data
                    written[region] += 1
    torch.testing.assert_close(found, whole, rtol=0, atol=0)
    assert set(written.unique().tolist()) == {4.0 if case == "whole" else 1.0}


def test_boxes_are_views_to_load_into():
    local = torch.zeros(6, 2)
    shard = Shard(0, 2, 1, parts=3)  # rows 2, 3 of each part of 4
    for where, data in global_boxes((0, 0), local, local.shape, (shard,)):
        data.fill_(where[0])
    assert local[:, 0].tolist() == [2, 2, 6, 6, 10, 10]


class Cut(nn.Module):
    """A weight that is the second of two shards, and a bias that is whole."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))

    def param_layouts(self) -> dict[str, ParamLayout]:
        return {"weight": ParamLayout((Shard(0, 2, 1), Shard(0, 1, 0)))}


def test_layouts_have_the_names_of_named_parameters_and_the_rest_is_whole():
    model = nn.ModuleDict({"first": nn.Sequential(Cut(), nn.Linear(2, 2))})
    model["tied"] = model["first"][0]  # the same module under another name
    layouts = collect_layouts(model)
    assert list(layouts) == [name for name, _ in model.named_parameters()]
    assert layouts.pop("first.0.weight") == ParamLayout((Shard(0, 2, 1),))
    assert set(layouts.values()) == {ParamLayout()}
    assert collect_layouts(Cut())["weight"].shards == (Shard(0, 2, 1),)


def test_a_layout_of_a_parameter_that_is_not_there_is_an_error():
    module = Cut()
    del module.weight
    with pytest.raises(AttributeError, match="weight"):
        collect_layouts(module)


def test_shards_and_experts_count_on_every_tensor_parallel_rank():
    assert not ParamLayout((Shard(0, 1, 0),)).model_parallel
    assert ParamLayout((Shard(0, 2, 0),)).model_parallel
    assert ParamLayout(expert_degree=1).model_parallel
    assert ParamLayout(expert_degree=1).is_expert
