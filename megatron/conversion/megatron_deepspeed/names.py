"""Names of our parameters and of Megatron's, and how tensor-parallel ranks share them: one table for both directions.

Shapes: E experts, H hidden, N heads, D head size, F FFN hidden.
"""

import dataclasses
from collections.abc import Iterator

from megatron.config import ModelConfig, MoEConfig
from megatron.conversion.contents import parameter_shapes

EXPERTS = ".mlp.deepspeed_moe.experts.deepspeed_experts."
TABLE = "embedding.word_embeddings.weight"
_MODULES = {  # of a layer: ours -> theirs, and the dimension that tensor-parallel ranks share, of weight and of bias
    "input_layernorm": ("input_layernorm", None, None),
    "post_attention_layernorm": ("post_attention_layernorm", None, None),
    "attention.qkv": ("self_attention.query_key_value", 0, 0),
    "attention.q_layernorm": ("self_attention.q_layernorm", None, None),  # of Megatron-LM alone
    "attention.k_layernorm": ("self_attention.k_layernorm", None, None),
    "attention.dense": ("self_attention.dense", 1, None),
    "mlp.fc1": ("mlp.dense_h_to_4h", 0, 0),
    "mlp.fc2": ("mlp.dense_4h_to_h", 1, None),
    "mlp.mlp.fc1": ("mlp.mlp.dense_h_to_4h", 0, 0),
    "mlp.mlp.fc2": ("mlp.mlp.dense_4h_to_h", 1, None),
    "mlp.router": ("mlp.deepspeed_moe.gate.wg", None, None),
    "mlp.coefficient": ("mlp.coefficient", None, None),
}
_OUTSIDE = {
    TABLE: (TABLE, 0),
    "embedding.position_embeddings.weight": ("embedding.position_embeddings.weight", None),
    "final_layernorm.weight": ("encoder.final_layernorm.weight", None),
    "final_layernorm.bias": ("encoder.final_layernorm.bias", None),
}
_OF_EXPERT = {
    "w1": ("dense_h_to_4h.weight", 0),
    "b1": ("dense_h_to_4h.bias", 0),
    "w2": ("dense_4h_to_h.weight", 1),
    "b2": ("dense_4h_to_h.bias", None),
}


@dataclasses.dataclass(frozen=True)
class MegatronTensor:
    """One tensor of Megatron's, unsharded, and our parameter that it holds, or holds a row of."""

    name: str  # within language_model
    ours: str
    row: int | None  # the expert, in our stacked tensors
    dim: int | None  # which tensor-parallel ranks share; None: all have the whole of it
    shape: tuple[int, ...]

    @property
    def transposed(self) -> bool:
        """Whether ours is input-first and theirs output-first: the experts' matrices."""
        return self.row is not None and len(self.shape) == 2

    @property
    def is_qkv(self) -> bool:
        """Whether it is the projection to Q, K and V, whose rows are in another order."""
        return ".query_key_value." in self.name

    @property
    def in_moe(self) -> bool:
        """Whether it is a part of an MoE layer that tensor-parallel ranks share only with Megatron's
        --enable-expert-tensor-parallelism: an expert, or the dense feed-forward of the residual form."""
        return EXPERTS in self.name or ".mlp.mlp." in self.name


def megatron_tensors(model: ModelConfig, moe: MoEConfig, vocab_size: int) -> Iterator[MegatronTensor]:
    """Every parameter of a model, in the model's order: each of ours, or each row of a stacked one, exactly once."""
    for ours, shape in parameter_shapes(model, moe, vocab_size).items():
        if ours in _OUTSIDE:
            name, dim = _OUTSIDE[ours]
            yield MegatronTensor(name, ours, None, dim, shape)
            continue
        _, layer, inside = ours.split(".", 2)
        module, kind = inside.rsplit(".", 1)
        before = f"encoder.layers.{layer}"
        if module == "mlp.experts":
            name, dim = _OF_EXPERT[kind]
            for expert in range(shape[0]):
                yield MegatronTensor(f"{before}{EXPERTS}{expert}.{name}", ours, expert, dim, shape[:0:-1])
        else:
            name, *dims = _MODULES[module]
            yield MegatronTensor(f"{before}.{name}.{kind}", ours, None, dims[kind == "bias"], shape)
