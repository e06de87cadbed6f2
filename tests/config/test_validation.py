"""Each rule: what it accepts, and a message with the numbers and a fix."""

import dataclasses

import pytest
from config.problems import GOOD, MOE, problems

from megatron.config import ModelConfig, RunConfig
from megatron.config.flags import parse_args
from megatron.config.run import build
from megatron.config.validation import ConfigError, validate, validate_numbers

GRAPHS = {"cuda_graphs": True, "device": "cuda"}


@pytest.mark.parametrize(
    ("values", "world_size"),
    [
        ({}, 1),
        ({}, 8),
        (MOE, 4),
        (MOE | {"num_experts": (8, 1)}, 2),
        (MOE | {"num_experts": (8, 4), "topk": 4}, 4),
        (MOE | {"expert_interval": 4}, 2),
        (MOE | {"expert_interval": 1, "num_experts": (2, 4, 8, 16)}, 2),
        ({"num_experts": (4, 8), "moe_expert_parallel_size": (2, 4)}, 4),
        ({"num_experts": (8, 1), "moe_expert_parallel_size": (4, 64)}, 4),  # the second MoE layer is dense
        ({"num_experts": (4, 8), "moe_expert_parallel_size": (2, 4), "tensor_model_parallel_size": 2}, 8),
        ({"moe_expert_parallel_size": (64, 2, 3)}, 1),
        ({"moe_expert_parallel_size": (64,)}, 1),  # without experts there is nothing to divide
        ({"rampup_batch_size": (8, 8, 1000)}, 4),
        ({"rampup_batch_size": (16, 8, 1000)}, 4),
        ({"max_position_embeddings": 64}, 4),
        ({"pipeline_model_parallel_size": 4, "pipeline_layer_split": "1,1,1,1"}, 4),
        (MOE | {"pipeline_model_parallel_size": 2, "pipeline_layer_split": "3, 1"}, 4),
        ({"pipeline_model_parallel_size": 4, "global_batch_size": 18}, 4),  # one data-parallel process
        ({"train_tokens": 16 * 32}, 4),
        ({"split": "1,0,0", "eval_interval": 0}, 4),
        ({"split": "0.9, 0.05, 0.05"}, 4),
        ({"split": "98,2"}, 4),
        ({"split": "1", "eval_interval": 0}, 4),
        ({"lr": 1, "min_lr": 1}, 4),
        ({"save_interval": 5}, 4),
        ({"async_save": True, "keep_last": 2, "save": "checkpoints"}, 4),
        ({"spike_sigmas": 6.0, "keep_last": 2, "save": "checkpoints", "skip_samples": ("0-16", "8-24")}, 4),
        ({"min_loss_scale": 2.0**20}, 4),  # only of fp16
        (MOE | {"optimizer_name": "adamw8bit", "pipeline_model_parallel_size": 2}, 4),
        (MOE | {"optimizer_cpu_offload": True, "pipeline_model_parallel_size": 2}, 4),
        ({"tensor_model_parallel_size": 2, "sequence_parallel": True}, 4),
        ({"tensor_model_parallel_size": 4, "global_batch_size": 2}, 4),  # one replica
        (MOE | {"tensor_model_parallel_size": 2, "enable_expert_tensor_parallelism": True}, 4),
        (MOE | {"moe_hierarchical_all_to_all": True, "moe_overlap_chunks": 4}, 4),
        (MOE | {"moe_hierarchical_all_to_all": True, "moe_token_dropping": False}, 4),
        ({"enable_expert_tensor_parallelism": True}, 4),  # without experts there is nothing to share
        (GRAPHS, 4),
        (GRAPHS | {"moe_expert_parallel_size": (2,), "moe_token_dropping": False}, 4),  # a dense model
        (GRAPHS | MOE | {"checkpoint_activations": True}, 4),
        (GRAPHS | {"num_experts": (8,), "topk": 2, "moe_noise_policy": "RSample"}, 4),
        (GRAPHS | {"num_experts": (8,), "moe_rts": False, "moe_noise_policy": "Jitter"}, 1),
    ],
)
def test_valid(values, world_size):
    assert problems(values, world_size) == ()


