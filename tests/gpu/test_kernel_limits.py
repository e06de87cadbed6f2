"""Kernels on a GPU where numbers get large: more tiles than the short axes of a grid have, offsets beyond 32 bits, the
most experts. What they compute on ordinary sizes is tested beside them, in Triton's interpreter too."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
from megatron.engine.kernels import adamw as adamw_kernels
from megatron.engine.optim import ParameterSlice
from megatron.engine.optim.adamw import Rates
from megatron.model.kernels import cross_entropy
from megatron.moe import kernels
from megatron.moe.kernels import experts, gate, gelu, permute, tiles
from megatron.moe.kernels.top1_layer import top1_layer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SHORT_AXIS = 65_535
MANY = 70_000 * tiles.ROWS  # rows
LONG = 2**31
DEVICE = "cuda"


@pytest.fixture(autouse=True)
def large_memory():
    """The largest tests take about 30 GB."""
    free, _ = torch.cuda.mem_get_info()
    if free < 40 * 2**30:
        pytest.skip(f"needs 40 GiB of free GPU memory, and there are {free / 2**30:.0f}")
    yield
    torch.cuda.empty_cache()


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def near(found: torch.Tensor, exact: torch.Tensor, tolerance: float = 2e-2) -> bool:
    """Whether the error is small against the whole; never with NaN."""
    return bool((found.double() - exact.double()).norm() <= tolerance * exact.double().norm())


def weights(L: int, H: int) -> tuple[torch.Tensor, ...]:
    shapes = ((L, H, H), (L, H), (L, H, H), (L, H))
    return tuple((normal(*shape) / (H**0.5 if len(shape) == 3 else 1)).requires_grad_() for shape in shapes)


def by_hand(x: torch.Tensor, values: tuple[torch.Tensor, ...], expert: int) -> torch.Tensor:
    w1, b1, w2, b2 = (value[expert] for value in values)
    return F.gelu(x @ w1 + b1, approximate="tanh") @ w2 + b2


def compare(found: torch.Tensor, x: torch.Tensor, values: tuple[torch.Tensor, ...], counts: list[int]) -> None:
    """Outputs for rows sorted by expert, and all gradients, with those of fp32 by hand."""
    dy = normal(*found.shape)
    found.backward(dy)
    exact_x = x.detach().float().requires_grad_()
    exact = tuple(value.detach().float().requires_grad_() for value in values)
    pieces = [by_hand(piece, exact, expert) for expert, piece in enumerate(exact_x.flatten(0, -2).split(counts))]
    expected = torch.cat(pieces)
    expected.backward(dy.flatten(0, -2).float())
    assert near(found.flatten(0, -2), expected)
    assert near(x.grad, exact_x.grad)
    for value, wanted in zip(values, exact, strict=True):
        assert near(value.grad, wanted.grad)


def test_more_tiles_of_sorted_rows_than_a_short_axis_has():
    """As in a dropless layer with many tokens."""
    H, counts = 64, [5, 0, MANY, 1000]
    x, values = normal(sum(counts), H).requires_grad_(), weights(len(counts), H)
    if not kernels.groupable(x, H):
        pytest.skip("torch has no grouped product on this GPU")
    counts_L = torch.tensor(counts, device=DEVICE)
    assert tiles.table(counts_L, sum(counts)).tiles.size(0) > SHORT_AXIS
    compare(experts.expert_mlp_sorted(x, values, counts_L), x, values, counts)


def test_more_tiles_of_an_expert_than_a_short_axis_has():
    H, L = 64, 2
    x, values = normal(L, 1, MANY, H).requires_grad_(), weights(L, H)
    compare(experts.expert_mlp(x, values), x, values, [MANY] * L)


def test_activations_of_more_than_2_to_the_31():
    H, R = 4096, LONG // 4096 + 1000
    pre, dh, bias = normal(R, H), normal(R, H), normal(1, H)
    last = slice(R - 500, R)
    expected = gelu.backward_reference(
        pre[None, last].float(), bias.float(), dh[None, last].float(), torch.ones(1, 500, device=DEVICE)
    )
    table = tiles.table(torch.tensor([R], device=DEVICE), R)
    h = gelu.bias_gelu(pre, bias, table=table)
    again, d_bias = gelu.bias_gelu_again(pre, bias, dh, table)
    assert torch.equal(h, again)
    assert near(h[last], F.gelu(pre[last].float() + bias.float(), approximate="tanh"))
    assert near(dh[last], expected[0][0])
    assert near(d_bias[0], dh.sum(0, dtype=torch.float32), 5e-2)  # of gradients that have been rounded


def test_rows_of_more_than_2_to_the_31_numbers():
    T, K, H = LONG // 4096 // 2 + 500, 2, 4096
    expert_TK = torch.stack([torch.zeros(T), torch.ones(T)], 1).to(DEVICE, torch.int64)
    slot_TK = torch.arange(T, device=DEVICE)[:, None].expand(T, K).contiguous()
    row_map = permute.sorted_row_map(expert_TK, slot_TK, torch.tensor([T, T], device=DEVICE))
    x, gates = normal(T, H).requires_grad_(), torch.rand(T, K, device=DEVICE).requires_grad_()
    moved = permute.permute(x, row_map)
    assert moved.numel() > LONG
    assert torch.equal(moved[T:], x)
    y = permute.unpermute(moved, gates, row_map)
    last = slice(T - 300, T)
    assert near(y[last], x[last] * gates[last].sum(1, keepdim=True))
    y.backward(torch.ones_like(y))
    assert near(x.grad[last], gates[last].sum(1, keepdim=True).expand(-1, H))
    assert near(gates.grad[last], x[last].float().sum(1, keepdim=True).expand(-1, K))


@pytest.mark.parametrize(("T", "V"), [(LONG // 50_304 + 300, 50_304), (3, 1), (1, 1)])
def test_logits_of_more_than_2_to_the_31_and_of_one_word(T, V):
    logits = normal(T, V).requires_grad_()
    labels = torch.randint(V, (T,), device=DEVICE)
    last = logits[-200:].detach().float().requires_grad_()
    loss = cross_entropy.cross_entropy(logits, labels)
    expected = F.cross_entropy(last, labels[-200:], reduction="none")
    torch.testing.assert_close(loss[-200:], expected, rtol=1e-5, atol=1e-5)
    loss.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(logits.grad[-200:].float(), last.grad, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16], ids=str)
def test_an_update_of_more_than_2_to_the_31_weights(moments):
    numel, some = LONG + 5000, 8000
    master, gradient, weight = (
        torch.full((numel,), value, device=DEVICE, dtype=dtype)
        for value, dtype in ((1.0, torch.float32), (0.5, torch.bfloat16), (0.0, torch.bfloat16))
    )
    states = {name: torch.full((numel,), 0.25, device=DEVICE, dtype=moments) for name in ("exp_avg", "exp_avg_sq")}
    all_, small = (
        ParameterSlice(*(make(x) for x in (master, gradient, weight)), {n: make(x) for n, x in states.items()})
        for make in (lambda x: x, lambda x: x[:some].clone())
    )
    rates = Rates(torch.tensor([1.0, 1e-3, 1.0, 7.0], device=DEVICE), 1e-3, 0.9, 0.95, 1e-8, 0.1)
    assert float(adamw_kernels.square_sum([gradient])) == pytest.approx(numel * 0.25, rel=1e-6)
    adamw_kernels.update(all_, rates)
    adamw_kernels.update(small, rates)
    for whole, part in [
        (master, small.master),
        (weight, small.weight),
        *((states[n], small.states[n]) for n in states),
    ]:
        assert torch.equal(whole[-some:], part)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("E", [256, 257, 512, 513, 1024])
@pytest.mark.parametrize(("T", "capacity"), [(1, 1), (2048, 8)])
def test_the_top_1_layer_with_many_experts(E, T, capacity, dtype):
    H = 64
    x, router = normal(T, H, dtype=dtype), normal(E, H, dtype=dtype) / 8
    values = [w.to(dtype).detach().requires_grad_() for w in weights(E, H)]
    assert gate.fits(x, router), "an H200 has the shared memory"
    x.requires_grad_()
    router.requires_grad_()
    y, found = top1_layer(x, router, tuple(values), capacity, random=False)
    exact = [t.detach().double().requires_grad_() for t in (x, router, *values)]
    routed = gate.reference(exact[0], exact[1], capacity)
    assert torch.equal(found.token_R, routed.token_R)
    assert torch.equal(found.counts_E, routed.counts_E)
    w1, b1, w2, b2 = (value[routed.expert_T.long()] for value in exact[2:])
    h = F.gelu(torch.einsum("th,thf->tf", exact[0], w1) + b1, approximate="tanh")
    expected = (torch.einsum("tf,tfh->th", h, w2) + b2) * routed.gate_T[:, None]
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    assert near(y, expected, tolerance)
    dy = normal(T, H, dtype=dtype)
    torch.autograd.backward([y, found.aux_loss, found.z_loss], [dy, *(torch.ones((), device=DEVICE),) * 2])
    torch.autograd.backward(
        [expected, routed.aux_loss, routed.z_loss],
        [dy.double(), *(torch.ones((), device=DEVICE, dtype=torch.float64),) * 2],
    )
    for mine, wanted in zip((x, router, *values), exact, strict=True):
        assert near(mine.grad, wanted.grad, tolerance)
