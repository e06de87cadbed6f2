"""Damaged or missing input, full disks and interruptions: errors name them, and no file is half-written."""

import contextlib
import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import saved_model
from test_docs import ROOT, tool
from tiny_run import environment
from zero_shot_data import write_data

from megatron.checkpoint import CheckpointError
from megatron.config import ModelConfig
from megatron.evaluation.harness import Evaluation, evaluate
from megatron.evaluation.output import write_whole
from megatron.evaluation.request_log import RequestLog
from megatron.evaluation.tasks import LOCAL, build_tasks

SHAPE = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, seq_length=64, init_method_std=0.2)


@pytest.fixture
def wanted(tmp_path) -> Evaluation:
    """An evaluation of a tiny model that works."""
    saved = saved_model.save_model(tmp_path, shape=SHAPE)
    data = write_data(tmp_path / "data")
    output = tmp_path / "new" / "scores"
    return Evaluation(str(saved.folder), str(output), ("piqa", "boolq"), str(data), device="cpu", batch_size=1)


def refuses(wanted: Evaluation, *messages: str) -> None:
    with pytest.raises((CheckpointError, ValueError)) as caught:
        evaluate(wanted)
    for message in messages:
        assert message in str(caught.value)
    assert not Path(wanted.output).parent.exists()


def test_a_damaged_checkpoint(wanted):
    (step,) = Path(wanted.load).glob("step_*")
    good = step.with_name("good")
    shutil.copytree(step, good)

    def damaged(name: str, change) -> None:
        shutil.rmtree(step)
        shutil.copytree(good, step)
        change(step / name)

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)

    damaged("data-00000.safetensors", flip)
    refuses(wanted, str(step), "data-00000.safetensors", "SHA-256")
    damaged("data-00000.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-4]))
    refuses(wanted, str(step), "data-00000.safetensors", "bytes")
    damaged("data-00000.safetensors", Path.unlink)
    refuses(wanted, str(step), "data-00000.safetensors")
    damaged(
        "meta.json", lambda path: path.write_text(path.read_text().replace('"hidden_size": 32', '"hidden_size": 64'))
    )
    refuses(wanted, str(step), "meta.json")


def test_another_tokenizer(wanted, tmp_path):
    text = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace('"w3"', '"v3"'))
    refuses(wanted, "the tokenizer's files have fingerprint", "--tokenizer-model")


PIQA = b'{"goal": "w1", "sol1": "w2", "sol2": "w3"}\n'
RACE = b'{"article": "", "questions": [""], "answers": ["C"], "options": [["w1", "w2"]]}\n'


@pytest.mark.parametrize(
    ("task", "file", "content", "message"),
    [
        ("piqa", "piqa_valid.jsonl", PIQA + PIQA[:20], "line 2, is no line of piqa"),
        ("piqa", "piqa_valid.jsonl", PIQA.replace(b"w1", b"\xff"), "line 1, is no line of piqa"),
        ("piqa", "piqa_valid-labels.lst", b"0\n2\n", "expected one of 0, 1, got 2"),
        ("piqa", "piqa_valid-labels.lst", b"0\n", "line 2, is no line of piqa"),
        ("piqa", "piqa_valid-labels.lst", b"0\n1\n1\n", "has 2 lines, its labels 3"),
        ("piqa", "piqa_valid-labels.lst", None, "piqa_valid-labels.lst is missing"),
        ("boolq", "boolq_val.jsonl", b"", "has 0 lines"),
        ("boolq", "boolq_val.jsonl", b'{"passage": "", "question": "", "label": 3}\n', "expected one of 0, 1, got 3"),
        ("race", "race_test_high.jsonl", RACE, "expected one of A, B, got 'C'"),
        ("race", "race_test_high.jsonl", RACE.replace(b'["C"]', b"[]"), "line 1, is no line of race"),
        ("triviaqa", "triviaqa_dev.jsonl", b'{"question": "", "answers": "w2"}\n', "answers are 'w2'; expected a list"),
        ("webqs", "webqs_test.jsonl", b'{"question": "", "answers": []}\n', "answers are []; expected a list"),
    ],
)
def test_damaged_data(tmp_path, task, file, content, message):
    path = write_data(tmp_path / "data") / file
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"\.(jsonl|lst)") as caught:
        build_tasks([task], path.parent)
    assert str(path.with_name(file.split("-")[0].removesuffix(".jsonl"))) in str(caught.value)
    assert message in str(caught.value)


