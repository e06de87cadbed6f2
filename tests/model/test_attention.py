"""What attention asks torch for; tests/gpu/test_dropout_rate.py looks at what it gets."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from megatron.config import ModelConfig
from megatron.model.attention import SelfAttention


def shape(dropout: float, qk_layernorm: bool = False) -> ModelConfig:
    return ModelConfig(hidden_size=16, num_attention_heads=2, attention_dropout=dropout, qk_layernorm=qk_layernorm)


def filled(layer: SelfAttention) -> SelfAttention:
    """With no parameter as it would be initialised."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in layer.named_parameters():
        torch.nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=0.5, generator=generator)
    return layer


@pytest.mark.parametrize(("dropout", "training", "cudnn"), [(0.1, True, False), (0.1, False, True), (0.0, True, True)])
def test_cudnn_may_not_drop(monkeypatch, dropout: float, training: bool, cudnn: bool):
    seen = []

    def attention(*args, **kwargs):
        seen.append((kwargs["dropout_p"], torch.backends.cuda.cudnn_sdp_enabled()))
        return original(*args, **kwargs)

    original = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    SelfAttention(shape(dropout), 0).train(training)(torch.randn(1, 4, 16))
    assert seen == [(dropout if training else 0.0, cudnn)]
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("qk_layernorm", [False, True])
def test_the_choice_of_backend_breaks_no_graph(qk_layernorm: bool):
    layer = filled(SelfAttention(shape(0.5, qk_layernorm), 0))
    x = torch.randn(1, 4, 16)
    torch.manual_seed(1)
    expected = layer(x)
    torch.manual_seed(1)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), expected)


def plain_attention(layer: SelfAttention, x_BSH: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Attention with normalized queries and keys, written out."""
    B, S, H = x_BSH.shape
    qkv = x_BSH @ layer.qkv.weight.T + layer.qkv.bias
    q, k, v = qkv.view(B, S, 3, layer.num_heads, -1).unbind(2)  # (B, S, N, D)

    def normalized(heads: torch.Tensor, norm: torch.nn.Module) -> torch.Tensor:
        centered = heads - heads.mean(-1, keepdim=True)
        return centered / (centered.square().mean(-1, keepdim=True) + epsilon).sqrt() * norm.weight + norm.bias

    q, k = normalized(q, layer.q_layernorm), normalized(k, layer.k_layernorm)
    scores = torch.einsum("bsnd,btnd->bnst", q, k) / q.size(-1) ** 0.5
    scores = scores.masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), -torch.inf)
    y = torch.einsum("bnst,btnd->bsnd", scores.softmax(-1), v).reshape(B, S, H)
    return y @ layer.dense.weight.T + layer.dense.bias


def test_queries_and_keys_are_normalized_head_by_head():
    model = dataclasses.replace(shape(0.0, qk_layernorm=True), layernorm_epsilon=0.1)
    layer = filled(SelfAttention(model, 0)).double()
    x, weight = torch.randn(2, 3, 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).unbind(0)
    x.requires_grad_()
    inputs = (x, *layer.parameters())
    found, expected = layer(x), plain_attention(layer, x, epsilon=0.1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad((y * weight).sum(), inputs) for y in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)
    of_norms = dict(zip(dict(layer.named_parameters()), gradients[0][1:], strict=True))
    assert all(of_norms[f"{name}_layernorm.weight"].abs().max() > 0.01 for name in "qk")
    rounded = layer.bfloat16()(x.bfloat16())
    torch.testing.assert_close(rounded.double(), expected, rtol=0.05, atol=0.05)


def test_documents_with_normalized_queries_and_keys_are_those_on_their_own():
    layer = filled(SelfAttention(shape(0.0, qk_layernorm=True), 0))
    x = torch.randn(1, 9, 16)
    packed = layer(x, cu_seqlens=torch.tensor([0, 4, 9], dtype=torch.int32))
    torch.testing.assert_close(packed, torch.cat([layer(x[:, :4]), layer(x[:, 4:])], dim=1))
