"""One rank of a job that saves a Megatron-DeepSpeed checkpoint: argv is the weights, the folder, and the version.

Two processes: tensor-parallel 2, and the same two share the experts.
Names and layouts are Megatron's, experts DeepSpeed's MoE, files its engine's.
"""

import argparse
import random
import sys

import deepspeed
import numpy
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import nn

LAYERS, H, N, F, V, POSITIONS, E = 2, 32, 4, 128, 128, 48, 4
TP = 2


class Mpu:
    """DeepSpeed asks it who shares a model."""

    def __init__(self) -> None:
        self.alone = [dist.new_group([rank]) for rank in range(TP)][dist.get_rank()]

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank()

    def get_model_parallel_world_size(self) -> int:
        return TP

    def get_model_parallel_group(self):
        return dist.group.WORLD

    def get_data_parallel_rank(self) -> int:
        return 0

    def get_data_parallel_world_size(self) -> int:
        return 1

    def get_data_parallel_group(self):
        return self.alone

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group


def mlp(inner: int) -> nn.Module:
    module = nn.Module()
    module.dense_h_to_4h, module.dense_4h_to_h = nn.Linear(H, inner), nn.Linear(inner, H)
    return module


def build() -> nn.Module:
    model = nn.Module()
    model.language_model = lm = nn.Module()
    lm.embedding, lm.encoder = nn.Module(), nn.Module()
    lm.embedding.word_embeddings = nn.Embedding(V // TP, H)
    lm.embedding.position_embeddings = nn.Embedding(POSITIONS, H)
    lm.encoder.layers = nn.ModuleList()
    lm.encoder.final_layernorm = nn.LayerNorm(H)
    for number in range(LAYERS):
        layer = nn.Module()
        layer.input_layernorm, layer.post_attention_layernorm = nn.LayerNorm(H), nn.LayerNorm(H)
        layer.self_attention = nn.Module()
        layer.self_attention.query_key_value = nn.Linear(H, 3 * H // TP)
        layer.self_attention.dense = nn.Linear(H // TP, H)
        layer.mlp = MoE(H, mlp(F), num_experts=E, ep_size=2, use_residual=True) if number == 1 else mlp(F // TP)
        if number == 1:
            layer.mlp.mlp = mlp(F // TP)
        lm.encoder.layers.append(layer)
    return model


def piece(tensor: torch.Tensor, dim: int, rank: int) -> torch.Tensor:
    return tensor.chunk(TP, dim)[rank]


@torch.no_grad()
def fill(model: nn.Module, ours: dict[str, torch.Tensor], tp: int, ep: int, version: float) -> None:
    lm = model.language_model
    lm.embedding.word_embeddings.weight.copy_(piece(ours["embedding.word_embeddings.weight"], 0, tp))
    lm.embedding.position_embeddings.weight.copy_(ours["embedding.position_embeddings.weight"])
    for kind in ("weight", "bias"):
        getattr(lm.encoder.final_layernorm, kind).copy_(ours[f"final_layernorm.{kind}"])
    for number, layer in enumerate(lm.encoder.layers):
        at = f"layers.{number}."
        for kind in ("weight", "bias"):
            for norm in ("input_layernorm", "post_attention_layernorm"):
                getattr(getattr(layer, norm), kind).copy_(ours[f"{at}{norm}.{kind}"])
            qkv = ours[f"{at}attention.qkv.{kind}"]
            rows = []  # row by row, as Megatron's attention reads them
            heads, D = range(tp * N // TP, (tp + 1) * N // TP), H // N
            if version == 0:
                rows = [part * H + n * D + d for part in range(3) for n in heads for d in range(D)]
            elif version == 1:
                rows = [part * H + n * D + d for n in heads for d in range(D) for part in range(3)]
            else:
                rows = [part * H + n * D + d for n in heads for part in range(3) for d in range(D)]
            getattr(layer.self_attention.query_key_value, kind).copy_(qkv[rows])
        layer.self_attention.dense.weight.copy_(piece(ours[f"{at}attention.dense.weight"], 1, tp))
        layer.self_attention.dense.bias.copy_(ours[f"{at}attention.dense.bias"])
        dense, name = (layer.mlp.mlp, f"{at}mlp.mlp") if number == 1 else (layer.mlp, f"{at}mlp")
        dense.dense_h_to_4h.weight.copy_(piece(ours[f"{name}.fc1.weight"], 0, tp))
        dense.dense_h_to_4h.bias.copy_(piece(ours[f"{name}.fc1.bias"], 0, tp))
        dense.dense_4h_to_h.weight.copy_(piece(ours[f"{name}.fc2.weight"], 1, tp))
        dense.dense_4h_to_h.bias.copy_(ours[f"{name}.fc2.bias"])
        if number == 1:
            layer.mlp.deepspeed_moe.gate.wg.weight.copy_(ours[f"{at}mlp.router.weight"])
            layer.mlp.coefficient.weight.copy_(ours[f"{at}mlp.coefficient.weight"])
            layer.mlp.coefficient.bias.copy_(ours[f"{at}mlp.coefficient.bias"])
            for local, expert in enumerate(layer.mlp.deepspeed_moe.experts.deepspeed_experts):
                e = ep * E // 2 + local
                expert.dense_h_to_4h.weight.copy_(ours[f"{at}mlp.experts.w1"][e].T)
                expert.dense_h_to_4h.bias.copy_(ours[f"{at}mlp.experts.b1"][e])
                expert.dense_4h_to_h.weight.copy_(ours[f"{at}mlp.experts.w2"][e].T)
                expert.dense_4h_to_h.bias.copy_(ours[f"{at}mlp.experts.b2"][e])


def main() -> None:
    weights, folder = sys.argv[1:3]
    deepspeed.init_distributed("gloo")
    mpu = Mpu()
    engine, *_ = deepspeed.initialize(
        model=build(), mpu=mpu, config={"train_micro_batch_size_per_gpu": 1, "train_batch_size": 1}
    )
    args = argparse.Namespace(
        num_layers=LAYERS, hidden_size=H, num_attention_heads=N, ffn_hidden_size=F, seq_length=POSITIONS,
        max_position_embeddings=POSITIONS, params_dtype=torch.float32, topk=1,
    )  # fmt: skip
    for version in (0, 1.0, 3.0):
        ours = torch.load(weights, weights_only=True)
        fill(engine.module, ours, dist.get_rank(), groups._get_expert_parallel_rank("ep_size_2"), version)
        state = {
            "args": args, "checkpoint_version": version, "iteration": 7,
            "random_rng_state": random.getstate(), "np_rng_state": numpy.random.get_state(),
            "torch_rng_state": torch.get_rng_state(),
        }  # fmt: skip
        engine.save_checkpoint(f"{folder}/v{version:g}", tag="global_step7", client_state=state)
    dist.barrier()


if __name__ == "__main__":
    main()
