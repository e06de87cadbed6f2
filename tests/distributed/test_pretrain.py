"""The trainer as users start it: trains, stops, is killed, resumes, in several layouts."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run
import torch
from distributed.started import output_until_the_end, wait_for
from distributed.trainers import Death

pytestmark = pytest.mark.distributed
MOE = {"num_experts": 4, "moe_expert_parallel_size": 2}


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory) -> Path:
    """A finished MoE run, 2 processes, expert parallel 2."""
    save = tmp_path_factory.mktemp("uninterrupted")
    flags = tiny_run.flags(
        corpus, save=save, profile=save / "profile", profile_step=3, check_replicas=3, tensorboard_dir=save / "curves",
        **MOE,
    )  # fmt: skip
    done = tiny_run.train(2, flags)
    assert done.returncode == 0, done.stdout + done.stderr
    return save


def test_a_run_learns_logs_validates_and_saves(uninterrupted):
    losses = [record["loss"] for record in tiny_run.records(uninterrupted, "train")]
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 0.2
    assert tiny_run.records(uninterrupted, "train")[0]["lr"] > 0
    valid = tiny_run.records(uninterrupted, "valid")
    assert [record["step"] for record in valid] == [4, 8]
    assert valid[-1]["loss"] < valid[0]["loss"]
    experts = tiny_run.records(uninterrupted, "train")[-1]["experts"]
    assert len(experts["load"]) == 1
    assert 1 <= experts["load"][0] <= 4
    assert (uninterrupted / "latest").read_text().strip() == "step_00000008"
    assert (uninterrupted / "profile" / "table.txt").read_text().startswith("update 3\n")


def test_names_in_what_a_run_writes_stay(uninterrupted):
    """Scripts and plots of users read them; a line of outputs.txt changes only where a change is intended."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    keys: dict[str, set[str]] = {}
    for kind in ("run", "train", "valid", "save", "stop"):
        keys[f"metrics.jsonl {kind}"] = {key for record in tiny_run.records(uninterrupted, kind) for key in record}
    curves = EventAccumulator(str(uninterrupted / "curves"))
    curves.Reload()
    keys["TensorBoard"] = set(curves.Tags()["scalars"])
    checkpoint = uninterrupted / "step_00000008"
    meta = json.loads((checkpoint / "meta.json").read_text())
    nested = {name: value for name, value in meta.items() if isinstance(value, dict) and name != "config"}
    keys["meta.json"] = {*meta, *(f"{name}.{key}" for name, value in nested.items() for key in value)}
    keys["meta.json config"] = set(meta["config"])
    keys["ended.json"] = set(json.loads((uninterrupted / "ended.json").read_text()))
    tensors = json.loads((checkpoint / "index.json").read_text())["tensors"]
    keys["kinds of tensors"] = {name.split(".")[0] for name in tensors}
    expected = Path(__file__).with_name("outputs.txt").read_text().splitlines()
    assert [f"{name}: {' '.join(sorted(found))}" for name, found in keys.items()] == expected


