"""One rank of a job of two processes, over DeepSpeed's engines and its MoE layer. argv: our weights, and a folder.

Saves our weights as Megatron-DeepSpeed does: a folder for each order of Q, K and V, and one with cut experts. Then
loads each folder in ``written/`` and saves the logits that it gives there.
"""

import argparse
import random
import sys
from pathlib import Path

import deepspeed
import deepspeed_model as ds
import numpy
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

from megatron.engine.deepspeed_internals import SHARED_MEMORY_OP

ENGINE = {"train_micro_batch_size_per_gpu": 1, "train_batch_size": 1}
VERSIONS = {"v0": 0, "v1": 1.0, "v3": 3.0, "cut": 3.0}


gather = deepspeed.comm.all_gather_into_tensor
# DeepSpeed's MoE layer gathers [E, C, H] into a flat buffer, which gloo refuses
deepspeed.comm.all_gather_into_tensor = lambda into, tensor, **more: gather(into, tensor.flatten(), **more)


def engine_of(args: argparse.Namespace | None, mpu: ds.Mpu):
    return deepspeed.initialize(model=ds.Gpt(args), mpu=mpu, config=ENGINE)[0]


def arguments() -> argparse.Namespace:
    """Those of Megatron's that say what the model is."""
    return argparse.Namespace(
        num_layers=ds.LAYERS, hidden_size=ds.H, num_attention_heads=ds.N, ffn_hidden_size=ds.FFN,
        seq_length=ds.POSITIONS, max_position_embeddings=ds.POSITIONS, params_dtype=torch.float32, topk=1,
        mlp_type="residual", enable_expert_tensor_parallelism=False,
        moe_top2_2nd_expert_sampling=False,
    )  # fmt: skip


def save(folder: Path, ours: dict[str, torch.Tensor], mpu: ds.Mpu) -> None:
    for name, version in VERSIONS.items():
        args = arguments()
        args.enable_expert_tensor_parallelism = name == "cut"
        engine = engine_of(args, mpu)
        expert = 0 if name == "cut" else dist.get_rank() * ds.E // ds.TP
        ds.fill(engine.module.language_model.named_parameters(), ours, version, dist.get_rank(), expert)
        state = {
            "args": args, "checkpoint_version": version, "iteration": 7,
            "random_rng_state": random.getstate(), "np_rng_state": numpy.random.get_state(),
            "torch_rng_state": torch.get_rng_state(),
        }  # fmt: skip
        engine.save_checkpoint(str(folder / name), tag="global_step7", client_state=state)


@torch.no_grad()
def load(folder: Path, mpu: ds.Mpu) -> None:
    first = next(folder.glob("*/mp_rank_00_model_states.pt"))
    args = torch.load(first, weights_only=False)["args"]
    engine = engine_of(args if max(args.num_experts) > 1 else None, mpu)
    where, _ = engine.load_checkpoint(str(folder), load_module_strict=True, load_module_only=True)
    assert where is not None
    logits = engine.module.eval()(torch.load(folder.parent / "tokens.pt"))
    if dist.get_rank() == 0:
        torch.save(logits, folder.parent / f"{folder.name}.logits.pt")


def save_pipeline(folder: Path, ours: dict[str, torch.Tensor], stages: int, experts: bool) -> None:
    """Modules in the order of Megatron-DeepSpeed's GPTModelPipe, on ``stages`` stages and the other processes as
    tensor-parallel ranks."""
    tp, args = ds.TP // stages, arguments()
    moe = args if experts else None
    embed = [TiedLayerSpec("embed", ds.Embedding, tp, tied_weight_attr="word_embeddings_weight") for _ in range(2)]
    embed[1].forward_fn = lambda embedding, x: x @ embedding.word_embeddings.weight.T
    layers = [LayerSpec(ds.Layer, moe if number % 2 else None, tp) for number in range(ds.LAYERS)]
    cast = [lambda x: x] * (1 + experts)  # with experts, one more function after the layers
    specs = [cast[0], embed[0], *layers, *cast[1:], LayerSpec(torch.nn.LayerNorm, ds.H), embed[1], cast[0]]
    topology = PipeModelDataParallelTopology(num_pp=stages, num_mp=tp, num_dp=1)
    module = PipelineModule(specs, topology=topology, loss_fn=torch.nn.MSELoss(), partition_method="type:^layer$")
    engine = deepspeed.initialize(model=module, config=ENGINE)[0]
    parameters = []
    for name, parameter in engine.module.named_parameters():
        number, _, inside = name.partition(".")
        if number == "tied_modules":
            parameters.append((inside.replace("embed.", "embedding."), parameter))
        else:
            last = inside in ("weight", "bias")
            parameters.append(
                (f"final_layernorm.{inside}" if last else f"layers.{int(number) - 2}.{inside}", parameter)
            )
    ds.fill(parameters, ours, 3.0, dist.get_rank() % tp, 0)
    engine.save_checkpoint(str(folder), tag="global_step7", client_state={"args": args, "checkpoint_version": 3.0})


def main() -> None:
    weights, folder = map(Path, sys.argv[1:3])
    deepspeed.ops.__compatible_ops__[SHARED_MEMORY_OP] = False  # it would compile this, and not use it
    deepspeed.init_distributed("gloo")
    mpu = ds.Mpu()
    save(folder, torch.load(weights), mpu)
    dense = torch.load(folder / "dense.pt")
    save_pipeline(folder / "tp2", dense, 1, experts=False)
    save_pipeline(folder / "pp2", dense, 2, experts=False)
    save_pipeline(folder / "pp2_experts", torch.load(weights), 2, experts=True)
    for written in sorted(folder.glob("written/*/")):
        load(written, mpu)
    dist.barrier()


if __name__ == "__main__":
    main()
