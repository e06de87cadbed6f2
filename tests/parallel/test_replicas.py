"""The checksum that replicas are compared by."""

import pytest
import torch

from megatron.parallel import replicas
from megatron.parallel.replicas import checksum


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8])
def test_any_one_changed_element_changes_it(dtype, monkeypatch):
    monkeypatch.setattr(replicas, "CHUNK", 7)
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, 200, (5, 9), generator=generator).to(dtype)
    sums = {int(checksum(x))}
    for place in range(x.numel()):
        changed = x.clone()
        changed.view(-1)[place] += 1
        sums.add(int(checksum(changed)))
    assert len(sums) == x.numel() + 1
    assert int(checksum(x.clone())) == int(checksum(x.t().contiguous().t())) in sums


def test_it_does_not_depend_on_the_chunks_and_sees_order_signs_and_nans(monkeypatch):
    x = torch.randn(40)
    whole = int(checksum(x))
    monkeypatch.setattr(replicas, "CHUNK", 11)
    assert int(checksum(x)) == whole
    assert int(checksum(x.flip(0))) != whole
    zero, nan = torch.zeros(3), torch.full((3,), float("nan"))
    assert int(checksum(zero)) != int(checksum(-zero))
    assert int(checksum(nan)) == int(checksum(nan.clone()))
    assert int(checksum(torch.empty(0))) == 0
