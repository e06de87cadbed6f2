"""The kernels of the optimizer against torch.optim.AdamW and plain torch: on a GPU, or in Triton's interpreter."""

import math

import pytest
import torch

pytest.importorskip("triton")
from megatron.engine.bf16_update import square_sum as plain_square_sum
from megatron.engine.kernels import adamw as kernels
from megatron.engine.optim import ParameterSlice, adamw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter cuts bf16 off instead of rounding it
HALF, HALF_ERROR = (torch.bfloat16, 2**-8) if DEVICE == "cuda" else (torch.float16, 2**-11)
LR, BETAS, EPS, DECAY, CLIP, STEP = 1e-3, (0.9, 0.95), 1e-8, 0.1, 0.5, 4


def make(numel: int, gradient: torch.dtype = torch.float32, moments: torch.dtype = torch.float32) -> ParameterSlice:
    generator = torch.Generator().manual_seed(numel)
    p, g, m, v = (torch.randn(numel, generator=generator).to(DEVICE) for _ in range(4))
    states = {"exp_avg": m.to(moments), "exp_avg_sq": v.square().to(moments)}
    return ParameterSlice(p, g.to(gradient), torch.zeros_like(p, dtype=HALF), states)


def rates(factor: float = CLIP, step: int = STEP, betas: tuple[float, float] = BETAS, lr: float = LR) -> adamw.Rates:
    scalars = [factor, lr / (1 - betas[0] ** step), math.sqrt(1 - betas[1] ** step), step]
    return adamw.Rates(torch.tensor(scalars, device=DEVICE), lr, *betas, EPS, DECAY)


def copy(piece: ParameterSlice) -> ParameterSlice:
    return part(piece, slice(None))


def part(piece: ParameterSlice, at: slice) -> ParameterSlice:
    """A copy of some elements."""
    states = {name: x[at].clone() for name, x in piece.states.items()}
    return ParameterSlice(piece.master[at].clone(), piece.gradient[at].clone(), piece.weight[at].clone(), states)


def tensors(piece: ParameterSlice) -> dict[str, torch.Tensor]:
    return {"master": piece.master, "gradient": piece.gradient, "weight": piece.weight, **piece.states}


