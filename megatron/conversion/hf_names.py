"""Names of our parameters and expert biases, and of Hugging Face's: one table, read in both directions.

The matrices of stock GPT-2 are stored input-first (Conv1D), the transpose of ours. Other models are
:mod:`megatron.conversion.hf_moe`, whose matrices are output-first (Linear) except for the experts', which are stacked
and input-first, as ours. Exports of earlier versions have one module for each expert.

Shapes: H hidden, F FFN hidden.
"""

import dataclasses
from collections.abc import Iterator

from megatron.config import ModelConfig, MoEConfig
from megatron.conversion.contents import ROUTER_BUFFERS, buffer_shapes, parameter_shapes
from megatron.conversion.hf_config import is_gpt2

_OUTSIDE = {
    "embedding.word_embeddings.weight": "transformer.wte.weight",
    "embedding.position_embeddings.weight": "transformer.wpe.weight",
    "final_layernorm.weight": "transformer.ln_f.weight",
    "final_layernorm.bias": "transformer.ln_f.bias",
}
_IN_LAYER = {
    "input_layernorm": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.q_layernorm": "attn.q_layernorm",
    "attention.k_layernorm": "attn.k_layernorm",
    "attention.dense": "attn.c_proj",
    "post_attention_layernorm": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "mlp.router": "mlp.router",
    "mlp.router.balancer": "mlp.balancer",
    "mlp.router.centering": "mlp.centering",
    "mlp.mlp.fc1": "mlp.dense.c_fc",
    "mlp.mlp.fc2": "mlp.dense.c_proj",
    "mlp.coefficient": "mlp.coefficient",
}
_OF_EXPERTS = {"w1": "up_proj", "b1": "up_proj_bias", "w2": "down_proj", "b2": "down_proj_bias"}
_OF_ONE_EXPERT = {"w1": "c_fc.weight", "b1": "c_fc.bias", "w2": "c_proj.weight", "b2": "c_proj.bias"}


@dataclasses.dataclass(frozen=True)
class HFTensor:
    """One tensor of an export, and our parameter that it holds, or holds a row of."""

    theirs: str  # its name
    ours: str
    row: int | None  # the expert, in our stacked tensors
    transposed: bool
    shape: tuple[int, ...]  # of the export's tensor


def hf_tensors(model: ModelConfig, moe: MoEConfig, vocab_size: int, stacked: bool = True) -> Iterator[HFTensor]:
    """Every parameter of a model, in the model's order: each of ours, or each row of a stacked one, exactly once; then
    what its routers have learned.

    Args:
        model: its shape.
        moe: its experts.
        vocab_size: rows of the token table.
        stacked: whether a layer's experts are stacked there, too.
    """
    buffers = buffer_shapes(model, moe, vocab_size)
    learned = {name: shape for name, shape in buffers.items() if name.endswith(ROUTER_BUFFERS)}
    for name, shape in (parameter_shapes(model, moe, vocab_size) | learned).items():
        if name in _OUTSIDE:
            yield HFTensor(_OUTSIDE[name], name, None, False, shape)
            continue
        _, layer, inside = name.split(".", 2)
        module, kind = inside.rsplit(".", 1)
        prefix = f"transformer.h.{layer}."
        if module == "mlp.experts" and stacked:
            yield HFTensor(f"{prefix}mlp.experts.{_OF_EXPERTS[kind]}", name, None, False, shape)
        elif module == "mlp.experts":
            for row in range(shape[0]):
                transposed = kind in ("w1", "w2")  # ours are input-first
                theirs = f"{prefix}mlp.experts.{row}.{_OF_ONE_EXPERT[kind]}"
                yield HFTensor(theirs, name, row, transposed, shape[:0:-1] if transposed else shape[1:])
        else:
            transposed = is_gpt2(model, moe) and kind == "weight" and not module.endswith("layernorm")
            yield HFTensor(
                f"{prefix}{_IN_LAYER[module]}.{kind}", name, None, transposed, shape[::-1] if transposed else shape
            )
