"""Tables of what was measured, and how they are read."""

import json

import pytest

from benchmarks.train_step import describe, parse_args
from megatron.planning.measured import PEAKS, STEPS, between, peaks_in, run_of


@pytest.mark.parametrize("name", [*STEPS, *(peak.run for peak in PEAKS), "350M+8:4:2"])
def test_a_run_is_the_benchmark_s(name):
    assert run_of(name) == describe(name, parse_args(["--runs", name]))


def test_options_change_a_run():
    assert run_of("350M:4", checkpoint_activations=True).training.checkpoint_activations


def test_values_between_two_entries_are_linear_in_the_logarithm():
    table = {128: 0.5, 512: 0.9}
    assert [between(table, at) for at in (1, 128, 256, 512, 9999)] == pytest.approx([0.5, 0.5, 0.7, 0.9, 0.9])


def test_peaks_are_read_from_what_the_benchmark_writes(tmp_path):
    rows = [{"run": "350M:16 ours", "memory_gb": 30.0}, {"run": "350M:16 nanoGPT", "memory_gb": 40.0}]
    content = {"device": "x", "torch": "2", "precision": "bf16", "checkpoint_activations": True, "dropout": 0.1}
    (tmp_path / "a.json").write_text(json.dumps(content | {"rows": rows}))
    (peak,) = peaks_in(tmp_path / "a.json")
    assert (peak.run, peak.gb) == ("350M:16", 30.0)
    run = run_of(peak.run, **peak.options)
    assert (run.training.checkpoint_activations, run.model.hidden_dropout, run.optimizer.precision) == (
        True, 0.1, "bf16",
    )  # fmt: skip


def test_another_file_is_refused(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"rows": [{"run": "x"}]}))
    with pytest.raises(ValueError, match=r"give what benchmarks\.train_step --json writes"):
        peaks_in(tmp_path / "a.json")
