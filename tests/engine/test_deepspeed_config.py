import json

import pytest

from megatron.config import OptimizerConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron.config.errors import ConfigError
from megatron.engine.deepspeed_config import build, from_flags


def run(tmp_path, theirs: object, precision: str = "bf16") -> RunConfig:
    path = tmp_path / "ds.json"
    path.write_text(theirs if isinstance(theirs, str) else json.dumps(theirs))
    return RunConfig(
        optimizer=OptimizerConfig(precision=precision),
        training=TrainingConfig(micro_batch_size=2, global_batch_size=16),
        parallel=ParallelConfig(deepspeed_config=str(path)),
    )


def test_agreeing_settings_are_merged_and_new_ones_added(tmp_path):
    theirs = {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 1000},
        "comms_logger": {"enabled": True},
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
    }
    merged = build(run(tmp_path, theirs), data_parallel_size=4)
    assert merged["train_batch_size"] == 8  # of one micro-batch a process: the engine accumulates itself
    assert merged["gradient_clipping"] == 1.0
    assert merged["zero_optimization"] == {"stage": 1, "reduce_bucket_size": 1000}
    assert merged["comms_logger"] == {"enabled": True}


@pytest.mark.parametrize(
    ("theirs", "numbers"),
    [
        ({"gradient_clipping": 0.3}, ("0.3", "1.0")),
        ({"zero_optimization": {"stage": 3}}, ("zero_optimization.stage", "3", "1")),
        ({"train_batch_size": 32}, ("32", "16")),
        ({"train_micro_batch_size_per_gpu": 3}, ("3", "2")),
        ({"gradient_accumulation_steps": 5}, ("5", "2")),
        ({"fp16": {"enabled": True}}, ("fp16", "bf16")),
        ({"optimizer": {"type": "Adam"}}, ("optimizer", "--lr")),
        ({"scheduler": {}}, ("scheduler", "--lr-decay-style")),
        ({"timers": {"throughput": {"enabled": True}}}, ("timers", "tokens/s")),
    ],
)
def test_a_contradiction_is_an_error_with_both_values(tmp_path, theirs, numbers):
    with pytest.raises(ConfigError) as error:
        build(run(tmp_path, theirs), data_parallel_size=4)
    for number in numbers:
        assert number in str(error.value)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_file_that_is_no_json_object_is_an_error(tmp_path, text):
    with pytest.raises(ConfigError, match=r"ds\.json"):
        build(run(tmp_path, text), data_parallel_size=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "--bf16"),
        ({"communication_data_type": "bf16"}, "--grad-reduce-in-bf16"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "fp32"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "--optimizer-cpu-offload"),
        ({"gradient_cliping": 1.0}, "the nearest valid one is 'gradient_clipping'"),
    ],
)
def test_what_would_change_the_numbers_or_mean_nothing_is_refused(tmp_path, settings, message):
    with pytest.raises(ConfigError) as error:
        build(run(tmp_path, settings), data_parallel_size=1)
    assert message in str(error.value)


def test_offload_moves_the_optimizer_alone_and_needs_no_compiler():
    plain, moved = (from_flags(RunConfig(optimizer=OptimizerConfig(optimizer_cpu_offload=x)), 1) for x in (False, True))
    assert moved.pop("zero_force_ds_cpu_optimizer") is False
    assert moved["zero_optimization"].pop("offload_optimizer")["device"] == "cpu"
    assert moved == plain


@pytest.mark.parametrize(
    "settings", [{"wall_clock_breakdown": True}, {"memory_breakdown": True}, {"flops_profiler": {"enabled": True}}]
)
def test_what_looks_at_each_pass_does_not_go_with_cuda_graphs(tmp_path, settings):
    config = run(tmp_path, settings)
    build(config, data_parallel_size=1)
    config.training.cuda_graphs = True
    with pytest.raises(ConfigError, match=f"{next(iter(settings))!r} sees nothing of a CUDA graph"):
        build(config, data_parallel_size=1)
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(settings).replace("true", "false"))
    build(config, data_parallel_size=1)
