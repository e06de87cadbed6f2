"""The scripts for SLURM where there is none: commands named as SLURM's play its part. tests/slurm/ has the real one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples_moe"
MOE = FOLDER / "pretrain_gpt_350M_MoE128.sh"
CHAIN, ARRAY, TASK = (FOLDER / "slurm" / name for name in ("chain.sh", "array.sh", "task.sh"))


@pytest.fixture
def slurm(tmp_path):
    """An environment in which SLURM's commands note their words in ``called`` and answer as in a running batch job.

    srun ends with ``SRUN_STATUS`` and, if ``ENDED`` says why, leaves the record that the trainer would.
    """
    bin = tmp_path / "bin"
    bin.mkdir()
    programs = {
        "scontrol": """case "$*" in
            *hostnames*) printf 'node7\\nnode8\\n' ;;
            *'show job'*)
                echo "JobId=77 JobState=${STATE:-RUNNING} Requeue=${MAY:-1} BatchFlag=1 NumNodes=2"
                echo "   Command=${SCRIPT_OF_JOB:-} --seed 3" ;;
            esac""",
        "srun": """if [[ -n "${ENDED:-}" ]]; then mkdir -p run; echo "{\\"reason\\": \\"$ENDED\\"}" >run/ended.json; fi
            exit "${SRUN_STATUS:-0}" """,
        "sbatch": 'if [[ "$*" == *refused* ]]; then exit 1; fi; echo "$(wc -l <"$CALLED");cluster"',
    }
    for name, text in programs.items():
        head = f'#!/usr/bin/env bash\nprintf "%s %s\\n" {name} "$*" >>"$CALLED"\n'
        (bin / name).write_text(head + text + "\n")
        (bin / name).chmod(0o755)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    (tmp_path / "called").touch()
    return inherited | {
        **{"PATH": f"{bin}:{os.environ['PATH']}", "CALLED": str(tmp_path / "called"), "PYTHON": sys.executable},
        **{"SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "4", "SAVE": "run"},
        **{"SLURM_JOB_NODELIST": "node[7-8]", "DATA_PATH": "corpus"},
    }


def start(script: Path, environment: dict[str, str], *words: str, **variables: object):
    folder = Path(environment["CALLED"]).parent
    environment = environment | {name: str(value) for name, value in variables.items()}
    return subprocess.run(
        ["bash", str(script), *words], env=environment, cwd=folder, capture_output=True, text=True, timeout=60
    )


def called(environment: dict[str, str], name: str) -> list[str]:
    """The words with which a command was called, each time."""
    lines = Path(environment["CALLED"]).read_text().splitlines()
    return [line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} ")]


# ------------------------------------------------------------------------------------------------------ jobs, requeued


@pytest.mark.parametrize(
    ("happens", "requeued"),
    [
        ({"ENDED": "SIGUSR1"}, True),
        ({"ENDED": "the time limit"}, True),
        ({"ENDED": "SIGTERM"}, False),
        ({"ENDED": "all tokens are trained on"}, False),
        ({}, False),
        ({"SRUN_STATUS": 1}, False),
        ({"ENDED": "SIGUSR1", "REQUEUE": 0}, False),
        ({"ENDED": "SIGUSR1", "MAY": 0}, False),
        ({"ENDED": "SIGUSR1", "STATE": "CANCELLED"}, False),
    ],
    ids=str,
)
def test_what_makes_a_job_requeue_itself(slurm, happens, requeued):
    done = start(MOE, slurm, **happens)
    assert done.returncode == happens.get("SRUN_STATUS", 0), done.stderr
    assert [words for words in called(slurm, "scontrol") if words.startswith("requeue")] == ["requeue 77"] * requeued


def test_a_job_is_requeued_once_from_each_checkpoint(slurm):
    latest = Path(slurm["CALLED"]).parent / "run" / "latest"
    latest.parent.mkdir()
    requeues = []
    for checkpoint in (None, None, "step_00000010", "step_00000010", "step_00000020"):
        if checkpoint:
            latest.write_text(checkpoint)
        done = start(MOE, slurm, ENDED="SIGUSR1")
        requeues.append("requeueing the job" in done.stdout)
        assert requeues[-1] or "not requeued: no checkpoint was made" in done.stderr
    assert requeues == [True, False, True, False, True]


def test_a_task_of_an_array_requeues_itself_and_not_the_array(slurm):
    start(MOE, slurm, ENDED="SIGUSR1", SLURM_ARRAY_JOB_ID=77, SLURM_ARRAY_TASK_ID=3)
    assert called(slurm, "scontrol")[-1] == "requeue 77_3"


def test_a_finished_run_is_not_started(slurm):
    run = Path(slurm["CALLED"]).parent / "run"
    run.mkdir()
    (run / "latest").write_text("step_00000002")
    record = {"reason": "all tokens are trained on", "step": 2, "samples": 512, "tokens": 512 * 2048}
    (run / "ended.json").write_text(json.dumps(record))
    done = start(MOE, slurm, TRAIN_TOKENS="1M")
    assert (done.returncode, called(slurm, "srun")) == (0, [])
    assert "finished" in done.stdout
    assert start(CHAIN, slurm, "3", str(MOE), TRAIN_TOKENS="1M").returncode == 0
    assert called(slurm, "sbatch") == []
    start(MOE, slurm, TRAIN_TOKENS="2M")
    assert len(called(slurm, "srun")) == 1


@pytest.mark.parametrize("launcher", ["srun", "deepspeed"])
def test_a_folder_that_cannot_be_written_is_named(slurm, launcher):
    (Path(slurm["CALLED"]).parent / "file").touch()
    done = start(MOE, slurm, SAVE="file/run", LAUNCHER=launcher)
    assert (done.returncode, called(slurm, "srun")) == (2, [])
    assert "error: SAVE is 'file/run', and " in done.stderr
    assert "examples_moe/common.sh: line" not in done.stderr, "bash's own words"


def test_the_deepspeed_launcher_gets_a_hostfile(slurm):
    done = start(MOE, slurm, LAUNCHER="deepspeed")
    assert done.returncode == 0, done.stderr
    assert (Path(slurm["CALLED"]).parent / "run" / "hostfile").read_text() == "node7 slots=4\nnode8 slots=4\n"
    (words,) = called(slurm, "srun")
    assert "--hostfile run/hostfile --no_ssh --master_addr node7 --master_port 20077" in words


# ------------------------------------------------------------------------------------------------------ chains, arrays


def test_each_link_waits_for_the_one_before(slurm):
    done = start(CHAIN, slurm, "3", "--time", "1:00:00", str(MOE), "--run-name", "a b")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "link 1 of 3: job 1\nlink 2 of 3: job 2\nlink 3 of 3: job 3\n"
    first, second, third = called(slurm, "sbatch")
    assert first == f"--parsable --time 1:00:00 {MOE} --run-name a b"
    after = "--dependency afterany:{} --kill-on-invalid-dep=yes"
    assert second == f"--parsable --time 1:00:00 {after.format(1)} {MOE} --run-name a b"
    assert after.format(2) in third


def test_a_dry_run_of_a_chain_submits_nothing(slurm):
    done = start(CHAIN, slurm, "2", str(MOE), DRY_RUN=1, DEPENDENCY="afterok")
    assert called(slurm, "sbatch") == []
    assert "--dependency afterok:JOB_OF_LINK_1" in done.stdout.splitlines()[1]


@pytest.mark.parametrize(
    ("words", "variables", "said"),
    [
        ((), {}, "LINKS is ''"),
        (("0", str(MOE)), {}, "LINKS is '0'"),
        (("2",), {}, "no launch script among the arguments"),
        (("2", "--time", "1:00:00", "missing.sh"), {}, "no launch script among the arguments"),
        (("2", str(FOLDER / "quickstart.sh")), {}, "is not a launch script"),
        (("2", str(MOE)), {"DEPENDENCY": "after"}, "expected afterany or afterok"),
        (("2", str(MOE)), {"DRY_RUN": "yes"}, "DRY_RUN is 'yes'"),
        (("2", str(MOE)), {"DATA_PATH": ""}, "error: --data-path is missing (launch scripts: DATA_PATH)"),
        (("2", str(MOE), "--nonsense", "3"), {}, "unknown flag --nonsense"),
        (("2", str(MOE)), {"TP": "x"}, "TP is 'x'"),
        (("2", "--qos=refused", str(MOE)), {}, "link 1 of 2 could not be submitted"),
    ],
)
def test_mistakes_in_a_chain_are_named(slurm, words, variables, said):
    done = start(CHAIN, slurm, *words, **variables)
    assert done.returncode == 2
    assert said in done.stderr
    assert "job" not in done.stdout, "nothing is submitted"


def test_help_of_a_chain(slurm):
    done = start(CHAIN, slurm, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "DEPENDENCY" in done.stdout


@pytest.mark.parametrize(("name", "last"), [("array.sh", "--help"), ("preprocess_array.sh", "PYTHON.")])
def test_help_of_an_array(name, last):
    done = subprocess.run(["bash", FOLDER / "slurm" / name, "--help"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "sbatch" in done.stdout
    assert done.stdout.split()[-1] == last
    assert "#" not in done.stdout


def test_tasks_of_the_array_are_the_pairs(slurm):
    shown = []
    for task in range(4):
        variables = {"SLURM_ARRAY_JOB_ID": 77, "SLURM_ARRAY_TASK_ID": task, "SCRIPT_OF_JOB": ARRAY}
        done = start(ARRAY, slurm, RATES="1e-4 2e-4", SEEDS="1 2", DRY_RUN="command", **variables)
        words = done.stdout.split()
        shown.append(tuple(words[words.index(flag) + 1] for flag in ("--lr", "--seed", "--save", "--run-name")))
    assert shown[1] == ("1e-4", "2", "run/lr1e-4-seed2", "lr1e-4-seed2")
    assert shown[2] == ("2e-4", "1", "run/lr2e-4-seed1", "lr2e-4-seed1")
    assert len(set(shown)) == 4
    done = start(ARRAY, slurm, RATES="1e-4", SEEDS="1 2", SLURM_ARRAY_TASK_ID=2)
    assert done.returncode == 2
    assert "sbatch --array=0-1" in done.stderr
    assert "submit with: sbatch" in start(ARRAY, slurm).stderr


# ---------------------------------------------------------------------------------------------- what srun starts a task


TRAINER = "import signal,sys,time; {}; time.sleep({}); signal.signal({}, lambda *a: sys.exit(5)); time.sleep(30)"


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
@pytest.mark.parametrize("generations", [0, 1, 2])
def test_a_signal_waits_until_the_trainer_hears_it(tmp_path, name, generations):
    started = tmp_path / "started"
    trainer = TRAINER.format(f"open({str(started)!r}, 'w').close()", 0.5, f"signal.{name}")
    command = [sys.executable, "-c", trainer]
    for _ in range(generations):
        command = [sys.executable, "-c", "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))", *command]
    task = subprocess.Popen(["bash", str(TASK), str(generations), *command])
    end = time.monotonic() + 20
    while not started.exists() and time.monotonic() < end:
        time.sleep(0.01)
    task.send_signal(getattr(signal, name))
    assert task.wait(20) == 5


@pytest.mark.parametrize(("command", "status"), [("exit 3", 3), ("kill -KILL $$", 137), ("true", 0)])
def test_the_status_is_the_commands(command, status):
    assert subprocess.run(["bash", str(TASK), "0", "bash", "-c", command], timeout=20).returncode == status
