"""Layers whose matrices are shared, against the same layer in one process: values and gradients."""

import pytest
import torch
import torch.distributed as dist
from distributed.spawn import run_distributed
from torch import nn

from megatron.config import ModelConfig, MoEConfig
from megatron.model.attention import SelfAttention
from megatron.model.loss import cross_entropy
from megatron.model.norm import build_norm
from megatron.moe.layer import MoELayer
from megatron.moe.mlp import MLP
from megatron.parallel.groups import ALONE, ExpertGroup, TensorGroup
from megatron.parallel.randomness import own_randomness
from megatron.parallel.sharding import collect_layouts, take
from megatron.parallel.tensor_collectives import (
    SEQUENCE,
    copy,
    enter_tensor_region,
    gather,
    leave_tensor_region,
    reduce,
    reduce_scatter,
    split,
)
from megatron.parallel.tensor_parallel import Dropout, VocabParallelEmbedding

B, S, H, V = 2, 8, 16, 24


def here(sequence_parallel: bool = False, shard_experts: bool = False) -> TensorGroup:
    return TensorGroup(dist.get_world_size(), dist.get_rank(), dist.group.WORLD, sequence_parallel, shard_experts)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stream(x: torch.Tensor, group: TensorGroup) -> torch.Tensor:
    """This process's part of a whole residual stream, a leaf."""
    if group.sequence_parallel:
        x = x.chunk(group.size, SEQUENCE)[group.rank]
    return x.clone().requires_grad_(x.is_floating_point())


def fill(module: nn.Module, group: TensorGroup) -> None:
    """Values of the whole parameter by its name, of which each process takes its piece."""
    from megatron.parallel.sharding import global_shape

    layouts = collect_layouts(module)
    for seed, (name, p) in enumerate(module.named_parameters()):
        shards = layouts[name].shards
        p.data = take(random(*global_shape(p.shape, shards), seed=seed) / 4, shards).clone()


SHAPE = ModelConfig(hidden_size=H, num_attention_heads=4, attention_dropout=0.0)
QK_NORM = ModelConfig(hidden_size=H, num_attention_heads=4, attention_dropout=0.0, qk_layernorm=True)
MODULES = {
    "mlp": lambda group: MLP(SHAPE, group),
    "attention": lambda group: SelfAttention(SHAPE, 0, group),
    "attention with norms of Q and K": lambda group: SelfAttention(QK_NORM, 0, group),
    "norm": lambda group: build_norm(SHAPE, group),
}


def compare_module(name: str, sequence_parallel: bool) -> float:
    """The largest difference, relative to the largest value, of output and gradients.

    The gradient of the bias of the keys' norm is 0 in theory; differences of so small values count as they are.
    """
    group = here(sequence_parallel)
    alone, shared = MODULES[name](ALONE), MODULES[name](group)
    fill(alone, ALONE)
    fill(shared, group)
    x, weight = random(B, S, H, seed=50), random(B, S, H, seed=51)
    whole, mine = x.clone().requires_grad_(), stream(x, group)
    y_whole, y_mine = alone(whole), shared(mine)
    (y_whole * weight).sum().backward()
    (y_mine * stream(weight, group).detach()).sum().backward()
    pairs = [(y_mine, stream(y_whole.detach(), group)), (mine.grad, stream(whole.grad, group))]
    layouts = collect_layouts(shared)
    pairs += [
        (p.grad, take(q.grad, layouts[name].shards))
        for (name, p), q in zip(shared.named_parameters(), alone.parameters(), strict=True)
    ]
    assert all(found.shape == expected.shape for found, expected in pairs)
    errors = [float((found - expected).abs().max() / expected.abs().max().clamp(min=0.1)) for found, expected in pairs]
    assert all(error == error for error in errors)
    return max(errors)


def compare_modules(sequence_parallel: bool) -> dict[str, float]:
    return {name: compare_module(name, sequence_parallel) for name in MODULES}


@pytest.mark.distributed
@pytest.mark.parametrize(("size", "sequence_parallel"), [(2, False), (2, True), (4, False), (4, True)])
def test_a_shared_layer_equals_the_whole_one(size, sequence_parallel):
    for errors in run_distributed(compare_modules, size, sequence_parallel):
        assert {name: error for name, error in errors.items() if not error < 1e-12} == {}


