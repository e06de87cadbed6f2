"""The fused layer and its parts against plain torch in float64: on a GPU, or in Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton")
from megatron.moe.kernels import gate, gelu, permute
from megatron.moe.kernels.top1_layer import top1_layer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def near(found: torch.Tensor, exact: torch.Tensor, tolerance: float) -> bool:
    """Whether the error is small against the whole; never with NaN."""
    return bool((found.double() - exact.double()).norm() <= tolerance * exact.double().norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("L", "C", "F"), [(3, 40, 130), (1, 1, 16), (2, 33, 256)])
def test_gelu_and_its_backward_pass(L, C, F, dtype):
    generator = torch.Generator().manual_seed(L)
    pre, dh = (torch.randn(L, C, F, generator=generator).mul(2).to(DEVICE, dtype) for _ in range(2))
    bias, row_gate = torch.randn(L, F, generator=generator).to(DEVICE, dtype), torch.rand(L, C).to(DEVICE)
    exact = [x.double() for x in (pre, bias, dh, row_gate)]
    h = gelu.reference(exact[0], exact[1], exact[3])
    assert near(gelu.bias_gelu(pre, bias, row_gate), h, TOLERANCE[dtype])
    dot = torch.full((L * C, gelu.dot_parts(F)), 7.0, device=DEVICE)
    d_bias = gelu.bias_gelu_backward(pre, bias, dh, row_gate, dot)
    assert (dot[:, 0] == 7.0).all()
    found = dh, d_bias, dot[:, 1:].sum(1).view(L, C)
    for mine, expected in zip(found, gelu.backward_reference(*exact), strict=True):
        assert near(mine, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "R", "H"), [(30, 50, 70), (1, 3, 8), (40, 20, 1030)])
def test_gather_and_combine(T, R, H, dtype):
    generator = torch.Generator().manual_seed(T)
    x, bias = torch.randn(T, H, generator=generator), torch.randn(4, H, generator=generator)
    y = torch.randn(R, H, generator=generator)
    index_R = torch.randint(-1, T, (R,), generator=generator, dtype=torch.int32)
    row_T = torch.randint(-1, R, (T,), generator=generator, dtype=torch.int32)
    expert_T = torch.randint(0, 4, (T,), generator=generator, dtype=torch.int32)
    gate_T = torch.rand(T, generator=generator).to(DEVICE)
    x, bias, y = (z.to(DEVICE, dtype) for z in (x, bias, y))
    index_R, row_T, expert_T = (z.to(DEVICE) for z in (index_R, row_T, expert_T))
    found, gate_R = permute.gather(x, index_R, gate_T)
    assert torch.equal(found, permute.gather_reference(x, index_R))
    assert torch.equal(gate_R, permute.gather_reference(gate_T[:, None], index_R)[:, 0])
    exact = permute.combine_reference(y.double(), bias.double(), row_T, expert_T, gate_T.double())
    assert near(permute.combine(y, bias, row_T, expert_T, gate_T), exact, TOLERANCE[dtype])
    dot = torch.full((R, 3), 7.0, device=DEVICE)
    dy_R = permute.gather_gradients(x, bias, index_R, expert_T, dot)
    assert torch.equal(dy_R, permute.gather_reference(x, index_R))
    assert (dot[:, 1:] == 7.0).all()
    token = index_R.clamp(min=0).long()
    dots = (dy_R.double() * bias.double()[expert_T.long()[token]]).sum(-1)
    torch.testing.assert_close(dot[:, 0].double(), dots, rtol=1e-4, atol=1e-4)


def plain(x_TH, weight_EH, weights, capacity):
    """The layer from its definition: route, and send each token that has room through its expert."""
    routed = gate.reference(x_TH, weight_EH, capacity)
    w1, b1, w2, b2 = (w[routed.expert_T.long()] for w in weights)
    h = torch.nn.functional.gelu(torch.einsum("th,thf->tf", x_TH, w1) + b1, approximate="tanh")
    return (torch.einsum("tf,tfh->th", h, w2) + b2) * routed.gate_T[:, None], routed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("T", "H", "F", "E", "factor"), [(64, 32, 80, 4, 1.0), (50, 48, 64, 3, 0.4), (9, 16, 32, 8, 2)]
)
def test_the_whole_layer_and_all_gradients_are_those_of_float64(T, H, F, E, factor, dtype):
    generator = torch.Generator().manual_seed(T)
    capacity = max(1, int(T / E * factor))
    shapes = ((T, H), (E, H), (E, H, F), (E, F), (E, F, H), (E, H), (T, H))
    values = [torch.randn(*shape, generator=generator).to(DEVICE, dtype) for shape in shapes]
    for value, fan_in in zip(values, (1, H, H, 4, F, 4, 1), strict=True):
        value /= fan_in**0.5
    *values, dy = values
    mine = [value.clone().requires_grad_() for value in values]
    exact = [value.double().requires_grad_() for value in values]
    x, weight, *weights = mine
    found, routed = top1_layer(x, weight, tuple(weights), capacity, random=False)
    expected, exact_routed = plain(exact[0], exact[1], exact[2:], capacity)
    assert torch.equal(routed.expert_T, exact_routed.expert_T)
    assert near(found, expected, TOLERANCE[dtype])
    for y, r in ((found, routed), (expected, exact_routed)):
        ((y * dy.to(y.dtype)).sum() + r.aux_loss + 0.1 * r.z_loss).backward()
    for name, a, b in zip(("x", "router", "w1", "b1", "w2", "b2"), mine, exact, strict=True):
        assert near(a.grad, b.grad, 3 * TOLERANCE[dtype]), name
