"""A tiny model with its tokenizer, saved as a training run saves it."""

import copy
import dataclasses
from pathlib import Path

import tiny_run
import torch

from megatron.checkpoint import Box, ShardedTensor, save
from megatron.config import DataConfig, ModelConfig, MoEConfig, RunConfig
from megatron.config.run import to_dict
from megatron.data.tokenizer import build_tokenizer
from megatron.model.gpt import GPTModel
from megatron.moe.balancing import learned_buffers

SHAPE = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, seq_length=48, init_method_std=0.2)
EXPERTS = MoEConfig(num_experts=(4,), moe_eval_capacity_factor=1.0)
BALANCING = {  # methods that learn, as options of MoEConfig
    "global_aux_loss": {"moe_router_load_balancing_type": "global_aux_loss"},
    "quantile_balancing": {"moe_router_load_balancing_type": "quantile_balancing", "moe_router_center_input": True},
    "expert_bias": {"moe_router_load_balancing_type": "none", "moe_router_enable_expert_bias": True},
}


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """What was saved, and where."""

    model: GPTModel
    config: RunConfig
    folder: Path  # of checkpoints
    tokenizer_file: Path


def save_model(folder: Path, moe: MoEConfig = EXPERTS, shape: ModelConfig = SHAPE) -> SavedModel:
    """Save a model with random weights as ``folder/checkpoints``, its tokenizer beside it."""
    folder.mkdir(exist_ok=True)
    tokenizer_file = tiny_run.make_tokenizer(folder)
    data = DataConfig(tokenizer_type="HFTokenizer", tokenizer_model=str(tokenizer_file))
    config = RunConfig(model=shape, moe=moe, data=data)
    tokenizer = build_tokenizer(data)
    vocab_size = shape.padded_vocab_size(tokenizer.vocab_size)
    model = GPTModel(shape, moe, vocab_size, seed=5).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # none is as it would be initialised
            parameter.add_(0.1 * torch.randn_like(parameter))
        for buffer in learned_buffers(model).values():  # biases of the size of logits
            buffer.normal_()
        model.final_layernorm.weight.normal_()  # or else, tables being tied, each token would predict itself
    entries = [
        ShardedTensor("model." + name, tuple(p.shape), torch.float32, [Box((0,) * p.dim(), p.data)])
        for name, p in [*model.named_parameters(), *learned_buffers(model).items()]
    ]
    meta = {
        "clock": {"seq_length": shape.seq_length, "samples": 24, "steps": 3, "skipped": 0},
        "config": to_dict(config),
        "vocab_size": vocab_size,
        "tokenizer": {"vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint},
    }
    save(folder / "checkpoints", 3, entries, meta, None)
    return SavedModel(model, config, folder / "checkpoints", tokenizer_file)


@torch.no_grad()
def choices_of(model: GPTModel, tokens: torch.Tensor) -> torch.Tensor:
    """The experts of each token, [MoE layers, T, K]."""
    found: list[torch.Tensor] = []
    routers = [layer.mlp.router for layer in model.layers.values() if hasattr(layer.mlp, "router")]
    handles = [each.register_forward_hook(lambda *call: found.append(call[2].plan.expert_TK)) for each in routers]
    model(tokens)
    for handle in handles:
        handle.remove()
    return torch.stack(found)


def without_biases(model: GPTModel) -> GPTModel:
    """The same model with biases of 0."""
    model = copy.deepcopy(model)
    for buffer in learned_buffers(model).values():
        buffer.zero_()
    return model