def compare_vocabulary(sequence_parallel: bool, dtype: torch.dtype) -> list[float]:
    """Embedding, head and loss in one: a token table that is both."""
    group = here(sequence_parallel)
    alone, shared = VocabParallelEmbedding(V, H), VocabParallelEmbedding(V, H, group)
    fill(alone, ALONE)
    fill(shared, group)
    tokens = torch.randint(0, V, (B, S), generator=torch.Generator().manual_seed(1))
    labels = torch.randint(0, V, (B, S), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(S) % 3 > 0).expand(B, S)
    results = []
    for module, who in ((alone, ALONE), (shared, group)):
        module.to(dtype)
        x = enter_tensor_region(module(tokens) * 30, who)  # logits far from even
        logits = nn.functional.linear(x, module.weight)
        loss = cross_entropy(logits, labels, mask, who)
        loss.backward()
        results.append((loss.detach().double(), module.weight.grad.double(), gather(logits, who, -1).detach().double()))
    (loss, grad, logits), (my_loss, my_grad, my_logits) = results
    grad = take(grad, shared.param_layouts()["weight"].shards)
    pairs = [(my_loss, loss), (my_grad, grad), (my_logits, logits)]
    return [float((found - expected).abs().max() / expected.abs().max()) for found, expected in pairs]


@pytest.mark.distributed
@pytest.mark.parametrize(("size", "sequence_parallel"), [(2, False), (2, True), (4, False)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 2e-2)])
def test_vocabulary_in_ranges(size, sequence_parallel, dtype, tolerance):
    for errors in run_distributed(compare_vocabulary, size, sequence_parallel, dtype):
        assert all(error <= tolerance for error in errors), errors


def chunked_loss() -> list[float]:
    from megatron.model import loss

    logits, labels = random(12, V, seed=3), torch.arange(12)
    group, results = here(), []
    for elements in (loss.CHUNK_ELEMENTS, V):  # all at once, and few rows at a time
        loss.CHUNK_ELEMENTS = elements
        mine = split(logits, group, -1).clone().requires_grad_()
        cross_entropy(mine[None], labels[None], None, group).backward()
        results.append(mine.grad)
    return [float((results[0] - results[1]).abs().max()), float(results[0].abs().max())]


@pytest.mark.distributed
def test_the_loss_in_chunks_is_the_loss():
    for difference, size in run_distributed(chunked_loss, 2):
        assert difference < 1e-15 < size


MOE = {
    "top-1": MoEConfig(num_experts=(4,), moe_train_capacity_factor=0.75, moe_min_capacity=1),
    "top-2": MoEConfig(num_experts=(4,), topk=2, moe_train_capacity_factor=0.5, moe_min_capacity=1),
    "top-3 RSample": MoEConfig(num_experts=(4,), topk=3, moe_noise_policy="RSample", moe_train_capacity_factor=0.5),
    "dropless residual": MoEConfig(num_experts=(4,), topk=2, moe_token_dropping=False, mlp_type="residual"),
}


def compare_experts(name: str, sequence_parallel: bool, shard_experts: bool, rows: int) -> dict[str, float]:
    model = ModelConfig(num_layers=2, hidden_size=H, num_attention_heads=4, seq_length=S, init_method_std=0.3)
    group, alone_expert = here(sequence_parallel, shard_experts), ExpertGroup(1, 0, None)
    x, weight = random(rows, S, H, seed=50), random(rows, S, H, seed=51)
    results = []
    for who in (ALONE, group):
        layer = MoELayer(model, MOE[name], 4, alone_expert, who, seed=3).double()
        mine = stream(x, who)
        torch.manual_seed(7)
        y, stats = layer(mine)
        ((y * stream(weight, who).detach()).sum() + stats.aux_loss + 0.1 * stats.z_loss).backward()
        results.append((layer, mine, y, stats))
    (alone, whole, expected_y, expected), (shared, mine, y, stats) = results
    pairs = {
        "y": (y, stream(expected_y.detach(), group)),
        "x": (mine.grad, stream(whole.grad, group)),
        "aux": (stats.aux_loss, expected.aux_loss),
        "z": (stats.z_loss, expected.z_loss),
        "counts": (stats.counts_E.double(), expected.counts_E.double()),
        "dropped": (stats.dropped.double() + 1, expected.dropped.double() + 1),
    }
    layouts = collect_layouts(shared)
    for (key, p), q in zip(shared.named_parameters(), alone.parameters(), strict=True):
        grad = p.grad.clone()
        if layouts[key].is_expert and not shard_experts:
            dist.all_reduce(grad)  # as the engine adds the gradients of replicated experts
        pairs[key] = (grad, take(q.grad, layouts[key].shards))
    assert MOE[name].moe_token_dropping == bool(expected.dropped)
    errors = {}
    for key, (found, wanted) in pairs.items():
        assert found.shape == wanted.shape, key
        errors[key] = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=0.1))  # 0: all dropped here
    return errors


