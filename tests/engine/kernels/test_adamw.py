"""The kernels of the optimizer against torch.optim.AdamW and plain torch: on a GPU, or in Triton's interpreter."""

import dataclasses
import math

import pytest
import torch

pytest.importorskip("triton")
from megatron.engine import adamw
from megatron.engine.kernels import adamw as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter cuts bf16 off instead of rounding it
HALF, HALF_ERROR = (torch.bfloat16, 2**-8) if DEVICE == "cuda" else (torch.float16, 2**-11)
LR, BETAS, EPS, DECAY, CLIP, STEP = 1e-3, (0.9, 0.95), 1e-8, 0.1, 0.5, 4


def make(numel: int, gradient: torch.dtype = torch.float32, moments: torch.dtype = torch.float32) -> adamw.Piece:
    generator = torch.Generator().manual_seed(numel)
    p, g, m, v = (torch.randn(numel, generator=generator).to(DEVICE) for _ in range(4))
    return adamw.Piece(p, g.to(gradient), m.to(moments), v.square().to(moments), torch.zeros_like(p, dtype=HALF))


def rates(factor: float = CLIP) -> adamw.Rates:
    scalars = [factor, LR / (1 - BETAS[0] ** STEP), math.sqrt(1 - BETAS[1] ** STEP)]
    return adamw.Rates(torch.tensor(scalars, device=DEVICE), LR, *BETAS, EPS, DECAY)


def copy(piece: adamw.Piece) -> adamw.Piece:
    return adamw.Piece(*(x.clone() for x in dataclasses.astuple(piece)))


@pytest.mark.parametrize("update", [kernels.update, adamw.update], ids=["kernel", "plain"])
@pytest.mark.parametrize("numel", [1, 1023, 5000])
def test_an_update_is_that_of_torch(update, numel):
    piece = make(numel)
    weight = piece.master.double().requires_grad_()
    weight.grad = piece.gradient.double() * CLIP
    adam = torch.optim.AdamW([weight], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    moments = {"exp_avg": piece.exp_avg.double(), "exp_avg_sq": piece.exp_avg_sq.double()}
    adam.state[weight] = {"step": torch.tensor(STEP - 1.0)} | moments
    adam.step()
    update(piece, rates())
    for found, expected in (
        (piece.master, weight.detach()),
        (piece.exp_avg, moments["exp_avg"]),
        (piece.exp_avg_sq, moments["exp_avg_sq"]),
    ):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(piece.weight.double(), weight.detach(), rtol=HALF_ERROR, atol=1e-6)


@pytest.mark.parametrize("moments", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("gradient", [torch.float32, HALF], ids=str)
def test_half_precision_gradients_and_moments(gradient, moments):
    found = make(3000, gradient, moments)
    expected = copy(found)
    kernels.update(found, rates())
    adamw.update(expected, rates())
    for field in dataclasses.fields(found):
        mine, other = getattr(found, field.name), getattr(expected, field.name)
        assert mine.dtype == other.dtype
        coarse = mine.dtype == HALF
        torch.testing.assert_close(mine, other, rtol=2 * HALF_ERROR if coarse else 1e-5, atol=1e-5 if coarse else 1e-6)


@pytest.mark.parametrize("update", [kernels.update, adamw.update], ids=["kernel", "plain"])
def test_nothing_changes_when_the_factor_is_nan(update):
    piece = make(2000)
    before = copy(piece)
    update(piece, rates(math.nan))
    for field in dataclasses.fields(piece):
        assert torch.equal(getattr(piece, field.name), getattr(before, field.name)), field.name


@pytest.mark.parametrize("square_sum", [kernels.square_sum, adamw.square_sum], ids=["kernel", "plain"])
def test_sums_of_squares(square_sum):
    tensors = [make(numel).gradient for numel in (1, 4096, 12_345)]
    tensors.append(tensors[-1].to(HALF))
    expected = sum(float(x.double().square().sum()) for x in tensors)
    assert float(square_sum(tensors)) == pytest.approx(expected, rel=1e-6)
    tensors[1][17] = math.nan
    assert math.isnan(float(square_sum(tensors)))
    tensors[1][17] = math.inf
    assert float(square_sum(tensors)) == math.inf


def test_without_elements_there_is_nothing_to_do():
    kernels.update(make(0), rates())
    assert float(kernels.square_sum([torch.zeros(0, device=DEVICE)])) == 0.0