@pytest.mark.parametrize("update", [kernels.update, adamw.update], ids=["kernel", "plain"])
@pytest.mark.parametrize("numel", [1, 1023, 5000])
def test_an_update_is_that_of_torch(update, numel):
    piece = make(numel)
    weight = piece.master.double().requires_grad_()
    weight.grad = piece.gradient.double() * CLIP
    adam = torch.optim.AdamW([weight], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    moments = {"exp_avg": piece.states["exp_avg"].double(), "exp_avg_sq": piece.states["exp_avg_sq"].double()}
    adam.state[weight] = {"step": torch.tensor(STEP - 1.0)} | moments
    adam.step()
    update(piece, rates())
    for found, expected in (
        (piece.master, weight.detach()),
        (piece.states["exp_avg"], moments["exp_avg"]),
        (piece.states["exp_avg_sq"], moments["exp_avg_sq"]),
    ):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(piece.weight.double(), weight.detach(), rtol=HALF_ERROR, atol=1e-6)


@pytest.mark.parametrize("moments", [torch.float32, HALF, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gradient", [torch.float32, HALF], ids=str)
def test_half_precision_gradients_and_moments(gradient, moments):
    found = make(3000, gradient, moments)
    expected = copy(found)
    kernels.update(found, rates())
    adamw.update(expected, rates())
    for mine, other in zip(tensors(found).values(), tensors(expected).values(), strict=True):
        assert mine.dtype == other.dtype
        error = {HALF: 2 * HALF_ERROR, torch.bfloat16: 2**-7}.get(mine.dtype, 1e-5)
        torch.testing.assert_close(mine, other, rtol=error, atol=1e-6 if mine.dtype == torch.float32 else 1e-5)
        if mine.dtype == torch.bfloat16:  # both round by the same random bits what may differ in the last bit of fp32
            assert (mine != other).double().mean() < 0.01


@pytest.mark.parametrize("update", [kernels.update, adamw.update], ids=["kernel", "plain"])
def test_nothing_changes_when_the_factor_is_nan(update):
    piece = make(2000)
    before = copy(piece)
    update(piece, rates(math.nan))
    for name, tensor in tensors(piece).items():
        assert torch.equal(tensor, tensors(before)[name]), name


UPDATES = pytest.mark.parametrize("update", [kernels.update, adamw.update], ids=["kernel", "plain"])


@UPDATES
def test_moments_are_rounded_to_their_neighbours_with_the_right_mean(update):
    piece, exact = make(20_000, moments=torch.bfloat16), make(20_000)
    for name in ("exp_avg", "exp_avg_sq"):
        exact.states[name].copy_(piece.states[name])
    update(piece, rates())
    update(exact, rates())
    shares = []
    for name in ("exp_avg", "exp_avg_sq"):
        found, wanted = piece.states[name].float(), exact.states[name]
        down = (wanted.view(torch.int32) & -0x10000).view(torch.float32)
        up = (down.view(torch.int32) + 0x10000).view(torch.float32)
        assert bool(((found == down) | (found == up)).all())
        rounded_up, chance = (found == up).double(), ((wanted - down) / (up - down)).double()
        spread = (chance * (1 - chance)).sum().sqrt()
        assert abs(rounded_up.sum() - chance.sum()) <= 4 * spread
        shares.append((rounded_up - chance) / spread)
    assert abs((shares[0] * shares[1]).sum()) <= 4 / 20_000**0.5 * 2  # the two moments' bits are independent


@UPDATES
def test_rounding_repeats_with_weight_and_update_and_differs_between_updates(update):
    first, again, next_, elsewhere = (make(3000, moments=torch.bfloat16) for _ in range(4))
    update(first, rates())
    update(again, rates())
    update(next_, rates(step=STEP + 1))
    half = part(elsewhere, slice(1500, None))  # another process's share
    update(half, rates())
    assert torch.equal(first.states["exp_avg_sq"], again.states["exp_avg_sq"])
    assert torch.equal(first.states["exp_avg_sq"][1500:], half.states["exp_avg_sq"])
    assert 0.1 < (first.states["exp_avg_sq"] != next_.states["exp_avg_sq"]).double().mean() < 0.6


@pytest.mark.parametrize(
    ("update", "numel", "steps"), [(kernels.update, 1024, 150), (adamw.update, 4096, 700)], ids=["kernel", "plain"]
)
def test_moments_in_bf16_fall_as_fp32_ones_do(update, numel, steps):
    """Small gradients after large ones, with a decay so slow that rounding to nearest would keep moments at 1."""
    betas = (0.999, 0.999)
    pieces = [make(numel, moments=dtype) for dtype in (torch.bfloat16, torch.float32)]
    for piece in pieces:
        piece.gradient.fill_(1e-3)
        piece.states["exp_avg"].fill_(1.0)
        piece.states["exp_avg_sq"].fill_(1.0)
        for step in range(steps):
            update(piece, rates(1.0, 10_000 + step, betas, lr=1e-6))
    for name in ("exp_avg", "exp_avg_sq"):
        found, exact = (piece.states[name].double() for piece in pieces)
        assert exact.max() < 0.87
        assert float(found.mean()) == pytest.approx(float(exact.mean()), rel=0.02)
        assert (found / exact).min() > 0.6
        assert (found / exact).max() < 1.6


@pytest.mark.parametrize("square_sum", [kernels.square_sum, plain_square_sum], ids=["kernel", "plain"])
def test_sums_of_squares(square_sum):
    gradients = [make(numel).gradient for numel in (1, 4096, 12_345)]
    gradients.append(gradients[-1].to(HALF))
    expected = sum(float(x.double().square().sum()) for x in gradients)
    assert float(square_sum(gradients)) == pytest.approx(expected, rel=1e-6)
    gradients[1][17] = math.nan
    assert math.isnan(float(square_sum(gradients)))
    gradients[1][17] = math.inf
    assert float(square_sum(gradients)) == math.inf


def test_without_elements_there_is_nothing_to_do():
    kernels.update(make(0), rates())
    assert float(kernels.square_sum([torch.zeros(0, device=DEVICE)])) == 0.0
