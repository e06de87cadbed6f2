"""What a layer is planned to keep for its backward pass is what autograd keeps of the real one."""

import dataclasses

import pytest
import torch

from megatron.config import ModelConfig, MoEConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron.model.layer import TransformerLayer
from megatron.moe import kernels
from megatron.parallel.groups import ExpertGroup
from megatron.planning.activations import kept_by_layer, rows_of_experts

MODEL = ModelConfig(num_layers=1, hidden_size=256, num_attention_heads=4, seq_length=128, hidden_dropout=0.0)
EXPERTS = {"num_experts": (4,), "expert_interval": 1}


def saved_by_autograd(layer: torch.nn.Module, x: torch.Tensor) -> int:
    """Bytes of all memory that the graph of ``layer(x)`` holds, ``x`` included and parameters left out."""
    known = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    found: dict[int, torch.UntypedStorage] = {x.untyped_storage().data_ptr(): x.untyped_storage()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage  # held, so that its address is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    return sum(storage.nbytes() for storage in found.values())


KINDS = [
    MoEConfig(),
    MoEConfig(**EXPERTS),
    MoEConfig(**EXPERTS, topk=2),
    MoEConfig(**EXPERTS, mlp_type="residual"),
    MoEConfig(**EXPERTS, moe_token_dropping=False),
    MoEConfig(**EXPERTS, topk=2, moe_token_dropping=False),
    MoEConfig(**EXPERTS, topk=2, mlp_type="residual"),
    MoEConfig(**EXPERTS, moe_noise_policy="RSample"),
    MoEConfig(**EXPERTS, moe_train_capacity_factor=1.5),
    MoEConfig(**EXPERTS, topk=2, moe_train_capacity_factor=1.5),
]


def name(moe: MoEConfig) -> str:
    mode = f"capacity {moe.moe_train_capacity_factor}" if moe.moe_token_dropping else "dropless"
    return f"{moe.num_experts[0]} experts, top-{moe.topk}, {moe.mlp_type}, {mode}, {moe.moe_noise_policy}"


@pytest.mark.parametrize(
    ("precision", "in_kernels"),
    [
        ("fp32", False),
        ("fp16", True),
        *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in [("fp16", False), ("fp32", True)]),
    ],
    ids=["fp32-torch", "fp16-kernels", "fp16-torch", "fp32-kernels"],
)
@pytest.mark.parametrize("moe", KINDS, ids=name)
def test_it_is_what_autograd_saves_of_a_layer(moe, precision, in_kernels, monkeypatch):
    """On a CPU, where the kernels run in Triton's interpreter (in fp16, which is as wide as bf16)."""
    if in_kernels:
        pytest.importorskip("triton")
    monkeypatch.setattr(kernels, "_usable_on", lambda device: in_kernels)
    planned, saved = planned_and_saved(MODEL, moe, precision, in_kernels)
    assert saved == pytest.approx(planned, rel=0.01)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_norms_of_queries_and_keys_keep_both_and_statistics_of_each_head(precision):
    model = dataclasses.replace(MODEL, qk_layernorm=True)
    planned, saved = planned_and_saved(model, MoEConfig(), precision, in_kernels=False)
    assert saved == pytest.approx(planned, rel=0.001 if precision == "fp32" else 0.01)  # statistics of a CPU in fp16
    without, _ = planned_and_saved(MODEL, MoEConfig(), precision, in_kernels=False)
    tokens, size = 2 * model.seq_length, 4 if precision == "fp32" else 2
    assert planned - without == tokens * (2 * model.hidden_size * size + 4 * model.num_attention_heads * 4)


def planned_and_saved(model: ModelConfig, moe: MoEConfig, precision: str, in_kernels: bool) -> tuple[float, int]:
    """Bytes that a layer keeps, by the plan and by autograd."""
    run = RunConfig(model=model, moe=moe, training=TrainingConfig(micro_batch_size=2, global_batch_size=2))
    run.optimizer.precision = precision
    dtype = torch.float16 if precision == "fp16" else torch.float32
    layer = TransformerLayer(model, moe, 0, ExpertGroup(1, 0, None), seed=0).to(dtype)
    layer.attention.dropout = 0.0
    x = torch.randn(2, model.seq_length, model.hidden_size, dtype=dtype, requires_grad=True)
    return kept_by_layer(run, 0, kernels=in_kernels), saved_by_autograd(layer, x)


def test_the_kernels_keep_what_a_dense_layer_keeps_and_the_tokens_in_their_slots():
    run = RunConfig(model=MODEL, training=TrainingConfig(micro_batch_size=2, global_batch_size=2))
    dense = kept_by_layer(run, 0)
    run.moe = MoEConfig(**EXPERTS)
    tokens = 2 * MODEL.seq_length
    assert kept_by_layer(run, 0) == dense + tokens * MODEL.hidden_size * 2


def test_tensor_parallelism_cuts_what_lies_between_its_collectives_and_sequence_parallelism_the_rest():
    run = RunConfig(model=MODEL, training=TrainingConfig(micro_batch_size=2, global_batch_size=2))
    stream, statistics = 2 * MODEL.seq_length * MODEL.hidden_size * 2, 4 * 4 * 2 * MODEL.seq_length
    alone = kept_by_layer(run, 0)
    run.parallel = ParallelConfig(tensor_model_parallel_size=4)
    cut = kept_by_layer(run, 0)
    assert cut - 4 * stream - statistics == (alone - 4 * stream - statistics) / 4
    run.parallel = ParallelConfig(tensor_model_parallel_size=4, sequence_parallel=True)
    assert cut - kept_by_layer(run, 0) == 3 * stream


def test_rows_follow_capacity_choices_and_sharing():
    run = RunConfig(model=MODEL, moe=MoEConfig(**EXPERTS, topk=2), training=TrainingConfig(micro_batch_size=2))
    assert rows_of_experts(run, 0) == (2 * 256, 2 * 256)
    run.moe.moe_train_capacity_factor = 1.5
    assert rows_of_experts(run, 0) == (3 * 256, 2 * 256)
    run.parallel = ParallelConfig(tensor_model_parallel_size=4)
    assert rows_of_experts(run, 0) == (3 * 256 / 4, 2 * 256)
    run.parallel.enable_expert_tensor_parallelism = True
    assert rows_of_experts(run, 0) == (3 * 256, 2 * 256)
    run.moe.moe_token_dropping = False
    assert rows_of_experts(run, 0) == (2 * 256, 2 * 256)
