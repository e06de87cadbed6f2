"""The command lines that convert and inspect checkpoints."""

import json
import re
import signal
import subprocess
import sys

import pytest
import saved_model
import tiny_run
from test_docs import ROOT, tool

from megatron.config import MoEConfig
from megatron.inference.load import find_checkpoint


def run(name: str, *flags: object) -> int:
    try:
        return tool(f"tools/{name}.py").main([str(flag) for flag in flags])
    except SystemExit as stop:
        return stop.code


def test_a_dense_checkpoint_is_upcycled_and_looked_at(tmp_path, capsys):
    saved = saved_model.save_model(tmp_path, MoEConfig())
    new = tmp_path / "new"
    flags = ("--load", saved.folder, "--to", "native", "--save", new)
    assert (
        run(
            "convert_checkpoint",
            *flags,
            "--upcycle",
            "--num-experts",
            4,
            "--moe-router-center-input",
            "--ep",
            2,
            "--dtype",
            "bf16",
        )
        == 0
    )
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {new / 'step_00000003'}"
    assert run("inspect_checkpoint", new, "--verify", "--json") == 0
    about = json.loads(capsys.readouterr().out)
    assert about["model"]["experts"] == [1, 4]
    assert find_checkpoint(new).config.moe.moe_router_center_input
    assert about["written_by"]["expert_parallel"] == [2]
    dtypes = {kind["dtype"] for kind in about["tensors"].values()}
    assert dtypes == {"bfloat16", "float32"}  # what routers learn outside of gradient descent stays in fp32
    assert run("convert_checkpoint", *flags) == 1
    assert f"--save {new} is there already and not empty" in capsys.readouterr().err
    assert run("convert_checkpoint", *flags[:2], "--to", "hf", "--save", tmp_path / "x", "--max-shard-size", "big") == 1
    assert "expected a size such as 5GB" in capsys.readouterr().err
    assert run("convert_checkpoint", *flags, "--average", saved.folder) == 2
    assert run("inspect_checkpoint", tmp_path / "nothing") == 1
    assert "does not exist" in capsys.readouterr().err


def test_flags_without_effect_are_refused_and_files_that_moved_are_recorded(tmp_path, capsys):
    saved = saved_model.save_model(tmp_path)
    flags = ("--load", saved.folder, "--to", "native", "--save", tmp_path / "new")
    for more, message in (
        (("--topk", 2, "--upcycle-noise", 0.1), "--topk, --upcycle-noise: of --upcycle"),
        (("--max-shard-size", "1GB"), "--max-shard-size has no meaning for --to native"),
        (("--gelu-as-tanh",), "--gelu-as-tanh has no meaning for"),
        (("--tokenizer-model", "/nowhere"), "--tokenizer-model /nowhere: no such file"),
    ):
        assert run("convert_checkpoint", *flags, *more) == 1
        assert message in capsys.readouterr().err
    moved = saved.tokenizer_file.rename(tmp_path / "moved.json")
    assert run("convert_checkpoint", *flags, "--tokenizer-model", moved) == 0
    (meta,) = (tmp_path / "new").glob("step_*/meta.json")
    assert json.loads(meta.read_text())["config"]["data"]["tokenizer_model"] == str(moved)


def test_the_destination_is_looked_at_before_anything_is_read(tmp_path, capsys, monkeypatch):
    (tmp_path / "mounted").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    flags = ("--load", tmp_path / "nothing", "--to", "native", "--save")
    monkeypatch.setattr("pathlib.Path.is_mount", lambda path: path.name == "mounted")
    assert run("convert_checkpoint", *flags, tmp_path / "mounted") == 1
    assert "is where a file system is mounted" in capsys.readouterr().err
    saved = saved_model.save_model(tmp_path)
    assert run("convert_checkpoint", "--load", saved.folder, "--to", "hf", "--save", tmp_path / "link") == 0
    assert (tmp_path / "elsewhere" / "config.json").is_file()
    assert run("convert_checkpoint", *flags, tmp_path / "link") == 1
    assert "is there already and not empty" in capsys.readouterr().err
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert run("convert_checkpoint", "--load", saved.folder, "--to", "hf", "--save", tmp_path / "loop") == 1
    assert f"error: --save {tmp_path / 'loop'}" in capsys.readouterr().err
    (checkpoint,) = saved.folder.glob("step_*")
    assert run("convert_checkpoint", *flags, checkpoint / "new" / "one") == 1
    assert f"is inside the checkpoint {checkpoint}, and would be deleted with it" in capsys.readouterr().err


SLOW = """
import runpy, sys, time
import megatron.checkpoint.storage as storage
storage.os.fsync = lambda file: (print("writing", flush=True), time.sleep(60))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.exhaustive), signal.SIGINT])
def test_nothing_is_left_of_a_conversion_that_is_stopped(tmp_path, number):
    saved = saved_model.save_model(tmp_path)
    flags = ("--load", saved.folder, "--to", "hf", "--save", tmp_path / "new" / "hf")
    command = [sys.executable, "-c", SLOW, ROOT / "tools" / "convert_checkpoint.py", *flags]
    with subprocess.Popen(
        [str(word) for word in command], env=tiny_run.environment(), stdout=subprocess.PIPE, text=True
    ) as process:
        assert any("writing" in line for line in process.stdout)
        assert list((tmp_path / "new").glob(".hf.tmp-*"))
        process.send_signal(number)
        assert process.wait(timeout=30) == 128 + number
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("target", ["hf", pytest.param("megatron-deepspeed", marks=pytest.mark.exhaustive)])
def test_a_file_that_may_not_grow_is_told_and_nothing_is_left(tmp_path, target):
    """As under a quota, which the room on the disk does not show."""
    saved = saved_model.save_model(tmp_path)
    flags = ("--load", saved.folder, "--to", target, "--save", tmp_path / "new" / "out")
    command = [sys.executable, ROOT / "tools" / "convert_checkpoint.py", *flags]
    ended = subprocess.run(
        ["bash", "-c", 'ulimit -f 1 && exec "$@"', "bash", *map(str, command)],
        env=tiny_run.environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert ended.returncode == 1, ended.stderr
    assert re.fullmatch(r"error: --save .*File too large.*; nothing was left behind\n", ended.stderr)
    assert not (tmp_path / "new").exists()


def test_inspection_ends_quietly_when_nobody_reads(tmp_path):
    saved = saved_model.save_model(tmp_path)
    command = [sys.executable, ROOT / "tools" / "inspect_checkpoint.py", saved.folder]
    for output, status, told in (("| true; exit ${PIPESTATUS[0]}", 0, ""), ("> /dev/full", 1, "error: [Errno 28]")):
        ended = subprocess.run(
            ["bash", "-c", f'"$@" {output}', "bash", *map(str, command)],
            env=tiny_run.environment(), capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert ended.returncode == status
        assert ended.stderr.startswith(told)
        assert "Traceback" not in ended.stderr
        assert "Exception ignored" not in ended.stderr