@pytest.mark.parametrize(
    ("values", "world_size", "message"),
    [
        (
            {"pipeline_model_parallel_size": 8}, 8,
            "--pipeline-model-parallel-size 8 must not exceed --num-layers 4: every stage needs a layer; use 4 or"
            " fewer",
        ),
        (
            {"pipeline_model_parallel_size": 4}, 6,
            "--tensor-model-parallel-size 1 x --pipeline-model-parallel-size 4 = 4 must divide the number of processes,"
            " 6 (6 = 1 x 4 + 2); start 4 or 8 processes, or use --pipeline-model-parallel-size 3",
        ),
        (
            {"pipeline_model_parallel_size": 2, "pipeline_layer_split": "2,1,1"}, 2,
            "--pipeline-layer-split 2,1,1 has 3 numbers, and --pipeline-model-parallel-size is 2; give one number for"
            " each stage, such as 2,2, or leave it out",
        ),
        (
            {"pipeline_model_parallel_size": 2, "pipeline_layer_split": "3,2"}, 2,
            "--pipeline-layer-split 3,2: 3 + 2 = 5 must be --num-layers 4; use 2,2, or leave it out",
        ),
        (
            {"pipeline_model_parallel_size": 2, "pipeline_layer_split": "4,0"}, 2,
            "--pipeline-layer-split 4,0 must be positive whole numbers with commas between them; use 2,2, or leave it"
            " out",
        ),
        (
            MOE | {"pipeline_model_parallel_size": 2, "moe_expert_parallel_size": (4,)}, 4,
            "--moe-expert-parallel-size 4 must not exceed the number of data-parallel replicas, 2; use 2, or start 8"
            " processes",
        ),
        (
            GRAPHS | {"device": "cpu"}, 4,
            "--cuda-graphs requires a GPU, and --device is cpu; drop one of the two",
        ),
        (
            GRAPHS | {"precision": "fp16"}, 4,
            "--cuda-graphs requires --bf16, and the precision is fp16; drop it, or use --bf16",
        ),
        (
            GRAPHS | {"tensor_model_parallel_size": 2}, 4,
            "--cuda-graphs supports neither tensor nor pipeline parallelism, and --tensor-model-parallel-size is 2;"
            " use --tensor-model-parallel-size 1, or drop --cuda-graphs",
        ),
        (
            GRAPHS | {"pipeline_model_parallel_size": 2}, 4,
            "--cuda-graphs supports neither tensor nor pipeline parallelism, and --pipeline-model-parallel-size is 2;"
            " use --pipeline-model-parallel-size 1, or drop --cuda-graphs",
        ),
        (
            GRAPHS | {"num_experts": (8,), "moe_token_dropping": False}, 4,
            "--cuda-graphs requires experts of fixed capacity, and --disable-moe-token-dropping gives them as many"
            " rows as there are tokens; drop one of the two",
        ),
        (
            GRAPHS | {"num_experts": (8,), "moe_noise_policy": "Jitter"}, 4,
            "--cuda-graphs: with --moe-noise-policy Jitter the random choice of the tokens that top-1 experts keep"
            " waits for the GPU; use --no-moe-rts, or drop the noise",
        ),
        (
            {"num_attention_heads": 5}, 4,
            "--num-attention-heads 5 must divide --hidden-size 64 (64 = 12 x 5 + 4); use 4 or 8 heads",
        ),
        (
            {"max_position_embeddings": 16}, 4,
            "--seq-length 32 must not exceed --max-position-embeddings 16; use --seq-length 16"
            " or --max-position-embeddings 32",
        ),
        (
            MOE | {"expert_interval": 5}, 4,
            "--expert-interval 5 must be from 1 to --num-layers 4, or no layer has experts; use --expert-interval 2",
        ),
        (
            MOE | {"num_experts": (8, 8, 8)}, 4,
            "--num-experts lists 3 numbers; 4 layers with --expert-interval 2 have 4 // 2 = 2 MoE layers; give one"
            " number for all of them or 2",
        ),
        (
            MOE | {"num_experts": (8, 4), "topk": 5}, 4,
            "--topk 5 must not exceed the 4 experts of a layer; use --topk 4",
        ),
        (
            MOE | {"moe_expert_parallel_size": (8,)}, 4,
            "--moe-expert-parallel-size 8 must not exceed the number of processes, 4; use 4, or start 8 processes",
        ),
        (
            MOE | {"num_experts": (6,), "moe_expert_parallel_size": (4,)}, 8,
            "--moe-expert-parallel-size 4 must divide the 6 experts of a layer (6 = 1 x 4 + 2); use 2",
        ),
        (
            MOE | {"num_experts": (12,), "moe_expert_parallel_size": (3,)}, 4,
            "--moe-expert-parallel-size 3 must divide the number of processes, 4 (4 = 1 x 3 + 1); use 2 or 4",
        ),
        (
            MOE | {"moe_expert_parallel_size": (2, 2, 4)}, 4,
            "--moe-expert-parallel-size lists 3 numbers; 4 layers with --expert-interval 2 have 4 // 2 = 2 MoE layers;"
            " give one number for all of them or 2",
        ),
        (
            {"num_experts": (4, 12), "moe_expert_parallel_size": (2, 8)}, 8,
            "--moe-expert-parallel-size 2 8: 8 must divide the 12 experts of a layer (12 = 1 x 8 + 4); use 4",
        ),
        (
            {"num_experts": (4, 8), "moe_expert_parallel_size": (2, 8)}, 4,
            "--moe-expert-parallel-size 2 8: 8 must not exceed the number of processes, 4; use 4, or start 8 processes",
        ),
        (
            {"tensor_model_parallel_size": 4}, 6,
            "--tensor-model-parallel-size 4 x --pipeline-model-parallel-size 1 = 4 must divide the number of processes,"
            " 6 (6 = 1 x 4 + 2); start 4 or 8 processes, or use --tensor-model-parallel-size 2",
        ),
        (
            {"tensor_model_parallel_size": 8, "num_attention_heads": 4}, 8,
            "--tensor-model-parallel-size 8 must divide --num-attention-heads 4 (4 = 0 x 8 + 4); use 4",
        ),
        (
            {"tensor_model_parallel_size": 4, "ffn_hidden_size": 130}, 4,
            "--tensor-model-parallel-size 4 must divide --ffn-hidden-size 130 (130 = 32 x 4 + 2); use 2 or 5",
        ),
        (
            {"sequence_parallel": True}, 4,
            "--sequence-parallel requires tensor-parallel processes to split the sequence over; use"
            " --tensor-model-parallel-size 2 or more, or drop it",
        ),
        (
            {"sequence_parallel": True, "tensor_model_parallel_size": 4, "seq_length": 30}, 4,
            "--sequence-parallel: --tensor-model-parallel-size 4 must divide --seq-length 30 (30 = 7 x 4 + 2); use"
            " --seq-length 28 or 32",
        ),
        (
            MOE | {"enable_expert_tensor_parallelism": True}, 4,
            "--enable-expert-tensor-parallelism requires tensor-parallel processes to share experts over; use"
            " --tensor-model-parallel-size 2 or more, or drop it",
        ),
        (
            MOE | {"moe_expert_parallel_size": (1,), "moe_hierarchical_all_to_all": True}, 4,
            "--moe-hierarchical-all-to-all requires processes that exchange tokens; use --moe-expert-parallel-size 2"
            " or more, or drop it",
        ),
        (
            MOE | {"moe_expert_parallel_size": (1,), "moe_overlap_chunks": 2}, 4,
            "--moe-overlap-chunks 2 requires processes that exchange tokens; use --moe-expert-parallel-size 2 or more,"
            " or drop it",
        ),
        (
            MOE | {"moe_overlap_chunks": 2, "moe_token_dropping": False}, 4,
            "--moe-overlap-chunks 2 requires buffers of fixed capacity to cut, and --disable-moe-token-dropping has"
            " none; use --moe-overlap-chunks 1, or let tokens be dropped",
        ),
        (
            MOE | {"tensor_model_parallel_size": 4}, 4,
            "--moe-expert-parallel-size 2 must not exceed the number of data-parallel replicas, 1; use 1, or start 8"
            " processes",
        ),
        (
            {"device": "cpu", "distributed_backend": "nccl"}, 4,
            "--distributed-backend nccl requires GPUs, and --device is cpu; use --distributed-backend gloo",
        ),
        (
            {"reset_attention_mask": True}, 4,
            "--reset-attention-mask requires --attention-dropout 0 on GPUs in bf16, where torch's variable-length"
            " attention has no dropout; got 0.1. Use --attention-dropout 0, or drop --reset-attention-mask",
        ),
        (
            GRAPHS | {"reset_attention_mask": True, "attention_dropout": 0.0}, 4,
            "--cuda-graphs does not go with --reset-attention-mask: how many documents a micro-batch has follows from"
            " the data; drop one of the two",
        ),
        (
            {"async_save": True}, 4,
            "--async-save requires a folder to save in, and --save is not given; add --save DIR or drop --async-save",
        ),
        (
            {"keep_last": 3}, 4,
            "--keep-last requires a folder to save in, and --save is not given; add --save DIR or drop --keep-last",
        ),
        (
            {"spike_sigmas": 6.0}, 4,
            "--spike-sigmas requires checkpoints to go back to; add --save DIR, with --save-interval above 0",
        ),
        (
            {"spike_sigmas": 6.0, "save": "checkpoints", "keep_last": 1}, 4,
            "--spike-sigmas requires a checkpoint from before the spike, and --keep-last 1 keeps none; use 2 or more",
        ),
        (
            {"skip_samples": ("0-16", "24-8")}, 4,
            "--skip-samples: got '24-8'; expected FIRST-END with FIRST below END, such as 96-160 for 96 to 159",
        ),
        ({"watchdog_factor": 1.0}, 4, "--watchdog-factor 1.0 must be above 1, or be left out"),
        ({}, 0, "got 0 processes; a run needs at least 1"),
        (
            {"hidden_dropout": 1.0}, 4,
            "--hidden-dropout 1.0 must be at least 0 and below 1, such as the default 0.1",
        ),
        (
            {"moe_eval_capacity_factor": 0.0}, 4,
            "--moe-eval-capacity-factor 0.0 must be above 0, or be left out",
        ),
        ({"num_experts": (8, 0)}, 4, "--num-experts 8 0 must be at least 1, such as the default 1"),
        ({"lr": "fast"}, 4, "--lr: got 'fast'; expected a number"),
        ({"num_layers": "4"}, 4, "--num-layers: got '4'; expected int"),
        ({"num_experts": [8]}, 4, "--num-experts: got [8]; expected a tuple"),
        ({"lr": float("nan")}, 4, "--lr: got nan; expected a finite number of a sensible size"),
    ],
)  # fmt: skip
def test_message_names_the_numbers_the_rule_and_the_fix(values, world_size, message):
    assert problems(values, world_size) == (message,)


