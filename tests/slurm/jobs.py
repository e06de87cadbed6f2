"""A SLURM cluster of two nodes on this machine, and jobs on it that are the launch scripts with a tiny model."""

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_run import ROOT, SEQ, records

SCRIPT = ROOT / "examples_moe" / "pretrain_gpt_350M_MoE128.sh"
CLUSTER = ROOT / "tests" / "slurm" / "cluster.sh"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "ip", "nsenter")
NODES = ("node1", "node2")
TASKS = 2  # of a node
BATCH = 8
UPDATES = 300
TOKENS = UPDATES * BATCH * SEQ
PATIENCE = 150  # s for anything that has to happen, the imports of four processes on few cores included
FLAGS = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --num-experts 4 --fp32 --lr 5e-3 "
    f"--lr-warmup-tokens 2560 --lr-decay-tokens {TOKENS} --eval-interval 100 --eval-iters 1 --log-interval 1 "
    "--save-interval 100 --split 90,10,0 --num-workers 0 --device cpu --distributed-backend gloo"
)
TORCHRUN = {"LAUNCHER": "torchrun", "PYTHON": sys.executable}
# Notes who it is, and becomes the interpreter.
INTERPRETER = f"""#!/usr/bin/env bash
printf '%s\\n' "${{SLURM_RESTART_COUNT:-0}} ${{RANK:-$SLURM_PROCID}} $(hostname) $$" >>"$SEEN"
exec {sys.executable} "$@"
"""


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Start a cluster; what comes back is the environment in which SLURM's commands reach it.

    Skips the test where SLURM is not installed or this user cannot make network namespaces.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
    environment |= {"PATH": f"{environment['PATH']}:/usr/sbin:/sbin", "CLUSTER_DIR": str(folder)}
    missing = [name for name in PROGRAMS if shutil.which(name, path=environment["PATH"]) is None]
    if missing:
        pytest.skip(f"SLURM is not installed ({', '.join(missing)} missing): bash tests/slurm/cluster.sh install")
    if os.geteuid() != 0:
        pytest.skip("the nodes of the SLURM cluster are network namespaces: root is needed")
    environment["SLURM_CONF"] = str(folder / "slurm.conf")
    try:
        # its daemons inherit a pipe, which would then never end
        with (folder / "start.log").open("w") as log:
            started = subprocess.run(
                ["bash", str(CLUSTER), "start", str(len(NODES))], env=environment, stdout=log, stderr=log, timeout=120
            )
        said = (folder / "start.log").read_text()
        if "no network namespaces here" in said:
            pytest.skip(said.strip())
        assert started.returncode == 0, said
        yield environment
    finally:
        subprocess.run(["bash", str(CLUSTER), "stop"], env=environment, capture_output=True, timeout=120)


def eventually(what: str, true: Callable[[], bool], seconds: float = PATIENCE, job: "Job | None" = None) -> float:
    """Wait until something is true; returns the seconds that took. What the job said is in the error."""
    start = time.monotonic()
    while not true():
        if time.monotonic() - start > seconds:
            pytest.fail(f"after {seconds} s still not: {what}\n{job.log() if job else ''}")
        time.sleep(0.1)
    return time.monotonic() - start


@dataclasses.dataclass
class Job:
    """A submitted launch script. ``folder`` is where it was submitted, ``run`` where it saves and logs."""

    number: int
    folder: Path
    environment: dict[str, str]

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def slurm(self, *words: str) -> str:
        """Run one of SLURM's commands; returns what it printed."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def shown(self, name: str) -> str:
        """A field of ``scontrol show job``."""
        fields = self.slurm("scontrol", "--oneliner", "show", "job", str(self.number)).split()
        return next(field.partition("=")[2] for field in fields if field.startswith(f"{name}="))

    def log(self) -> str:
        """What the job has printed so far, in the file that the script's header names."""
        path = self.folder / f"350M_MoE128-{self.number}.log"
        return path.read_text() if path.exists() else "(no log yet)"

    def wait(self, seconds: float = PATIENCE) -> str:
        """Wait for the end of the job on all nodes; returns its state."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        eventually("job over", lambda: self.shown("JobState") in over, seconds, self)
        return self.shown("JobState")

    def seen(self, restart: int = 0) -> dict[int, tuple[str, int]]:
        """Rank -> host name and process of the ranks that were started, after that many requeues."""
        path = self.folder / "seen"
        lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        return {int(rank): (host, int(pid)) for count, rank, host, pid in lines if int(count) == restart}

    def train_records(self) -> list[dict]:
        """The training records so far, but for a line that is being written."""
        try:
            return records(self.run, "train")
        except (FileNotFoundError, ValueError):
            return []

    def wait_for_updates(self, count: int) -> None:
        """Wait until that many updates were made."""
        eventually(f"{count} updates", lambda: len(self.train_records()) >= count, job=self)

    def assert_no_process_is_left(self, seconds: float = 10) -> None:
        """No rank that was ever seen runs."""
        eventually("all processes ended", lambda: not any(runs(pid) for _, pid in self.pids()), seconds, self)

    def pids(self) -> list[tuple[str, int]]:
        """Host name and process of every rank that was ever started."""
        return [place for restart in range(3) for place in self.seen(restart).values()]


def runs(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def submit(folder: Path, corpus: Path, environment: dict[str, str], *words: str, **variables: object) -> Job:
    """``sbatch`` the script for two nodes of two tasks; ``words`` are more of sbatch's flags.

    A second job in the same folder goes on where the first one ended.
    """
    folder.mkdir(exist_ok=True)
    interpreter = folder / "interpreter"
    interpreter.write_text(INTERPRETER)
    interpreter.chmod(0o755)
    settings = {
        **{"DATA_PATH": corpus / "text_text_document", "TOKENIZER_TYPE": "HFTokenizer"},
        **{"TOKENIZER_MODEL": corpus / "tokenizer.json", "MICRO_BATCH": 2, "GLOBAL_BATCH": BATCH},
        **{"TRAIN_TOKENS": TOKENS, "SAVE": "run", "EXTRA_ARGS": FLAGS, "PYTHON": interpreter, "SEEN": folder / "seen"},
        "PYTHON_EXEC": interpreter,  # torchrun's name for the interpreter of the ranks that it starts
    } | variables
    environment = environment | {name: str(value) for name, value in settings.items()}
    asked = ["--nodes", str(len(NODES)), "--ntasks-per-node", str(TASKS), "--cpus-per-task", "2", "--gres", "gpu:2"]
    done = subprocess.run(
        ["sbatch", "--parsable", "--time", "30", *asked, *words, str(SCRIPT), "--seed", "3"],
        **{"env": environment, "cwd": folder, "capture_output": True, "text": True, "timeout": 60},
    )
    assert done.returncode == 0, done.stderr
    return Job(int(done.stdout), folder, environment)


def kill(pid: int) -> None:
    """What the kernel does to a process for which it has no memory left."""
    os.kill(pid, signal.SIGKILL)
