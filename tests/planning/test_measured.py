"""Tables of what was measured, and how they are read."""

import json

import pytest

from megatron.config.presets import PRESETS
from megatron.config.run import build
from megatron.planning.measured import PEAKS, STEPS, between, peaks_in, run_of


@pytest.mark.parametrize("name", [*STEPS, *(peak.run for peak in PEAKS)])
def test_every_measured_run_is_one(name):
    assert run_of(name).training.micro_batch_size == int(name.split(":")[1])


def test_a_run_by_its_name():
    values = {"num_experts": (8,), "micro_batch_size": 4, "global_batch_size": 8, "checkpoint_activations": False}
    assert run_of("350M+8:4:2") == build(PRESETS["350M"] | values | {"hidden_dropout": 0.0, "attention_dropout": 0.0})


def test_options_change_a_run():
    assert run_of("350M:4", checkpoint_activations=True).training.checkpoint_activations


def test_values_between_two_entries_are_linear_in_the_logarithm():
    table = {128: 0.5, 512: 0.9}
    assert [between(table, at) for at in (1, 128, 256, 512, 9999)] == pytest.approx([0.5, 0.5, 0.7, 0.9, 0.9])


def test_peaks_are_read_from_what_the_benchmark_writes(tmp_path):
    rows = [{"run": "350M:16 ours", "memory_gb": 30.0}, {"run": "350M:16 nanoGPT", "memory_gb": 40.0}]
    content = {"device": "x", "torch": "2", "precision": "bf16", "checkpoint_activations": True, "dropout": 0.1}
    content["options"] = ["exp_avg_dtype=bf16", "optimizer_name=adamw"]
    (tmp_path / "a.json").write_text(json.dumps(content | {"rows": rows}))
    (peak,) = peaks_in(tmp_path / "a.json")
    assert (peak.run, peak.gb) == ("350M:16", 30.0)
    run = run_of(peak.run, **peak.options)
    assert run.optimizer.exp_avg_dtype == "bf16"
    assert (run.training.checkpoint_activations, run.model.hidden_dropout, run.optimizer.precision) == (
        True, 0.1, "bf16",
    )  # fmt: skip


@pytest.mark.parametrize(
    "row", [{"run": "350M:16"}, {"run": "350M", "memory_gb": 1}, {"run": "350M:16", "memory_gb": "1"}]
)
def test_another_file_is_refused(row, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"rows": [row]}))
    with pytest.raises(ValueError, match=r"give what benchmarks\.train_step --json writes"):
        peaks_in(tmp_path / "a.json")