@pytest.mark.parametrize(
    "values",
    [
        {"reset_attention_mask": True, "attention_dropout": 0.0, "hidden_dropout": 0.1},
        {"reset_attention_mask": True, "precision": "fp32"},
        {"reset_attention_mask": True, "device": "cpu"},
        {"reset_position_ids": True, "eod_mask_loss": True},
        GRAPHS | {"reset_position_ids": True, "eod_mask_loss": True},
    ],
)
def test_documents_kept_apart_where_attention_can(values):
    assert problems(values) == ()


@pytest.mark.parametrize("split", ["", "98;2;0", "0,0,0", "-1,1,1", "inf,1,1", "a,b,c", "1,2,3,4", "98,,2"])
def test_wrong_splits(split):
    (problem,) = problems({"split": split})
    assert problem.startswith(f"--split {split!r} must be up to three numbers")


def test_all_problems_are_reported_in_one_error():
    config = build(GOOD | MOE | {"num_attention_heads": 5, "topk": 9, "lr": -1.0})
    with pytest.raises(ConfigError) as caught:
        validate(config, 3)
    text = str(caught.value)
    for part in ("--num-attention-heads 5", "--topk 9", "--lr -1.0", "processes, 3", "--data-path", "--vocab-file"):
        assert part in text
    assert text.startswith(f"{len(caught.value.problems)} problems in the configuration:\n  - ")
    assert text.count("\n") == len(caught.value.problems)


def test_a_preset_on_fewer_processes_says_what_to_do():
    config = parse_args(["--model", "350M+MoE-128"])
    with pytest.raises(ConfigError, match="64 must not exceed the number of processes, 8; use 8,"):
        validate_numbers(config, 8)


def test_numbers_are_checked_without_files():
    config = RunConfig(model=ModelConfig(**{name: GOOD[name] for name in ("num_layers", "hidden_size", "seq_length")}))
    config.model = dataclasses.replace(config.model, num_attention_heads=4)
    config.training = dataclasses.replace(config.training, train_tokens=10**6)
    validate_numbers(config, 1)
    with pytest.raises(ConfigError, match="--data-path is missing"):
        validate(config, 1)
