"""Run the jobs of one step of a scaling ladder, side by side: ``train.py {rates,train,time} --out DIR``.

What is finished is not run again, and what was stopped goes on where it was saved. A job's output, metrics and
checkpoints are in a folder of its own in ``DIR/runs``.
"""

import argparse
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import ladder
import torch

from megatron.planning.flops import model_flops_per_token
from megatron.planning.memory import memory
from megatron.training.exit_record import finished

ROOT = Path(__file__).parents[2]
STATUS_SECONDS = 30
USABLE = 0.8  # of a GPU's memory
SIDE_BY_SIDE = 6  # on one GPU: more do not fill it better


class JobError(RuntimeError):
    """A job that failed, with the end of its output."""


class Running:
    """A job that has been started on one GPU, or on the CPU."""

    def __init__(self, job: ladder.Job, gpu: int | None, threads: int) -> None:
        self.job, self.gpu = job, gpu
        self.log = job.folder / "output.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        if gpu is not None:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu] if visible else str(gpu)
        with self.log.open("a") as log:
            command = [sys.executable, str(ROOT / "pretrain_gpt_moe.py"), *job.flags]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

    def share(self) -> float:
        """Of its tokens, what it has been trained on."""
        with contextlib.suppress(OSError, ValueError, KeyError, IndexError):
            line = json.loads((self.job.folder / "metrics.jsonl").read_text().splitlines()[-1])
            return line["tokens"] / line["train_tokens"]
        return 0.0


def run_jobs(jobs: Sequence[ladder.Job], found: ladder.Ladder, most: int | None) -> None:
    """Run jobs until all are finished.

    Args:
        most: side by side on each GPU, or on the CPU; None for as many as fit.

    Raises:
        JobError: one failed; the others have been stopped, and saved.
    """
    gpus: list[int | None] = list(range(torch.cuda.device_count())) or [None]
    cores = len(os.sched_getaffinity(0))
    most = most or max(1, min(SIDE_BY_SIDE if gpus[0] is not None else cores, cores // len(gpus)))
    threads = max(1, cores // (most * len(gpus)))
    waiting = [job for job in jobs if finished(job.config) is None]
    work = {job.name: _flops(found, job) for job in waiting}
    peak = {job.name: memory(job.config, 1, found.scale.vocabulary).peak for job in waiting}
    total, begin, said = sum(work.values()), time.monotonic(), time.monotonic()
    print(f"{len(jobs)} runs, {len(jobs) - len(waiting)} of them finished before", flush=True)
    running: list[Running] = []
    done = 0.0
    try:
        while waiting or running:
            for each in [each for each in running if each.process.poll() is not None]:
                running.remove(each)
                if each.process.returncode:
                    end = "".join(each.log.read_text(errors="replace").splitlines(keepends=True)[-15:])
                    raise JobError(f"{each.job.name} failed with status {each.process.returncode}; {each.log}:\n{end}")
                done += work[each.job.name]
                losses = ladder.validation_losses(each.job.folder)
                words = f"validation loss {losses[max(losses)]:.4f}" if losses else "done"
                print(f"{each.job.name}: {words}", flush=True)
            for gpu in gpus:
                mine = [each for each in running if each.gpu == gpu]
                room = math.inf if gpu is None else USABLE * torch.cuda.get_device_properties(gpu).total_memory
                room -= sum(peak[each.job.name] for each in mine)
                while waiting and len(mine) < most and (not mine or peak[waiting[0].name] <= room):
                    room -= peak[waiting[0].name]
                    mine.append(Running(waiting.pop(0), gpu, threads))
                    running.append(mine[-1])
            if time.monotonic() - said > STATUS_SECONDS:
                said = time.monotonic()
                ahead = done + sum(each.share() * work[each.job.name] for each in running)
                eta = f"; eta {(said - begin) * (total / ahead - 1) / 60:.0f} min" if ahead else ""
                words = ", ".join(f"{each.job.name} {each.share():.0%}" for each in running)
                print(f"{words}; {len(waiting)} to come{eta}", flush=True)
            time.sleep(0.5)
    finally:
        for each in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(each.process.pid, signal.SIGTERM)  # it finishes its update and saves
        for each in running:
            each.process.wait()


def _flops(found: ladder.Ladder, job: ladder.Job) -> float:
    config = job.config
    tokens = config.checkpoint.exit_tokens or config.training.train_tokens
    return tokens * model_flops_per_token(config.model, config.moe, found.scale.vocabulary)


def best_rates(found: ladder.Ladder) -> dict[str, float]:
    """The learning rate of each model whose short run ended with the lowest validation loss."""
    best: dict[str, tuple[float, float]] = {}
    for job in found.rate_jobs():
        losses = ladder.validation_losses(job.folder)
        this = (losses[max(losses)], job.config.optimizer.lr)
        best[job.model.name] = min(this, best.get(job.model.name, this))
    return {name: rate for name, (_, rate) in best.items()}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("rates", "train", "time"))
    ladder.add_options(parser)
    parser.add_argument("--jobs", default="auto", help="Runs side by side on each GPU, or on the CPU (default: auto).")
    args = parser.parse_args(argv)
    if args.jobs != "auto" and not (args.jobs.isdigit() and int(args.jobs)):
        parser.error(f"--jobs {args.jobs}: give a number from 1 on, or auto")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 if a run failed."""
    args = parse_args(argv)
    try:
        found = ladder.load_ladder(args.out, ladder.SCALES[args.scale], args.tokens)
        most = None if args.jobs == "auto" else int(args.jobs)
        if args.step == "rates":
            run_jobs(list(found.rate_jobs()), found, most)
            (args.out / ladder.RATES).write_text(json.dumps(best_rates(found), indent=2) + "\n")
        elif args.step == "train":
            run_jobs(list(found.main_jobs()), found, most)
        else:
            run_jobs(list(found.time_jobs()), found, 1)
    except (ValueError, OSError, JobError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run this again to go on", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
