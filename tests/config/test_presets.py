"""The presets against the published table and the rules of a run."""

import pytest

from megatron.config.presets import PRESETS
from megatron.config.run import build
from megatron.config.validation import validate_numbers

# layers, hidden, heads | global batch, micro batch | lr, min lr, decay in billions | experts | init std | tensor
# parallelism; all on 64 GPUs
PUBLISHED = {
    "125M": (12, 768, 12, 256, 4, 6e-4, 6e-5, 260, 1, 0.02, 1),
    "125M+MoE-64": (12, 768, 12, 256, 4, 4.5e-4, 4.5e-6, 300, 64, 0.014, 1),
    "350M": (24, 1024, 16, 256, 4, 3e-4, 3e-5, 260, 1, 0.014, 1),
    "350M+MoE-128": (24, 1024, 16, 256, 4, 2e-4, 2e-6, 300, 128, 0.014, 1),
    "1.3B": (24, 2048, 16, 512, 2, 2e-4, 2e-5, 260, 1, 0.014, 4),
    "1.3B+MoE-128": (24, 2048, 16, 512, 8, 1.2e-4, 1e-6, 300, 128, 0.014, 1),
    "6.7B": (32, 4096, 32, 1024, 4, 1.2e-4, 1.2e-5, 260, 1, 0.01, 8),
}


UNPUBLISHED = "6.7B+MoE-128"


def test_every_published_run_has_a_preset():
    assert set(PRESETS) == {*PUBLISHED, UNPUBLISHED}


def test_the_unpublished_run_has_the_schedule_of_one_and_the_experts_of_another():
    differs = {name for name, value in PRESETS[UNPUBLISHED].items() if value != PRESETS["6.7B"].get(name)}
    parallel = {"moe_expert_parallel_size", "enable_expert_tensor_parallelism", "sequence_parallel"}
    assert all(PRESETS[UNPUBLISHED][name] == PRESETS["1.3B+MoE-128"][name] for name in differs - parallel - {
        "rampup_batch_size"
    })  # fmt: skip
    validate_numbers(build(PRESETS[UNPUBLISHED]), world_size=128)


@pytest.mark.parametrize("name", PUBLISHED)
def test_values_are_the_published_ones(name):
    config = build(PRESETS[name])
    model, optimizer, training, moe = config.model, config.optimizer, config.training, config.moe
    assert PUBLISHED[name][:-1] == (
        *(model.num_layers, model.hidden_size, model.num_attention_heads),
        *(training.global_batch_size, training.micro_batch_size),
        *(optimizer.lr, optimizer.min_lr, optimizer.lr_decay_tokens // 10**9),
        *(moe.num_experts[0], model.init_method_std),
    )
    assert (training.train_tokens, optimizer.lr_warmup_tokens) == (300 * 10**9, 375 * 10**6)
    assert (optimizer.adam_beta1, optimizer.adam_beta2, optimizer.adam_eps) == (0.9, 0.95, 1e-8)
    assert (optimizer.weight_decay, optimizer.clip_grad, optimizer.lr_decay_style) == (0.1, 1.0, "cosine")
    assert (model.seq_length, model.hidden_dropout, model.attention_dropout) == (2048, 0.1, 0.1)
    assert (config.data.split, config.logging.log_interval) == ("98,2,0", 10)
    assert (training.eval_interval, training.eval_iters, training.checkpoint_activations) == (100, 10, True)
    assert config.parallel.tensor_model_parallel_size == PUBLISHED[name][-1]
    if "MoE" in name:
        assert (moe.expert_interval, moe.topk, moe.aux_loss_coeff, moe.moe_min_capacity) == (2, 1, 0.01, 4)
        assert (moe.moe_train_capacity_factor, moe.moe_eval_capacity_factor) == (1.0, None)
        assert config.parallel.moe_expert_parallel_size == (64,)


@pytest.mark.parametrize("name", PUBLISHED)
def test_valid_at_the_published_scale(name):
    validate_numbers(build(PRESETS[name]), world_size=64)


def test_published_rampups():
    assert PRESETS["1.3B"]["rampup_batch_size"] == (32, 32, 1_953_125)
    assert PRESETS["6.7B"]["rampup_batch_size"] == (32, 32, 4_882_812)
    assert [name for name in PRESETS if PRESETS[name]["rampup_batch_size"]] == ["1.3B", "6.7B"]
