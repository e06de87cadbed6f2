"""Tokens that load the experts of a router evenly, or the busiest of them with twice the mean."""

import pytest
import torch

from benchmarks.loads import BUSIEST, Loads


def router(E: int, H: int) -> torch.Tensor:
    return torch.randn(E, H, generator=torch.Generator().manual_seed(E)) / H**0.5


def experts(x_TH: torch.Tensor, weight_EH: torch.Tensor, topk: int = 1) -> torch.Tensor:
    return (x_TH.double() @ weight_EH.double().T).topk(topk, -1).indices


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("E", "topk"), [(4, 1), (32, 1), (8, 2), (4, 4), (2, 1)])
def test_even_means_equally_many_tokens_for_each_expert(E, topk, dtype):
    torch.manual_seed(1)
    weight_EH = router(E, 64).to(dtype)
    moved_TH = Loads(weight_EH, 64 * E).even(torch.randn(64 * E, 64), topk).to(dtype)
    counts_E = torch.bincount(experts(moved_TH, weight_EH, topk).flatten(), minlength=E)
    assert counts_E.tolist() == [64 * topk] * E
    order = experts(moved_TH, weight_EH)[:, 0]
    assert order.tolist() != sorted(order.tolist())  # as tokens come, not expert by expert


def test_even_leaves_other_logits_alone():
    torch.manual_seed(1)
    weight_EH, x_TH = router(8, 64), torch.randn(256, 64)
    change_TE = (Loads(weight_EH, 256).even(x_TH) - x_TH) @ weight_EH.T
    assert int((change_TE.abs() > 1e-4).sum(-1).max()) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("E", [4, 16, 64])
def test_skewed_gives_the_busiest_expert_twice_the_mean(E, dtype):
    torch.manual_seed(2)
    T = 256 * E
    weight_EH = router(E, 128).to(dtype)
    loads = Loads(weight_EH, T)
    x_TH = loads.skewed(torch.randn(T, 128)).to(dtype)
    counts_E = torch.bincount(experts(x_TH, weight_EH)[:, 0], minlength=E)
    assert int(counts_E.max()) * E / T == pytest.approx(BUSIEST, rel=0.15)
    assert counts_E.tolist() == loads.counts(x_TH).tolist()
    assert (counts_E > T / E / 10).all()  # and no expert starves


def test_more_experts_than_hidden_units_cannot_be_balanced():
    with pytest.raises(ValueError, match=r"9 experts with hidden size 8"):
        Loads(torch.randn(9, 8), 16)
