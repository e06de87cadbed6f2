"""Models of megatron.core: saved by its dist_checkpointing, and as Megatron-LM's trainer saves a model's state without
that; and the logits that megatron.core computes."""

import argparse
import contextlib
import signal
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from core_cases import CASES, LAYERS, POSITIONS, Case, E, H, N, V
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.moe import grouped_gemm_util, moe_utils
from megatron.core.transformer.transformer_config import TransformerConfig


def on_cpu() -> contextlib.ExitStack:
    """What megatron.core does only on a GPU, or only with an extension, that does not matter for what is saved."""
    stack = contextlib.ExitStack()
    for where, name, instead in (
        (torch.cuda, "current_device", lambda: "cpu"),
        (torch.cuda, "synchronize", lambda *_: None),
        (CudaRNGStatesTracker, "fork", lambda *_: contextlib.nullcontext()),
        (torch.Tensor, "cuda", lambda tensor, *_: tensor),
        (grouped_gemm_util, "assert_grouped_gemm_is_available", lambda: None),
        (moe_utils, "te_general_gemm", None),  # is not defined without Transformer Engine
    ):
        stack.enter_context(mock.patch.object(where, name, instead, create=True))
    return stack


def tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def build(case: Case, seed: int, grouped: bool) -> GPTModel:
    """This rank's part of a model; ``seed`` must be that of the other tensor-parallel ranks."""
    routing = dict(
        num_moe_experts=E, moe_router_topk=case.topk, moe_router_pre_softmax=case.topk == 1,
        moe_layer_freq=list(case.experts) if 0 in case.experts else 1, moe_token_dispatcher_type="allgather",
        moe_grouped_gemm=grouped,
    ) if case.experts else {}  # fmt: skip
    config = TransformerConfig(
        num_layers=LAYERS, hidden_size=H, num_attention_heads=N, tensor_model_parallel_size=case.tensor,
        pipeline_model_parallel_size=case.stages, expert_model_parallel_size=case.shares,
        pipeline_dtype=torch.float32, use_cpu_initialization=True, hidden_dropout=0, attention_dropout=0,
        activation_func=tanh_gelu, bias_activation_fusion=False, add_bias_linear=case.biases,
        masked_softmax_fusion=False, init_method_std=0.2, qk_layernorm=case.qk_layernorm, **routing,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = GPTModel(
        config, get_gpt_decoder_block_spec(config, use_transformer_engine=False), vocab_size=V,
        max_sequence_length=POSITIONS, position_embedding_type="learned_absolute",
        share_embeddings_and_output_weights=True, pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router.bias" in name:  # the router here has none
                parameter.fill_(0.25)
            elif parameter.dim() == 1:  # none is as it was initialised, and ranks agree in what is not cut
                cut = getattr(parameter, "tensor_model_parallel", False) or not getattr(parameter, "allreduce", True)
                index = torch.arange(parameter.numel()) + parameter.numel() * dist.get_rank() * cut
                parameter.add_(0.1 * torch.sin(index + len(name)))
    return model


def arguments(case: Case) -> argparse.Namespace:
    """Those of Megatron-LM's that say what the model is, and some of the objects that it keeps with them."""
    return argparse.Namespace(
        num_layers=LAYERS, hidden_size=H, ffn_hidden_size=4 * H, moe_ffn_hidden_size=4 * H, num_attention_heads=N,
        seq_length=POSITIONS, max_position_embeddings=POSITIONS, norm_epsilon=1e-5, normalization="LayerNorm",
        swiglu=False, position_embedding_type="learned_absolute", untie_embeddings_and_output_weights=False,
        add_bias_linear=case.biases, bias_gelu_fusion=case.biases, qk_layernorm=case.qk_layernorm,
        group_query_attention=False, num_query_groups=1,
        num_experts=E if case.experts else None, moe_router_topk=case.topk, moe_router_pre_softmax=case.topk == 1,
        moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.02, moe_z_loss_coeff=1e-3,
        moe_expert_capacity_factor=None, tensor_model_parallel_size=case.tensor,
        pipeline_model_parallel_size=case.stages, expert_model_parallel_size=case.shares,
        expert_tensor_parallel_size=case.tensor, params_dtype=torch.float32, attention_backend=AttnBackend.auto,
        model_type=ModelType.encoder_or_decoder, exit_signal=signal.SIGTERM, data_cache_path=Path("cache"),
    )  # fmt: skip


@torch.no_grad()
def logits(model: GPTModel, case: Case, tokens: torch.Tensor) -> torch.Tensor | None:
    """[B, S, V], on the last stage."""
    B, S = tokens.shape
    received = torch.empty(S, B, H)
    stage = dist.get_rank() if case.stages > 1 else 0
    if stage:
        dist.recv(received, stage - 1)
        model.set_input_tensor(received)
    mask = torch.ones(S, S, dtype=torch.bool).triu(1)[None, None]
    out = model(tokens, torch.arange(S).expand(B, -1), mask)
    if stage < case.stages - 1:
        dist.send(out.contiguous(), stage + 1)
        return None
    parts = [torch.empty_like(out) for _ in range(case.tensor)]
    if case.tensor > 1:
        dist.all_gather(parts, out.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
        out = torch.cat(parts, -1)
    return out


def save(folder: Path, name: str, case: Case, tokens: torch.Tensor) -> None:
    parallel_state.initialize_model_parallel(case.tensor, case.stages, expert_model_parallel_size=case.shares)
    model = build(case, seed=7 + dist.get_rank() * (case.tensor == 1), grouped=case.grouped)
    for parameter in model.parameters() if case.shares > 1 else ():  # alike on all ranks, but for the experts
        if getattr(parameter, "allreduce", True):
            dist.broadcast(parameter.data, 0)
    common = {"args": arguments(case), "checkpoint_version": 3.0, "iteration": 7}
    distributed = folder / name / "torch_dist" / "iter_0000007"
    distributed.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    dist_checkpointing.save({"model": model.sharded_state_dict(metadata=case.metadata or None), **common}, distributed)
    stage, rank = parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()
    share = parallel_state.get_expert_model_parallel_rank()
    ranks = f"mp_rank_{rank:02d}" + f"_{stage:03d}" * (case.stages > 1) + f"_{share:03d}" * (case.shares > 1)
    own = folder / name / "torch" / "iter_0000007" / ranks
    own.mkdir(parents=True)
    torch.save({"model": model.state_dict_for_save_checkpoint(), **common}, own / "model_optim_rng.pt")
    for kind in ("torch", "torch_dist"):
        (folder / name / kind / "latest_checkpointed_iteration.txt").write_text("7")
    if (
        case.grouped
    ):  # whose product needs an extension: megatron.core gives its checkpoint to the other kind of experts
        model = build(case, seed=0, grouped=False)
        state = dist_checkpointing.load({"model": model.sharded_state_dict()}, distributed)
        model.load_state_dict(state["model"])
    out = logits(model, case, tokens)
    if out is not None and rank == share == 0:
        torch.save(out, folder / name / "logits.pt")
    parallel_state.destroy_model_parallel()


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    with on_cpu():
        for name, case in CASES[dist.get_world_size()].items():
            save(folder, name, case, torch.load(folder / "tokens.pt"))
    dist.barrier()
