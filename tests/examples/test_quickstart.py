"""The quickstart from a text to curves and samples, on few tokens; and a second call, which reuses everything."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def quickstart(*arguments: object) -> subprocess.CompletedProcess:
    """Run the script in the environment of the tests."""
    return subprocess.run(
        ["bash", str(ROOT / "examples_moe" / "quickstart.sh"), *map(str, arguments)],
        env=os.environ | {"VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def lines(run: Path, kind: str) -> list[dict]:
    return [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if line["kind"] == kind]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Path, subprocess.CompletedProcess]:
    folder = tmp_path_factory.mktemp("quickstart")
    corpus = folder / "text.jsonl"
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    command = [sys.executable, str(ROOT / "examples_moe" / "quickstart_corpus.py"), "--output", str(corpus)]
    subprocess.run([*command, "--root", str(stdlib), "--least-megabytes", "0.3", "--most-megabytes", "0.4"], check=True)
    out = folder / "out"
    return corpus, out, quickstart("--corpus", corpus, "--out", out, "--tokens", "65_536")


def test_everything_comes_out(finished):
    _, out, done = finished
    assert done.returncode == 0, done.stdout + done.stderr
    assert (out / "loss_curves.png").read_bytes().startswith(b"\x89PNG")
    table = (out / "results.md").read_text()
    assert table in done.stdout
    assert "after the same 65.5K tokens" in table
    assert (out / "samples.txt").read_text() in done.stdout
    assert "The function returns" in (out / "samples.txt").read_text()


def test_both_models_learn_from_the_same_tokens_and_the_second_was_resumed(finished):
    _, out, _ = finished
    dense, moe = (lines(out / name, "train") for name in ("dense", "moe-8"))
    assert dense[-1]["tokens"] == moe[-1]["tokens"] == 65_536
    for name in ("dense", "moe-8"):
        assert lines(out / name, "valid")[-1]["loss"] < 7.3, "an untrained model has ln(2048) = 7.6"
    assert [line["resumed_at_tokens"] for line in lines(out / "dense", "run")] == [None]
    assert [line["resumed_at_tokens"] for line in lines(out / "moe-8", "run")] == [None, 32_768]
    (run, _) = lines(out / "moe-8", "run")
    assert run["parameters"] > 2 * run["active_parameters"]
    assert abs(run["active_parameters"] / lines(out / "dense", "run")[0]["parameters"] - 1) < 0.01


def test_a_second_call_does_nothing_again(finished):
    corpus, out, first = finished
    logs = {name: (out / name / "metrics.jsonl").read_text() for name in ("dense", "moe-8")}
    again = quickstart("--corpus", corpus, "--out", out, "--tokens", "65_536")
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("done before") == first.stdout.count("== Training") + 1  # and the tokens
    assert {name: (out / name / "metrics.jsonl").read_text() for name in logs} == logs


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--corpus", "/no/such/file.jsonl"], "cannot be read"),
        (["--tokens"], "--tokens needs a value"),
        (["--token", "1M"], "--token is no option"),
        (["--tokens", "many"], "--tokens many is no count"),
    ],
)
def test_wrong_options(tmp_path, arguments, said):
    done = quickstart("--out", tmp_path, *arguments)
    assert done.returncode == 1
    assert said in done.stderr