def test_an_output_folder_that_cannot_be_written(wanted, tmp_path, monkeypatch):
    def model(*_: object) -> None:
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr("megatron.evaluation.harness.load_share", model)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--output: nothing can be written to .*file/scores .*give another place"):
        evaluate(Evaluation(wanted.load, str(tmp_path / "file" / "scores"), wanted.tasks, wanted.data_dir))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    refuses(wanted, "--output: 34 MB may be needed in", "1 MB are free")
    perplexity = tool("tools/perplexity.py")
    (tmp_path / "text.txt").write_text("w1 w2")
    words = ["--load", wanted.load, "--input", str(tmp_path / "text.txt"), "--output"]
    assert perplexity.main([*words, str(tmp_path / "new" / "out.json")]) == 1
    assert perplexity.main([*words, str(tmp_path)]) == 1
    assert not (tmp_path / "new").exists()


def test_a_disk_that_fills_up_loses_no_answer(wanted):
    """The limit on the size of a file stands for the disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    log = Path(wanted.output) / "requests.jsonl"
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (900, limits[1]))
        with pytest.raises(OSError, match="too large"):
            evaluate(wanted)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    cut = log.read_bytes()
    assert len(cut) == 900
    assert [path.name for path in log.parent.iterdir()] == ["requests.jsonl"]
    kept = cut.rpartition(b"\n")[0]
    assert kept.count(b"\n") >= 2
    evaluate(wanted)
    assert log.read_bytes().startswith(kept + b"\n{")
    found = json.loads((log.parent / "results.json").read_text())["results"]
    evaluate(Evaluation(wanted.load, str(log.parent.parent / "again"), wanted.tasks, wanted.data_dir, device="cpu"))
    again = json.loads((log.parent.parent / "again" / "results.json").read_text())["results"]
    assert {task: again[task]["acc,none"] for task in again} == {task: found[task]["acc,none"] for task in found}


def test_a_file_keeps_its_content_when_writing_fails(tmp_path):
    (tmp_path / "results.md").write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "results.md", "new \ud800")
    assert [path.name for path in tmp_path.iterdir()] == ["results.md"]
    assert (tmp_path / "results.md").read_text() == "old"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda log: log.write_text('{"about": {}}\n{"ke'), "is of another evaluation: checkpoint was None"),
        (lambda log: log.write_text("{}\n"), "is damaged"),
        (lambda log: log.write_bytes(b"\xff\xfe\n"), "is damaged"),
    ],
)
def test_a_log_of_something_else_is_refused(wanted, change, message):
    log = Path(wanted.output) / "requests.jsonl"
    log.parent.mkdir(parents=True)
    change(log)
    content = log.read_bytes()
    with pytest.raises(ValueError, match=message):
        evaluate(wanted)
    assert log.read_bytes() == content


def test_a_second_evaluation_into_the_same_folder_is_refused(wanted):
    """And gets in when the first one has ended, without its answers being lost."""
    log = Path(wanted.output) / "requests.jsonl"
    with contextlib.closing(RequestLog(log, {})) as first:
        first.add({"key": 1.0})
        content = log.read_bytes()
        with pytest.raises(ValueError, match="another evaluation is writing there; wait for it, or choose another"):
            evaluate(wanted)
    assert log.read_bytes() == content
    log.unlink()
    assert evaluate(wanted)


@pytest.mark.exhaustive  # starts the tool twice; tests/slurm kills a process of a job
def test_a_killed_evaluation_is_resumed(wanted, tmp_path):
    lines = ({"text": f"w{n % 120} w{n // 120} w{n % 7}"} for n in range(500))
    (tmp_path / "data" / "lambada_test_openai.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["--load", wanted.load, "--output", wanted.output, "--data-dir", wanted.data_dir, "--device", "cpu"]
    command = [sys.executable, str(ROOT / "tools" / "evaluate.py"), *words, "--batch-size", "1"]
    command += ["--tasks", "lambada_openai"]
    log = Path(wanted.output) / "requests.jsonl"
    started = subprocess.Popen(command, env=environment(), cwd=tmp_path, stderr=subprocess.DEVNULL)
    while started.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") > 20):
        time.sleep(0.02)
    started.kill()
    assert started.wait() == -signal.SIGKILL, "it was killed in the middle"
    kept = log.read_bytes().rpartition(b"\n")[0]
    done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert log.read_bytes().startswith(kept)
    assert len({json.loads(line).get("key") for line in log.read_bytes().splitlines()}) == 1 + 500
    assert (log.parent / "results.md").read_text() == done.stdout


def test_all_tasks_have_local_files(tmp_path):
    assert len(build_tasks(list(LOCAL), write_data(tmp_path / "data"))) == len(LOCAL) == 6
