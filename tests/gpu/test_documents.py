"""Documents kept apart on a GPU: the variable-length kernel computes what the mask does, compiled or not."""

import itertools

import pytest
import torch
from distributed.spawn import run_distributed
from distributed.test_deterministic import assert_same_bits
from gpu import small_training
from gpu.small_training import MICRO, SEQ, STEPS, build, updates
from gpu.test_cuda_graphs import graphs_of, strictly

from megatron.config import DataConfig, ModelConfig, MoEConfig
from megatron.data.documents import cumulative_lengths, restarting_positions, with_documents
from megatron.model import document_attention as module
from megatron.model.document_attention import document_attention, document_mask
from megatron.model.gpt import GPTModel
from megatron.model.layer import compile_layers

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

VOCAB, EOD = 1024, 1023
ALL = DataConfig(reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True)
NO_MASK = DataConfig(reset_position_ids=True, eod_mask_loss=True)


def text(batch: int, length: int, mean: int, seed: int = 0) -> torch.Tensor:
    """Random tokens [batch, length] in documents of ``mean`` tokens; the first sequence is one document."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(EOD, (batch, length), generator=generator)
    tokens[torch.rand(tokens.shape, generator=generator) < 1 / mean] = EOD
    tokens[0] %= EOD
    tokens[-1, :3] = EOD
    return tokens.cuda()


def lengths(tokens: torch.Tensor) -> torch.Tensor:
    return cumulative_lengths(tokens.cpu(), EOD).cuda()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("length", [512, 2048])
def test_the_kernel_computes_what_the_mask_does(dtype, head_size, length):
    cu_seqlens = lengths(text(4, length, 100))
    made = torch.randn(4, length, 3, 4, head_size, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    outer = torch.randn(4, 4, length, head_size, device="cuda", generator=torch.Generator("cuda").manual_seed(2))
    results = []
    for kind in (dtype, torch.float32):
        leaf = made.to(dtype).to(kind).requires_grad_()
        q, k, v = leaf.permute(2, 0, 3, 1, 4).unbind(0)
        assert module._flash_supports(q) == (kind == dtype)
        y = document_attention(q, k, v, cu_seqlens)
        (y.float() * outer).sum().backward()
        results.append((y.float(), leaf.grad.float()))
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() < 1e-2 * expected.norm()
        torch.testing.assert_close(found, expected, rtol=0.1, atol=0.05)


def test_head_sizes_that_the_kernel_does_not_serve_are_masked():
    cu_seqlens = lengths(text(2, 128, 20))
    q, k, v = torch.randn(3, 2, 4, 128, 20, device="cuda", dtype=torch.bfloat16)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.float(), k.float(), v.float(), attn_mask=document_mask(cu_seqlens, 2, 128)
    )
    found = document_attention(q, k, v, cu_seqlens).float()
    assert (found - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("compiled", [False, True])
@torch.no_grad()
def test_packed_documents_are_those_documents_on_their_own(compiled):
    shape = ModelConfig(num_layers=4, hidden_size=256, num_attention_heads=4, seq_length=256)
    tokens = text(4, 256, 40)
    model = GPTModel(shape, MoEConfig(), VOCAB, seed=3).cuda().bfloat16().eval()
    if compiled:
        compile_layers(model.layers.values())
    bounds = lengths(tokens)
    logits = model(tokens, position_ids=restarting_positions(tokens.cpu(), EOD).cuda(), cu_seqlens=bounds)
    exact = GPTModel(shape, MoEConfig(), VOCAB, seed=3).cuda().eval()
    expected = torch.cat(
        [exact(tokens.view(1, -1)[:, a:b])[0] for a, b in itertools.pairwise(bounds.tolist()) if a < b]
    )
    assert (logits.flatten(0, 1).float() - expected).norm() < 3e-2 * expected.norm()


def batch(data: DataConfig, number: int, length: int = SEQ) -> dict:
    """As that of :mod:`gpu.small_training`, in documents of a number of tokens that differs between micro-batches."""
    made = plain_batch(number, length)
    generator = torch.Generator().manual_seed(number)
    ends = torch.rand(MICRO, length, generator=generator) < 1 / (12 << number % 3)
    made["tokens"] = made["tokens"].masked_fill(ends, EOD)
    made = with_documents(made, data, EOD)
    return {name: x.pin_memory() if isinstance(x, torch.Tensor) else x for name, x in made.items()}


plain_batch = small_training.batch


def train(data: DataConfig, masked: bool = False, **options):
    small_training.batch = lambda number, length=SEQ: batch(data, number, length)
    if masked:
        module._flash_supports = lambda q: False
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    engine = build(MoEConfig(num_experts=(8,)), dropout=0.0, data=data, **options)
    result = updates(engine, 0, STEPS)
    if options.get("cuda_graphs"):
        assert graphs_of(engine) > 0
    return result


def test_training_follows_that_with_a_mask():
    (kernel,) = run_distributed(train, 1, ALL, timeout=400, backend="nccl")
    (masked,) = run_distributed(train, 1, ALL, True, timeout=400, backend="nccl")
    (other,) = run_distributed(train, 1, NO_MASK, timeout=400, backend="nccl")
    assert kernel.losses[-1] < kernel.losses[0]
    torch.testing.assert_close(torch.tensor(kernel.losses), torch.tensor(masked.losses), rtol=1e-2, atol=0)
    torch.testing.assert_close(torch.tensor(kernel.norms), torch.tensor(masked.norms), rtol=0.1, atol=0)
    assert kernel.losses != other.losses


def train_twice(options: dict) -> tuple:
    return train(ALL, **options), train(ALL, **options)


@pytest.mark.parametrize("options", [{}, {"checkpoint_activations": True}], ids=["kept", "recomputed"])
def test_training_repeats_bit_for_bit(options):
    ((one, again),) = run_distributed(strictly, 1, train_twice, options, timeout=400, backend="nccl")
    assert_same_bits([again], [one])


def with_and_without_graphs() -> tuple:
    return train(NO_MASK), train(NO_MASK, cuda_graphs=True)


def test_cuda_graphs_take_positions_and_masked_losses():
    ((plain, graphed),) = run_distributed(strictly, 1, with_and_without_graphs, timeout=400, backend="nccl")
    assert_same_bits([graphed], [plain])
