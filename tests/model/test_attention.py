"""What attention asks torch for; tests/gpu/test_dropout_rate.py looks at what it gets."""

import pytest
import torch
import torch.nn.functional as F

from megatron.config import ModelConfig
from megatron.model.attention import SelfAttention


def shape(dropout: float) -> ModelConfig:
    return ModelConfig(hidden_size=16, num_attention_heads=2, attention_dropout=dropout)


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


def test_the_choice_of_backend_breaks_no_graph():
    layer = SelfAttention(shape(0.5), 0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(1, 4, 16)
    torch.manual_seed(1)
    expected = layer(x)
    torch.manual_seed(1)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), expected)
