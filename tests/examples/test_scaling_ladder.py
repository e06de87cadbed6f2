"""The scaling ladder: its jobs, its arithmetic, and on a CPU all of it, stopped once on the way."""

import importlib
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from megatron.config.validation import validate_numbers

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples_moe" / "scaling_ladder"
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(FOLDER)
    ladder, report, train = (importlib.import_module(name) for name in ("ladder", "report", "train"))


def of_scale(name: str) -> "ladder.Ladder":
    return ladder.Ladder(Path("out"), ladder.SCALES[name], data=("--data-path", "text_document"), device=("--bf16",))


@pytest.mark.parametrize("scale", ladder.SCALES)
def test_jobs_can_be_trained_and_differ_in_what_they_say(scale):
    found = of_scale(scale)
    jobs = [*found.rate_jobs(), *found.main_jobs(), *found.time_jobs()]
    assert len({job.name for job in jobs}) == len(jobs)
    for job in jobs:
        config = job.config
        validate_numbers(config, 1)
        assert config.training.recipe == job.model.recipe
        assert config.training.train_tokens == (
            found.scale.rate_tokens if job.name.startswith("rates/") else found.tokens
        )
    main = {f"{job.model.name}-seed{job.name[-1]}": job.config for job in found.main_jobs()}
    for model in [*found.dense, *found.with_experts]:
        for seed in ladder.SEEDS:
            config = main[f"{model.name}-seed{seed}"]
            assert config.training.seed == seed
            assert (config.model.hidden_size, config.moe.num_experts) == (model.width, (model.experts,))
            assert config.model.qk_layernorm == (model.recipe == "recommended")
    plain = main[f"{found.with_experts[-1 if scale != 'full' else 4].name}-seed1"]
    changed = [main[f"{model.name}-seed1"] for model in found.ablations]
    assert len({str((each.moe, each.model)) for each in [plain, *changed]}) == len(changed) + 1


def test_a_rate_that_was_found_is_taken_and_others_follow_the_rule():
    rates = {"recommended-128": 0.25}
    found = ladder.Ladder(Path("out"), ladder.SCALES["pair"], rates=rates)
    given = {job.model.name: job.config.optimizer.lr for job in found.main_jobs()}
    assert given["recommended-128"] == 0.25
    assert given["recommended-128x32"] == ladder.BASE_RATE
    assert given["recommended-256"] == pytest.approx(ladder.BASE_RATE / 2**0.5, rel=1e-5)


def test_the_size_of_equal_loss_is_interpolated_and_never_extrapolated():
    power_law = [(size, 10 * size**-0.1) for size in (8.0, 1.0, 2.0, 4.0)]
    for size in (1.0, 1.5, 2.0, 3.7, 8.0):
        assert report.size_of_equal_loss(power_law, 10 * size**-0.1) == pytest.approx(size)
    assert report.size_of_equal_loss(power_law, 10.1) is None
    assert report.size_of_equal_loss(power_law, 10 * 8.1**-0.1) is None
    assert report.size_of_equal_loss([(1.0, 3.0)], 3.0) is None


def result(name: str, experts: int, body: int, curves: list[dict[int, float]]) -> "report.Result":
    losses = [curve[max(curve)] for curve in curves]
    return report.Result(
        name, "recommended", experts, body, 10 * body, 6 * body, 1e-3, 100, losses, curves, [], body / 2
    )


def test_models_with_experts_are_compared_with_dense_ones_of_their_recipe():
    curves = {size: {tokens: (9 + 100 / tokens) * size**-0.1 for tokens in (10, 50, 100)} for size in (1, 2, 4, 8)}
    results = {f"recommended-{size}": result(f"recommended-{size}", 1, size, [curves[size]]) for size in (1, 2, 4)}
    results["published-8"] = report.dataclasses.replace(result("published-8", 1, 8, [curves[8]]), recipe="published")
    seeds = [{10: 99.0, 50: curves[2][50], 100: curves[2][100] + off} for off in (0.01, -0.01)]
    results["moe"] = result("recommended-1x4", 4, 1, seeds)
    (row,) = report.comparison(results)
    assert row["body_parameters"]["ratio"] == pytest.approx(2)
    low, high = row["body_parameters"]["each_seed"]
    assert low < 2 < high
    assert row["seconds"]["ratio"] == row["flops_per_token"]["ratio"] == pytest.approx(2)
    assert report.effective_along(results["moe"], results) == pytest.approx({50: 2, 100: 2})
    results["moe"] = result("recommended-1x4", 4, 1, [curves[8]])  # better than all of its ladder
    (row,) = report.comparison(results)
    assert row["body_parameters"] == {"own": 1, "dense_of_equal_loss": None, "ratio": None, "each_seed": [None]}
    assert "outside the ladder" in report.page(results, [row], "a GPU", [])


def run(*words: object) -> list[str]:
    return ["bash", str(FOLDER / "run.sh"), *map(str, words)]


def environment() -> dict[str, str]:
    return os.environ | {"VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1"}


@pytest.mark.exhaustive
@pytest.mark.distributed
def test_from_a_text_to_the_page_with_a_stop_on_the_way(tmp_path):
    corpus, out = tmp_path / "text.jsonl", tmp_path / "out"
    command = [sys.executable, str(ROOT / "examples_moe" / "quickstart_corpus.py"), "--output", str(corpus)]
    stdlib = sysconfig.get_paths()["stdlib"]
    subprocess.run([*command, "--root", stdlib, "--least-megabytes", "0.3", "--most-megabytes", "0.4"], check=True)
    words = ("--scale", "trial", "--out", out, "--corpus", corpus)
    small = subprocess.run(run("text", "train", *words, "--tokens", "1M"), env=environment(), capture_output=True)
    assert small.returncode == 1
    assert b"a run on 1,000,000 and its validation need 1,029,831, none of them twice: give more" in small.stderr
    words = (*words, "--tokens", "16_384")
    stopped = subprocess.Popen(run("train", *words), env=environment(), start_new_session=True)
    rule = ladder.Model(16).rate()
    first = out / "runs" / "16384" / f"recommended-16x4-lr{rule:.3g}-seed1" / "metrics.jsonl"
    while not first.exists() or '"kind": "train"' not in first.read_text():
        time.sleep(0.05)
        assert stopped.poll() is None
    os.killpg(stopped.pid, signal.SIGINT)
    stopped.wait()
    done = subprocess.run(run("train", "time", "page", *words), env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    starts = [line["resumed_at_tokens"] for line in map(json.loads, first.open()) if line["kind"] == "run"]
    assert starts[0] is None
    assert len(starts) == 2
    assert (out / "page.md").read_text() in done.stdout
    for figure in ("validation_loss", "loss_over_time", "effective_parameters", "loads"):
        assert (out / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((out / "results.json").read_text())
    assert {each["name"]: len(each["losses"]) for each in results["models"]} == dict.fromkeys(
        ("recommended-16", "recommended-32", "recommended-16x4"), 2
    )
    assert all(each["seconds"] > 0 for each in results["models"])
    assert [row["model"] for row in results["comparison"]] == ["recommended-16x4"]
    again = subprocess.run(run("train", "rates", *words), env=environment(), capture_output=True, text=True)
    assert "6 runs, 6 of them finished before" in again.stdout
    rates = json.loads((out / ladder.RATES).read_text())
    for model in (ladder.Model(16), ladder.Model(32), ladder.Model(16, 4)):
        assert rates[model.name] in (pytest.approx(model.rate(), rel=1e-4), pytest.approx(2 * model.rate(), rel=1e-4))