def test_killed_without_warning_and_resumed_ends_bit_for_bit_the_same(server, corpus, uninterrupted, tmp_path):
    arguments = tiny_run.flags(corpus, save=tmp_path, load=tmp_path, **MOE)
    job = server.start(2, arguments, Death(rank=1, phase="step", call=6))
    assert 0 not in job.wait()
    server.train(2, arguments)
    assert tiny_run.records(tmp_path, "run")[-1]["resumed_at_tokens"] in (3 * 16 * 32, 6 * 16 * 32)
    assert tiny_run.curve(tmp_path) == tiny_run.curve(uninterrupted)
    assert tiny_run.records(tmp_path, "valid")[-1]["loss"] == tiny_run.records(uninterrupted, "valid")[-1]["loss"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_ends_the_run(server, corpus, tmp_path, number):
    arguments = tiny_run.flags(corpus, save=tmp_path, load=tmp_path, save_interval=0, train_tokens="1M", **MOE)
    job = server.start(2, arguments)
    server.listen_until(lambda: "step      2" in job.output(0))
    for pid in job.pids:
        os.kill(pid, number)
    assert job.wait() == [0, 0], job.output()
    assert f"stopped: {number.name}" in job.output()
    assert len(list(tmp_path.glob("step_*"))) == 1


def test_an_interrupt_ends_the_run_without_a_traceback(corpus):
    command = [sys.executable, str(tiny_run.ROOT / "pretrain_gpt_moe.py"), *tiny_run.flags(corpus, train_tokens="1M")]
    process = subprocess.Popen(
        command, env=tiny_run.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for("step      2", process)
    process.send_signal(signal.SIGINT)
    output = output_until_the_end(process, 30)
    assert process.returncode == 1
    assert output.endswith("error: interrupted, without a save; SIGTERM and SIGUSR1 have a run save before it ends\n")
    assert "Traceback" not in output


@pytest.mark.parametrize(("processes", "expert_parallel"), [(1, 1), (4, 4), (4, 1)])
def test_other_layouts_resume_the_same_run(server, corpus, uninterrupted, tmp_path, processes, expert_parallel):
    arguments = tiny_run.flags(
        corpus, save=tmp_path, load=uninterrupted / "step_00000003", num_experts=4,
        moe_expert_parallel_size=expert_parallel,
    )  # fmt: skip
    server.train(processes, arguments)
    expected = {tokens: value for tokens, value in tiny_run.curve(uninterrupted).items() if tokens > 3 * 16 * 32}
    found = tiny_run.curve(tmp_path)
    assert found.keys() == expected.keys()
    for tokens, value in expected.items():
        torch.testing.assert_close(torch.tensor(found[tokens]), torch.tensor(value), rtol=1e-5, atol=1e-5)


@pytest.mark.exhaustive  # tests/engine/optim/test_groups.py checks the order of groups
def test_each_moe_layer_may_have_its_own_degree(corpus, tmp_path):
    """Each process has its own order of sets of names here, unlike forked ones: optimizer groups must not follow it."""
    degrees = ["--num-layers", "4", "--num-experts", "4", "8", "--moe-expert-parallel-size", "2", "4"]
    done = tiny_run.train(4, [*tiny_run.flags(corpus, save=tmp_path), *degrees])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "expert parallel 2, 4" in done.stdout
    assert [record["expert_parallel"] for record in tiny_run.records(tmp_path, "run")] == [[2, 4]]
    assert tiny_run.records(tmp_path, "train")[-1]["loss"] < tiny_run.records(tmp_path, "train")[0]["loss"]


@pytest.mark.exhaustive
def test_the_deepspeed_launcher_starts_the_same_run(corpus, uninterrupted, tmp_path):
    launcher = Path(sys.executable).parent / "deepspeed"
    arguments = tiny_run.flags(corpus, save=tmp_path, **MOE)
    command = [launcher, "--num_gpus=2", f"--master_port={free_port()}", "pretrain_gpt_moe.py", *arguments]
    done = subprocess.run(
        [str(word) for word in command],
        env=tiny_run.environment() | {"PATH": f"{launcher.parent}:{os.environ['PATH']}"},
        cwd=tiny_run.ROOT, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert tiny_run.curve(tmp_path) == tiny_run.curve(uninterrupted)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_asynchronous_saving_ramp_up_and_exit_tokens(server, corpus, tmp_path):
    arguments = tiny_run.flags(
        corpus, save=tmp_path, load=tmp_path, async_save=True, keep_last=2, rampup_batch_size=(4, 4, 48),
        save_interval=1, **MOE,
    )  # fmt: skip
    assert "stopped: --exit-tokens" in server.train(2, [*arguments, "--exit-tokens", "2000"]).output()
    server.train(2, arguments)
    tokens = sorted(tiny_run.curve(tmp_path))
    assert tokens[:4] == [128, 256, 384, 512]
    assert tokens[-1] - tokens[-2] == 16 * 32
    assert len(list(tmp_path.glob("step_*"))) == 2


def test_mistakes_are_told_before_training(server, corpus, uninterrupted, tmp_path):
    cases = {
        "5 experts": ({"num_experts": 5, "moe_expert_parallel_size": 2}, "5"),
        "save into another run": ({"save": uninterrupted}, "add --load"),
        "another model": ({"load": uninterrupted, "num_experts": 4, "hidden_size": 64}, "--hidden-size"),
        "user config": ({"deepspeed_config": tmp_path / "ds.json"}, "gradient_clipping"),
    }
    (tmp_path / "ds.json").write_text(json.dumps({"gradient_clipping": 0.1, "zero_optimization": {"stage": 1}}))
    for name, (changes, message) in cases.items():
        arguments = tiny_run.flags(corpus, **({"save": tmp_path / "save"} | changes))
        arguments = [word.replace("--deepspeed-config", "--deepspeed_config") for word in arguments]
        job = server.start(1, arguments)
        assert job.wait() != [0], name
        assert message in job.output(), job.output()
        assert "Traceback" not in job.output(), name


def test_a_loss_that_stays_not_finite_ends_the_run_and_names_the_last_checkpoint(server, corpus, tmp_path):
    arguments = tiny_run.flags(
        corpus, save=tmp_path, lr=1e30, lr_warmup_tokens=0, clip_grad=0, max_skipped_updates=2, train_tokens="1M"
    )
    job = server.start(1, arguments)
    assert job.wait() == [1], job.output()
    assert "3 updates in a row" in job.output()


def lonely_rank_1(arguments: list[str]) -> subprocess.CompletedProcess:
    """The first process of a second node whose first node never starts."""
    place = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    return subprocess.run(
        [sys.executable, str(tiny_run.ROOT / "pretrain_gpt_moe.py"), *arguments],
        env=tiny_run.environment() | place, cwd=tiny_run.ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_what_only_another_node_lacks_is_told_there(corpus, tmp_path):
    done = lonely_rank_1(tiny_run.flags(corpus, data_path=tmp_path / "nothing"))
    assert done.returncode == 2
    assert f"error on {socket.gethostname()}: --data-path" in done.stderr


def test_a_first_rank_that_never_comes_is_named(corpus):
    done = lonely_rank_1(tiny_run.flags(corpus, distributed_timeout_minutes=0.05))
    assert done.returncode == 1
    assert "error on rank 1: rank 0 did not come to 127.0.0.1:" in done.stderr
    assert "Traceback" not in done.stderr


def test_determinism_and_graphs_that_cannot_be_had_are_refused_at_the_start(corpus, tmp_path, monkeypatch, capsys):
    from megatron.config.flags import parse_args
    from megatron.training.pretrain import pretrain
    from megatron.training.signals import StopSignals

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NCCL_ALGO", "NVLS")
    assert pretrain(parse_args(tiny_run.flags(corpus, save=tmp_path, deterministic=True)), StopSignals()) == 2
    assert "--deterministic: NCCL_ALGO is 'NVLS'" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    graphs = tiny_run.flags(corpus, save=tmp_path, device=None, fp32=False, bf16=True, cuda_graphs=True)
    assert pretrain(parse_args(graphs), StopSignals()) == 2
    assert "--cuda-graphs needs a GPU" in capsys.readouterr().err
