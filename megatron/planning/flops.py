"""Floating-point operations of training, and the peaks of common devices, for TFLOP/s and MFU.

Model FLOPs: what the mathematics of the model needs, forward and backward. Recomputed activations, padding of capacity
and dropped tokens are not subtracted or added, so that a faster implementation always shows a higher figure.
"""

import re

from megatron.config.model import ModelConfig
from megatron.config.moe import MoEConfig
from megatron.planning.parameters import parameters_of_layer


def model_flops_per_token(
    model: ModelConfig, moe: MoEConfig, vocab_size: int, seq_length: int | None = None, *, forward_only: bool = False
) -> int:
    """Model FLOPs of one token in training, or of its forward pass alone.

    A weight matrix costs 2 FLOPs a parameter and token forward and 4 backward. A dense layer has 4h² in attention and
    2hf in its feed-forward, the head has Vh; attention over s positions adds 4sh forward, of which the causal mask
    leaves half. With f = 4h that is 6·(12·L·h² + V·h) + 6·L·h·s. An MoE layer has ``topk`` feed-forwards and a router
    of E·h; a residual one a dense feed-forward and its mixing product 2h besides. Biases, norms and softmax are not
    counted.

    Source: the PaLM paper (arXiv 2204.02311), appendix B, with the causal half.

    Args:
        vocab_size: the padded vocabulary V.
        seq_length: s; by default ``model.seq_length``.
    """
    length = seq_length or model.seq_length
    layers = sum(layer_flops_per_token(model, moe, layer, length) for layer in range(model.num_layers))
    forward = layers + head_flops_per_token(model, vocab_size)
    return forward if forward_only else 3 * forward


def layer_flops_per_token(model: ModelConfig, moe: MoEConfig, layer: int, seq_length: int) -> int:
    """Forward FLOPs of one token in layer number ``layer``, attention over ``seq_length`` positions included."""
    attention = 2 * model.hidden_size * seq_length
    dense = 2 * parameters_of_layer(model, moe, layer).dense_matrices
    return dense + expert_flops_per_token(model, moe, layer) + attention


def expert_flops_per_token(model: ModelConfig, moe: MoEConfig, layer: int) -> int:
    """Forward FLOPs of one token in the experts of layer number ``layer``; 0 in a dense layer."""
    return 2 * moe.topk * parameters_of_layer(model, moe, layer).expert_matrices // moe.experts_of_layer(layer)


def head_flops_per_token(model: ModelConfig, vocab_size: int) -> int:
    """Forward FLOPs of one token in the output layer."""
    return 2 * vocab_size * model.hidden_size


# Dense peak TFLOP/s with fp32 accumulation, without structured sparsity: (pattern of the device's name, bf16, fp16).
# The first match counts. Sources: NVIDIA's data sheets of V100, A100, H100 (SXM, PCIe and NVL), H200, B200 (HGX) and
# L40S (where a sheet gives only the sparse figure, half of it), the "NVIDIA Ada GPU Architecture" paper for RTX 4090,
# AMD's data sheet of MI300X.
_PEAKS: tuple[tuple[str, float | None, float], ...] = (
    (r"\bB200\b", 2250.0, 2250.0),
    (r"\b(H100|H200)\b.*\bNVL\b", 835.5, 835.5),
    (r"\bH100\b.*\bPCIe\b", 756.0, 756.0),
    (r"\b(H100|H200)\b", 989.4, 989.4),
    (r"\bA100\b", 312.0, 312.0),
    (r"\bV100S?-PCIE\b", None, 112.0),
    (r"\bV100\b", None, 125.0),
    (r"\bL40S\b", 362.0, 362.0),
    (r"\bRTX 4090$", 165.2, 165.2),
    (r"\bMI300X\b", 1307.4, 1307.4),
)


def peak_tflops(device_name: str, dtype: str) -> float | None:
    """Peak dense TFLOP/s of a device for ``dtype`` "bf16" or "fp16".

    None where it is not known: other devices, a slice of a GPU (MIG), bf16 on devices without it, and fp32, whose peak
    depends on whether TF32 is allowed.

    Args:
        device_name: as ``torch.cuda.get_device_name()`` says it, such as "NVIDIA H100 80GB HBM3".
        dtype: a precision of :class:`OptimizerConfig`.
    """
    if dtype not in ("bf16", "fp16") or re.search(r"\bMIG\b", device_name):
        return None
    for pattern, bf16, fp16 in _PEAKS:
        if re.search(pattern, device_name):
            return bf16 if dtype == "bf16" else fp16
    return None
