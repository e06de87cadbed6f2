"""The experts' feed-forwards in kernels, and all gradients, against plain torch in float64."""

import pytest
import torch

pytest.importorskip("triton")
from megatron.moe import kernels
from megatron.moe.kernels.experts import expert_mlp, expert_mlp_sorted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
NAMES = ("x", "w1", "b1", "w2", "b2")


def values(L: int, H: int, F: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(L + F)
    shapes = {(L, H, F): H**-0.5, (L, F): 0.5, (L, F, H): F**-0.5, (L, H): 0.5}
    return [torch.randn(*shape, generator=generator).mul(std).to(DEVICE, dtype) for shape, std in shapes.items()]


def plain(x_RH: torch.Tensor, expert_R: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    """Each row through its expert."""
    outputs = torch.zeros_like(x_RH)
    for expert, (w1, b1, w2, b2) in enumerate(zip(*weights, strict=True)):
        own = (expert_R == expert)[:, None]
        y = torch.nn.functional.gelu(x_RH @ w1 + b1, approximate="tanh") @ w2 + b2
        outputs = outputs + y.where(own, 0.0)
    return outputs


def assert_all_near(found, expected, mine, exact, dtype) -> None:
    pairs = {"outputs": (found, expected)} | {
        f"{name}'s gradient": (a.grad, b.grad) for name, a, b in zip(NAMES, mine, exact, strict=True)
    }
    for name, (a, b) in pairs.items():
        assert a.dtype == dtype
        assert (a.double() - b).norm() <= TOLERANCE[dtype] * b.norm(), name  # NaN fails too


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("L", "G", "c", "H", "F"), [(3, 1, 40, 70, 130), (2, 4, 11, 32, 20), (1, 3, 5, 16, 40), (5, 2, 1, 150, 8)]
)
def test_equally_many_rows_for_each_expert(L, G, c, H, F, dtype):
    weights = values(L, H, F, dtype)
    rows_GLcH, dy_GLcH = (torch.randn(G, L, c, H).to(DEVICE, dtype) for _ in range(2))
    mine = [t.clone().requires_grad_() for t in (rows_GLcH, *weights)]
    exact = [t.double().requires_grad_() for t in (rows_GLcH, *weights)]
    found = expert_mlp(mine[0].transpose(0, 1), tuple(mine[1:])).transpose(0, 1)
    assert found.is_contiguous()  # ready to be sent
    expert_R = torch.arange(L, device=DEVICE).repeat_interleave(c).repeat(G)
    expected = plain(exact[0].flatten(0, 2), expert_R, exact[1:]).view(G, L, c, H)
    found.backward(dy_GLcH)
    expected.backward(dy_GLcH.double())
    assert_all_near(found, expected, mine, exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", [[40, 0, 32, 1], [0, 70, 0], [9], [0, 0, 3, 129, 0, 64, 1]], ids=str)
def test_rows_sorted_by_expert(counts, dtype):
    H, F, L = 32, 136, len(counts)
    if not kernels.groupable(torch.empty(0, dtype=dtype, device=DEVICE), H, F):
        pytest.skip("torch has no grouped product of this number format here")
    weights = values(L, H, F, dtype)
    x_RH, dy_RH = (torch.randn(sum(counts), H).to(DEVICE, dtype) for _ in range(2))
    mine = [t.clone().requires_grad_() for t in (x_RH, *weights)]
    exact = [t.double().requires_grad_() for t in (x_RH, *weights)]
    counts_L = torch.tensor(counts, device=DEVICE)
    found = expert_mlp_sorted(mine[0], tuple(mine[1:]), counts_L)
    expert_R = torch.arange(L, device=DEVICE).repeat_interleave(counts_L)
    expected = plain(exact[0], expert_R, exact[1:])
    found.backward(dy_RH)
    expected.backward(dy_RH.double())
    assert_all_near(found, expected, mine, exact, dtype)
    for parameter in mine[1:]:
        for gradient, count in zip(parameter.grad, counts, strict=True):
            assert count or not gradient.any()


def test_gradients_of_another_order_in_memory():
    """As a sum gives them: one number, seen as many."""
    weights = [w.requires_grad_() for w in values(2, 16, 24, torch.float32)]
    x = torch.randn(2, 2, 3, 16, device=DEVICE)
    expert_mlp(x, tuple(weights)).sum().backward()
    torch.testing.assert_close(weights[3].grad, torch.full((2, 16), 6.0, device=DEVICE))


def test_only_the_tokens_and_the_product_are_kept():
    L, R, H, F = 2, 40, 16, 64
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        expert_mlp(
            torch.randn(L, 1, R, H, device=DEVICE), tuple(w.requires_grad_() for w in values(L, H, F, torch.float32))
        )
    assert sum(t.numel() for t in kept if t.size(1) == R) == L * R * (H + F)