@pytest.mark.distributed
@pytest.mark.parametrize("name", MOE)
@pytest.mark.parametrize(
    ("size", "sequence_parallel", "shard_experts", "rows"),
    [(2, False, False, B), (2, True, False, B), (4, True, False, 1), (2, False, True, B), (4, True, True, B)],
)
def test_experts_of_tensor_parallel_processes(name, size, sequence_parallel, shard_experts, rows):
    for errors in run_distributed(compare_experts, size, name, sequence_parallel, shard_experts, rows):
        assert all(error < 1e-12 for error in errors.values()), errors


def uneven_tokens() -> list[float]:
    """Dropless evaluation of fewer tokens than processes, of none, and of a number that does not divide."""
    model = ModelConfig(num_layers=2, hidden_size=H, num_attention_heads=4, seq_length=S, init_method_std=0.3)
    errors = []
    for count in (0, 1, 3, 7):
        x = random(1, count, H)
        one, many = (
            MoELayer(model, MOE["top-2"], 4, ExpertGroup(1, 0, None), who, seed=3).double().eval()(x)[0]
            for who in (ALONE, here())
        )
        assert one.shape == many.shape == x.shape
        errors.append(float((one - many).abs().sum()))
    return errors


@pytest.mark.distributed
def test_any_number_of_tokens_in_evaluation():
    for errors in run_distributed(uneven_tokens, 2):
        assert all(error < 1e-12 for error in errors), errors


def collectives() -> None:
    group = here()
    mine = random(4, 8, seed=group.rank)
    total = sum(random(4, 8, seed=rank) for rank in range(group.size))
    assert torch.allclose(reduce(mine, group), total)
    assert torch.allclose(reduce_scatter(mine, group, 1), total.chunk(group.size, 1)[group.rank])
    assert torch.equal(gather(split(total, group, 0), group, 0), total)
    sequence = here(sequence_parallel=True)
    for function in (
        lambda x: leave_tensor_region(enter_tensor_region(x, group) ** 2, group),
        lambda x: gather(split(x, group, 1) ** 2, group, 1),
        lambda x: reduce(copy(x, group) ** 2, group),
    ):
        x = total.clone().requires_grad_()  # a whole value in, a whole one out: its gradient is that of one process
        y = function(x)
        y.sum().backward()
        scale = float((y / total**2).mean())
        assert torch.allclose(x.grad, 2 * scale * total)
    piece = split(total, group, SEQUENCE).clone().requires_grad_()
    y = leave_tensor_region(enter_tensor_region(piece, sequence) ** 2, sequence)
    y.sum().backward()
    assert torch.allclose(y, group.size * piece**2)
    assert torch.allclose(piece.grad, 2 * group.size * piece)


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 4])
def test_collectives_and_their_gradients(size):
    run_distributed(collectives, size)


def masks(sequence_parallel: bool) -> dict[str, torch.Tensor]:
    group = here(sequence_parallel)
    torch.manual_seed(5)
    layer = Dropout(0.25, group)
    first = layer(torch.ones(64, 64))
    with own_randomness(group, torch.device("cpu")):
        own = torch.rand(4)
    second = layer(torch.ones(64, 64))
    return {"first": first, "second": second, "own": own, "after": torch.rand(4)}


@pytest.mark.distributed
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_dropout_agrees_where_tokens_do(sequence_parallel):
    one, two = run_distributed(masks, 2, sequence_parallel)
    for name in ("first", "second"):
        assert torch.equal(one[name], two[name]) != sequence_parallel
    assert not torch.equal(one["first"], one["second"])
    assert not torch.equal(one["own"], two["own"])
    assert torch.equal(one["after"], two["after"])
    for result in (one, two):
        kept = float((result["first"] > 0).double().mean())
        assert abs(kept - 0.75) < 0.03  # 4096 draws: 4.4 standard deviations
        assert result["first"].unique().tolist() == pytest.approx([0.0, 1 / 0.75])


def test_numbers_that_do_not_divide():
    with pytest.raises(ValueError, match=r"attention heads: 6 cannot be shared evenly by 4 .* 6 = 4 x 1 \+ 2"):
        SelfAttention(ModelConfig(hidden_size=24, num_attention_heads=6), 0, TensorGroup(4, 0, None))
    with pytest.raises(ValueError, match="a vocabulary of 10"):
        VocabParallelEmbedding(10, 4, TensorGroup(4, 0, None))
