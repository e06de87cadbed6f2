"""On a GPU the model computes what it computes on the CPU, cached and uncached; its loss takes little memory."""

import pytest
import torch
import torch.nn.functional as F

from megatron.config import ModelConfig, MoEConfig
from megatron.inference.generate import generate
from megatron.inference.kv_cache import KVCache
from megatron.inference.sampling import Sampling
from megatron.model.gpt import GPTModel
from megatron.model.loss import cross_entropy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPE = ModelConfig(num_layers=4, hidden_size=256, num_attention_heads=4, seq_length=128)
KINDS = pytest.mark.parametrize("moe", [MoEConfig(), MoEConfig(num_experts=(8,))], ids=["dense", "moe"])
VOCAB = 1024


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(0))


@KINDS
def test_logits_and_gradients_equal_the_cpu(moe):
    data = tokens(2, 65)
    results = []
    for device in ("cpu", "cuda"):
        model = GPTModel(SHAPE, moe, VOCAB, seed=3).to(device).eval()
        logits = model(data[:, :-1].to(device))
        loss, _ = model.loss(data[:, :-1].to(device), data[:, 1:].to(device))
        loss.backward()
        results.append((logits.cpu(), loss.cpu(), [p.grad.cpu() for p in model.parameters()]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_initial_values_equal_the_cpu():
    with torch.device("cuda"):
        on_gpu = GPTModel(SHAPE, MoEConfig(), VOCAB, seed=3)
    assert all(parameter.is_cuda for parameter in on_gpu.parameters())
    expected = GPTModel(SHAPE, MoEConfig(), VOCAB, seed=3).state_dict()
    torch.testing.assert_close({n: v.cpu() for n, v in on_gpu.state_dict().items()}, expected, rtol=0, atol=0)


@KINDS
@torch.no_grad()
def test_cached_logits_equal_uncached(moe):
    model, prompt = GPTModel(SHAPE, moe, VOCAB).cuda().eval(), tokens(3, 100).cuda()
    cache = KVCache.for_model(model, 3, 128)
    pieces = [model(chunk, cache=cache) for chunk in prompt.split([60, 1, 1, 38], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(prompt), rtol=1e-5, atol=1e-5)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_generation(moe, dtype):
    prompts = [list(range(2, 2 + length)) for length in (3, 40, 1)]
    model = GPTModel(SHAPE, moe, VOCAB).cuda().to(dtype)
    new = generate(model, prompts, 60, Sampling(top_p=0.9), vocab_size=1000)
    assert [len(sequence) for sequence in new] == [60, 60, 60]
    assert max(map(max, new)) < 1000
    if dtype == torch.float32:  # draws do not depend on the device
        assert new == generate(model.cpu(), prompts, 60, Sampling(top_p=0.9), vocab_size=1000)


def test_the_loss_needs_little_more_than_the_gradient_of_the_logits():
    labels = torch.randint(50304, (8, 2048), device="cuda")
    logits = torch.randn(8, 2048, 50304, device="cuda", dtype=torch.bfloat16).requires_grad_()
    with torch.no_grad():
        expected = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = cross_entropy(logits, labels)
    loss.backward()
    used = torch.cuda.max_memory_allocated() - before
    assert used < 1.6 * logits.numel() * 2
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=0)
