"""A SLURM cluster on this machine, and jobs on two of its nodes that are the launch scripts with a tiny model."""

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
from distributed.started import descendants, state
from tiny_run import ROOT, SEQ, curve, records

SCRIPT = ROOT / "examples_moe" / "pretrain_gpt_350M_MoE128.sh"
CLUSTER = ROOT / "tests" / "slurm" / "cluster.sh"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "ip", "nsenter")
NODES = ("node1", "node2")
SPARE = "node3"
TASKS = 2  # of a node
HOSTS = {rank: NODES[rank // TASKS] for rank in range(TASKS * len(NODES))}
BATCH = 8
UPDATES = 120
TOKENS = UPDATES * BATCH * SEQ
PATIENCE = 150  # s for anything that has to happen, the imports of four processes on few cores included
FLAGS = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --num-experts 4 --fp32 --lr 5e-3 "
    f"--lr-warmup-tokens 2560 --lr-decay-tokens {TOKENS} --eval-interval 40 --eval-iters 1 --log-interval 1 "
    "--save-interval 40 --split 90,10,0 --num-workers 0 --device cpu --distributed-backend gloo"
)
ENDLESS = {"TRAIN_TOKENS": 25 * TOKENS}  # minutes
SRUN = {"LAUNCHER": "srun"}
TORCHRUN = {"LAUNCHER": "torchrun", "PYTHON": sys.executable}
DEEPSPEED = {"LAUNCHER": "deepspeed", "PYTHON": sys.executable}
# Notes who it is, unless the script only asks it for torch, and becomes the interpreter. PYTHON_EXEC
# is torchrun's name for that of the ranks.
INTERPRETER = f"""#!/usr/bin/env bash
[[ "$1" == -c ]] || printf '%s\\n' "$SLURM_JOB_ID ${{SLURM_RESTART_COUNT:-0}} ${{RANK:-$SLURM_PROCID}} $(hostname) $$ \\
${{LOCAL_RANK:-$SLURM_LOCALID}} $CUDA_VISIBLE_DEVICES" >>"$SEEN"
exec {sys.executable} "$@"
"""
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


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
        said = control(environment, "start", str(len(NODES) + 1), check=False)
        if "no network namespaces here" in said:
            pytest.skip(said.strip())
        assert "error" not in said, said
        yield environment
    finally:
        control(environment, "stop", check=False)


def control(environment: dict[str, str], *words: str, check: bool = True) -> str:
    """Run cluster.sh; returns what it said."""
    said = Path(environment["CLUSTER_DIR"]) / "said.log"
    with said.open("w") as log:  # its daemons inherit a pipe, which would then never end
        done = subprocess.run(["bash", str(CLUSTER), *words], env=environment, stdout=log, stderr=log, timeout=120)
    assert done.returncode == 0 or not check, said.read_text()
    return said.read_text()


def slurm(environment: dict[str, str], *words: str) -> str:
    """Run one of SLURM's commands; returns what it printed."""
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{words}: status {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


def eventually(what: str, true: Callable[[], bool], seconds: float = PATIENCE, job: "Job | None" = None) -> None:
    """Wait until something is true. What the job said, and how its processes are, is in the error."""
    start = time.monotonic()
    while not true():
        if time.monotonic() - start > seconds:
            pytest.fail(f"after {seconds} s still not: {what}\n{'' if job is None else job.log() + job.states()}")
        time.sleep(0.1)


@dataclasses.dataclass
class Job:
    """A submitted launch script. ``folder`` is where it was submitted, ``run`` where it saves and logs."""

    number: int
    folder: Path
    environment: dict[str, str]
    name: str = "350M_MoE128-{}.log"
    run_name: str = "run"

    @property
    def run(self) -> Path:
        return self.folder / self.run_name

    def slurm(self, *words: str) -> str:
        """Run one of SLURM's commands; returns what it printed."""
        return slurm(self.environment, *words)

    def shown(self, name: str) -> str:
        """A field of ``scontrol show job``."""
        fields = self.slurm("scontrol", "--oneliner", "show", "job", str(self.number)).split()
        return next(field.partition("=")[2] for field in fields if field.startswith(f"{name}="))

    def log(self) -> str:
        """What the job has printed so far, in the file that the script's header names."""
        path = self.folder / self.name.format(self.number)
        return path.read_text(errors="replace") if path.exists() else "(no log yet)"

    def signal(self, name: str) -> None:
        """What SLURM does before the time limit: the signal goes to the tasks and not to the batch script."""
        self.slurm("scancel", "--signal", name, str(self.number))

    def wait(self, seconds: float = PATIENCE) -> str:
        """Wait for the end of the job on all nodes; returns its state."""
        eventually("job over", lambda: self.shown("JobState") in OVER, seconds, self)
        return self.shown("JobState")

    def wait_for_restart(self, number: int = 1) -> None:
        """Wait until the job has been put back into the queue so many times and runs again."""
        eventually(
            f"restart {number}",
            lambda: (self.shown("Restarts"), self.shown("JobState")) == (str(number), "RUNNING"),
            job=self,
        )

    def notes(self) -> list[list[str]]:
        """What the interpreters that this job started have noted of themselves, the restart first."""
        path = self.folder / "seen"
        lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        return [rest for number, *rest in lines if int(number) == self.number and len(rest) >= 4]

    def seen(self, restart: int = 0) -> dict[int, tuple[str, int]]:
        """Rank -> host name and process of the ranks that were started, after that many requeues."""
        return {int(rank): (host, int(pid)) for count, rank, host, pid, *_ in self.notes() if int(count) == restart}

    def states(self) -> str:
        """How its processes are, and those that they have started."""
        ranks = [int(pid) for _, _, _, pid, *_ in self.notes()]
        return "\n".join(state(pid) for rank in ranks for pid in (rank, *descendants(rank)))

    def hosts(self, restart: int = 0) -> dict[int, str]:
        """Rank -> host name."""
        return {rank: host for rank, (host, _) in self.seen(restart).items()}

    def stops(self) -> list[str]:
        """Why the run stopped, each time."""
        return [record["reason"] for record in records(self.run, "stop")]

    def resumed_at(self) -> list[int | None]:
        """Where training began, each time that it began."""
        return [record["resumed_at_tokens"] for record in records(self.run, "run")]

    def train_records(self) -> list[dict]:
        """The training records so far, but for a line that is being written."""
        try:
            return records(self.run, "train")
        except (FileNotFoundError, ValueError):
            return []

    def wait_for_updates(self, count: int) -> None:
        """Wait until that many updates were made, those that were made again included."""
        eventually(f"{count} updates", lambda: len(self.train_records()) >= count or self._failed(), job=self)
        assert len(self.train_records()) >= count, self.log()

    def _failed(self) -> bool:
        return self.shown("JobState") == "FAILED"

    def assert_no_process_is_left(self, seconds: float = 10) -> None:
        """No rank that was ever seen runs."""
        pids = [int(note[3]) for note in self.notes()]
        assert pids
        eventually("all processes ended", lambda: not any(map(runs, pids)), seconds, self)

    def assert_same_losses(self, reference: "Job", rel: float = 1e-5) -> None:
        """Every update is there, and what stands last of each is what it is without an interruption."""
        got, expected = curve(self.run), curve(reference.run)
        assert len(expected) == UPDATES
        assert sorted(got) == list(expected)
        for tokens, pair in expected.items():
            assert got[tokens] == pytest.approx(pair, rel=rel), tokens


def runs(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def settings(folder: Path, corpus: Path, environment: dict[str, str], **variables: object) -> dict[str, str]:
    """The environment in which a script is submitted from ``folder``."""
    folder.mkdir(exist_ok=True)
    interpreter = folder / "interpreter"
    interpreter.write_text(INTERPRETER)
    interpreter.chmod(0o755)
    given = {
        **{"DATA_PATH": corpus / "text_text_document", "TOKENIZER_TYPE": "HFTokenizer"},
        **{"TOKENIZER_MODEL": corpus / "tokenizer.json", "MICRO_BATCH": 2, "GLOBAL_BATCH": BATCH},
        **{"TRAIN_TOKENS": TOKENS, "SAVE": "run", "EXTRA_ARGS": FLAGS, "PYTHON": interpreter, "SEEN": folder / "seen"},
        "PYTHON_EXEC": interpreter,
    } | variables
    return environment | {name: str(value) for name, value in given.items()}


SIZE = ("--nodes", str(len(NODES)), "--ntasks-per-node", str(TASKS), "--cpus-per-task", "2", "--gres", f"gpu:{TASKS}")
TIME = ("--time", "30")


def submit(
    folder: Path,
    corpus: Path,
    environment: dict[str, str],
    *words: str,
    script: Path = SCRIPT,
    run_name: str = "run",
    **variables: object,
) -> Job:
    """``sbatch`` the script for two nodes of two tasks; ``words`` are more of sbatch's flags. It saves in ``run_name``.

    A second job in the same folder goes on where the first one ended.
    """
    environment = settings(folder, corpus, environment, SAVE=run_name, **variables)
    command = ["sbatch", "--parsable", *TIME, *SIZE, *words, str(script), "--seed", "3"]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return Job(int(done.stdout), folder, environment, run_name=run_name)


def kill(pid: int) -> None:
    """What the kernel does to a process for which it has no memory left."""
    os.kill(pid, signal.SIGKILL)
