"""A GPT of the shape, names and cuts of Megatron-DeepSpeed's, over torch's layers and DeepSpeed's own MoE layer.

What is Megatron's and cannot run without a GPU (its tensor-parallel layers, its nesting of a saved model) is written
here in its simplest form, for all processes as one tensor-parallel group. With two, the same two share the experts.
"""

import argparse
import re
from collections.abc import Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.moe.layer import MoE
from torch import nn

LAYERS, H, N, FFN, V, POSITIONS, E = 2, 32, 4, 128, 128, 48, 4
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


def summed(x: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(x)
    return x


class RowParallel(nn.Linear):
    """A product whose input units the processes share."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return summed(F.linear(x, self.weight)) + self.bias


class Mlp(nn.Module):
    def __init__(self, tp: int) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(H, FFN // tp)
        self.dense_4h_to_h = (RowParallel if tp > 1 else nn.Linear)(FFN // tp, H)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x), approximate="tanh"))


class Attention(nn.Module):
    def __init__(self, tp: int) -> None:
        super().__init__()
        self.query_key_value, self.dense = nn.Linear(H, 3 * H // tp), RowParallel(H // tp, H)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, S, H]
        q, k, v = self.query_key_value(x).unflatten(-1, (N // TP, 3, -1)).permute(3, 0, 2, 1, 4)
        return self.dense(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """A dense layer, or one with the experts that Megatron's arguments describe."""

    def __init__(self, moe: argparse.Namespace | None, tp: int = TP) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = nn.LayerNorm(H), nn.LayerNorm(H)
        self.self_attention = Attention(tp)
        self.mlp = Mlp(tp)
        if moe is not None:  # Megatron's residual feed-forward is the expert that it gives to MoE: cut as experts are
            cut = moe.enable_expert_tensor_parallelism
            self.mlp = MoE(
                H, Mlp(tp if cut else 1), num_experts=E, ep_size=1 if cut else tp, k=moe.topk, eval_capacity_factor=E,
                use_residual=moe.mlp_type == "residual", enable_expert_tensor_parallelism=cut,
                top2_2nd_expert_sampling=moe.moe_top2_2nd_expert_sampling,
            )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attention(self.input_layernorm(x))
        output = self.mlp(self.post_attention_layernorm(x))
        return x + (output[0] if isinstance(output, tuple) else output)


class Embedding(nn.Module):
    def __init__(self, tp: int = TP) -> None:
        super().__init__()
        self.word_embeddings, self.position_embeddings = nn.Embedding(V // tp, H), nn.Embedding(POSITIONS, H)

    @property
    def word_embeddings_weight(self) -> nn.Parameter:
        """What a pipeline ties."""
        return self.word_embeddings.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        local = tokens - dist.get_rank() * V // TP
        mine = (local >= 0) & (local < V // TP)
        words = self.word_embeddings(local.where(mine, torch.zeros_like(local))) * mine[..., None]
        return summed(words) + self.position_embeddings.weight[: tokens.shape[1]]


class Gpt(nn.Module):
    """Saved and loaded in Megatron's nesting: {language_model: {embedding: {table: {weight}}, encoder: {name}}}."""

    def __init__(self, moe: argparse.Namespace | None) -> None:
        super().__init__()
        self.language_model = lm = nn.Module()
        lm.embedding, lm.encoder = Embedding(), nn.Module()
        lm.encoder.layers = nn.ModuleList(Layer(moe if number % 2 else None) for number in range(LAYERS))
        lm.encoder.final_layernorm = nn.LayerNorm(H)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [B, S, V] of tokens [B, S]."""
        lm = self.language_model
        x = lm.embedding(tokens)
        for layer in lm.encoder.layers:
            x = layer(x)
        logits = lm.encoder.final_layernorm(x) @ lm.embedding.word_embeddings.weight.T
        parts = [torch.empty_like(logits) for _ in range(TP)]
        dist.all_gather(parts, logits.contiguous())
        return torch.cat(parts, -1)

    def state_dict(self, *args, **kwargs):
        flat = super().state_dict(*args, **kwargs)
        lm = self.language_model
        tables = {name: getattr(lm.embedding, name).state_dict() for name in ("word_embeddings", "position_embeddings")}
        before = "language_model.encoder."
        experts = {name: tensor for name, tensor in flat.items() if "deepspeed_experts" in name}
        encoder = {
            name.removeprefix(before): tensor
            for name, tensor in flat.items()
            if name.startswith(before) and name not in experts
        }
        return {"language_model": {"embedding": tables, "encoder": encoder}, **experts}

    def load_state_dict(self, state, strict=True):
        lm = state.pop("language_model")
        flat = {f"language_model.encoder.{name}": tensor for name, tensor in lm["encoder"].items()}
        for table, inner in lm["embedding"].items():
            flat |= {f"language_model.embedding.{table}.{name}": tensor for name, tensor in inner.items()}
        return super().load_state_dict(flat | state, strict=strict)


# ------------------------------------------------------------------------------------------------- our weights


@torch.no_grad()
def fill(
    parameters: Iterable[tuple[str, nn.Parameter]], ours: dict[str, torch.Tensor], version: float, tp: int, expert: int
) -> None:
    """Copy our weights into a rank's parameters, given by Megatron's names within ``language_model``.

    Args:
        parameters: of a rank.
        ours: whole, by our names.
        version: the checkpoint's, which tells the order of rows in Q, K and V.
        tp: the tensor-parallel rank.
        expert: the first expert of this rank.
    """
    renamed = {
        "encoder.": "", "self_attention.query_key_value": "attention.qkv", "self_attention": "attention",
        "deepspeed_moe.gate.wg": "router", "dense_h_to_4h": "fc1", "dense_4h_to_h": "fc2",
    }  # fmt: skip
    for name, parameter in parameters:
        for theirs, here in renamed.items():
            name = name.replace(theirs, here)
        if match := re.fullmatch(r"(.*)deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.fc(\d)\.(.).*", name):
            before, local, number, kind = match.groups()
            whole = ours[f"{before}experts.{kind}{number}"][expert + int(local)]
            whole = whole.T if kind == "w" else whole
        elif "attention.qkv" in name:
            whole = ours[name][_rows(version, tp, 3 * H // len(parameter))]
        else:
            whole = ours[name]
        parameter.copy_(_piece(whole, parameter, tp))


def _piece(tensor: torch.Tensor, like: torch.Tensor, rank: int) -> torch.Tensor:
    for dim, (size, wanted) in enumerate(zip(tensor.shape, like.shape, strict=True)):
        if size != wanted:
            return tensor.chunk(size // wanted, dim)[rank]
    return tensor


def _rows(version: float, rank: int, ranks: int) -> list[int]:
    """Which rows of our Q, K and V, all of Q first, a rank of Megatron's attention has, in its order."""
    heads, D = range(rank * N // ranks, (rank + 1) * N // ranks), H // N
    if version == 0:
        return [part * H + n * D + d for part in range(3) for n in heads for d in range(D)]
    if version == 1:
        return [part * H + n * D + d for n in heads for d in range(D) for part in range(3)]
    return [part * H + n * D + d for n in heads for part in range(3) for d in range(D)]
