"""FLOPs against the published formula, and the names of devices."""

import pytest

from megatron.config import ModelConfig, MoEConfig
from megatron.config.presets import PRESETS
from megatron.config.run import build
from megatron.planning.flops import model_flops_per_token, peak_tflops

V = 50304
DENSE = MoEConfig()


@pytest.mark.parametrize("name", ["125M", "350M", "1.3B", "6.7B"])
def test_dense_models_follow_the_formula(name):
    model = build(PRESETS[name]).model
    layers, h, s = model.num_layers, model.hidden_size, model.seq_length
    assert model_flops_per_token(model, DENSE, V) == 6 * (12 * layers * h**2 + V * h) + 6 * layers * h * s


def test_length_and_forward_only():
    model = ModelConfig(num_layers=3, hidden_size=64, num_attention_heads=4, seq_length=128)
    longer = model_flops_per_token(model, DENSE, V, seq_length=256)
    assert longer - model_flops_per_token(model, DENSE, V) == 6 * 3 * 64 * 128
    assert 3 * model_flops_per_token(model, DENSE, V, forward_only=True) == model_flops_per_token(model, DENSE, V)


def test_experts_cost_topk_feed_forwards_and_a_router():
    model = ModelConfig(num_layers=4, hidden_size=64, num_attention_heads=4, ffn_hidden_size=96)
    dense = model_flops_per_token(model, DENSE, V)
    feed_forward = 6 * 2 * 64 * 96

    def extra(**moe) -> int:
        return model_flops_per_token(model, MoEConfig(**moe), V) - dense

    assert extra(num_experts=(8,)) == 2 * 6 * 8 * 64  # top-1: the routers of two layers only
    assert extra(num_experts=(8,), topk=3) == 2 * (2 * feed_forward + 6 * 8 * 64)
    assert extra(num_experts=(8,), mlp_type="residual") == 2 * (feed_forward + 6 * (8 * 64 + 2 * 64))
    assert extra(num_experts=(8, 1)) == 6 * 8 * 64
    assert extra(num_experts=(1,)) == 0


@pytest.mark.parametrize(
    ("device", "bf16", "fp16"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0, 312.0),
        ("NVIDIA A100-PCIE-40GB", 312.0, 312.0),
        ("NVIDIA H100 80GB HBM3", 989.4, 989.4),
        ("NVIDIA H100 PCIe", 756.0, 756.0),
        ("NVIDIA H100 NVL", 835.5, 835.5),
        ("NVIDIA H200", 989.4, 989.4),
        ("NVIDIA B200", 2250.0, 2250.0),
        ("Tesla V100-SXM2-32GB", None, 125.0),
        ("Tesla V100-PCIE-16GB", None, 112.0),
        ("NVIDIA L40S", 362.0, 362.0),
        ("NVIDIA GeForce RTX 4090", 165.2, 165.2),
        ("AMD Instinct MI300X", 1307.4, 1307.4),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA RTX A1000", None, None),
        ("NVIDIA H20", None, None),
        ("NVIDIA L40", None, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None),
        ("cpu", None, None),
    ],
)
def test_peaks(device, bf16, fp16):
    assert (peak_tflops(device, "bf16"), peak_tflops(device, "fp16")) == (bf16, fp16)
    assert peak_tflops(device, "fp32") is None
