import dataclasses

import pytest
import torch

from megatron.config import ModelConfig, MoEConfig
from megatron.inference.kv_cache import KVCache
from megatron.model.gpt import GPTModel
from megatron.moe.balancing import learned_buffers

SHAPE = ModelConfig(num_layers=4, hidden_size=48, num_attention_heads=4, seq_length=32, init_method_std=0.15)
KINDS = pytest.mark.parametrize(
    "moe",
    [
        MoEConfig(),
        MoEConfig(num_experts=(4,)),
        MoEConfig(num_experts=(4,), topk=2, mlp_type="residual"),
        MoEConfig(num_experts=(4,), moe_router_load_balancing_type="quantile_balancing"),
    ],
    ids=["dense", "moe", "residual top-2", "biased"],
)
VOCAB = 128


def built(moe: MoEConfig) -> GPTModel:
    model = GPTModel(SHAPE, moe, VOCAB, seed=7).eval()
    for buffer in learned_buffers(model).values():
        buffer.normal_(generator=torch.Generator().manual_seed(3))
    return model


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(batch * 100 + length))


@KINDS
@pytest.mark.parametrize("chunks", [[20], [1] * 20, [7, 1, 1, 8, 3], [1, 19]], ids=str)
@torch.no_grad()
def test_cached_logits_equal_uncached(moe, chunks):
    model, prompt = built(moe), tokens(3, 20)
    expected = model(prompt)
    cache = KVCache.for_model(model, 3, 32)
    pieces = [model(chunk, cache=cache) for chunk in prompt.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=1e-5, atol=1e-5)
    assert cache.lengths_B.tolist() == [20, 20, 20]


@torch.no_grad()
def test_normalized_keys_are_cached():
    model, prompt = GPTModel(dataclasses.replace(SHAPE, qk_layernorm=True), MoEConfig(), VOCAB).eval(), tokens(3, 20)
    for layer in model.layers.values():
        layer.attention.k_layernorm.weight.normal_(2.0)
        layer.attention.k_layernorm.bias.normal_()
    cache = KVCache.for_model(model, 3, 32)
    pieces = [model(chunk, cache=cache) for chunk in prompt.split([7, 1, 1, 8, 3], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(prompt), rtol=1e-5, atol=1e-5)


@KINDS
@torch.no_grad()
def test_sequences_of_unequal_lengths_go_on_where_each_ends(moe):
    model, lengths = built(moe), [5, 12, 1]
    prompts = [tokens(1, length) for length in lengths]
    more = tokens(3, 6)
    padded = torch.zeros(3, 12, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        padded[row, : prompt.size(1)] = prompt
    cache = KVCache.for_model(model, 3, 20)
    model(padded, cache=cache)
    cache.truncate(lengths)
    pieces = [model(chunk, cache=cache) for chunk in more.split([2, 1, 3], dim=1)]
    for row, prompt in enumerate(prompts):
        alone = model(torch.cat([prompt, more[row : row + 1]], dim=1))[0, prompt.size(1) :]
        torch.testing.assert_close(torch.cat(pieces, dim=1)[row], alone, rtol=1e-5, atol=1e-5)
    assert cache.lengths_B.tolist() == [11, 18, 7]


@torch.no_grad()
def test_the_cache_is_used():
    """A cache of other keys gives other logits: equality above does not come from ignoring it."""
    model = built(MoEConfig())
    after = []
    for seed in (1, 2):
        cache = KVCache.for_model(model, 1, 8)
        model(torch.full((1, 4), seed), cache=cache)
        after.append(model(torch.full((1, 1), 9), cache=cache))
    assert (after[0] - after[1]).abs().max() > 1e-3


@torch.no_grad()
def test_a_full_cache_and_a_short_position_table():
    model = built(MoEConfig())
    cache = KVCache.for_model(model, 1, 4)
    model(tokens(1, 3), cache=cache)
    with pytest.raises(ValueError, match=r"2 tokens after the 3 in the cache need 5 slots; .* max_length 4"):
        model(tokens(1, 2), cache=cache)
    with pytest.raises(ValueError, match="33 tokens do not fit the position table of 32 rows"):
        KVCache.for_model(model, 1, 33)


@torch.no_grad()
def test_it_takes_the_models_number_format():
    model = built(MoEConfig()).to(torch.bfloat16)
    cache = KVCache.for_model(model, 2, 8)
    prompt = tokens(2, 8)
    pieces = [model(chunk, cache=cache) for chunk in prompt.split([5, 3], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(prompt), rtol=0.05, atol=0.05)


@torch.no_grad()
def test_dropout_stays_off_with_a_cache():
    model = GPTModel(dataclasses.replace(SHAPE, attention_dropout=0.5, hidden_dropout=0.5), MoEConfig(), VOCAB).eval()
    prompt = tokens(1, 6)
    torch.testing.assert_close(model(prompt, cache=KVCache.for_model(model, 1, 6)), model(prompt), rtol=1e-5, atol=1e-5)
