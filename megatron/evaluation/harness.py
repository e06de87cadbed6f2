"""A zero-shot evaluation from a checkpoint to files."""

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.task import Task
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from megatron.checkpoint.folder import MANIFEST, hash_file
from megatron.data.tokenizer import Tokenizer
from megatron.evaluation.lm import LONGEST_TEXT, HarnessLM
from megatron.evaluation.output import check_output
from megatron.evaluation.processes import join, load_share
from megatron.evaluation.report import write
from megatron.evaluation.request_log import RequestLog
from megatron.evaluation.tasks import build_tasks
from megatron.inference.load import DTYPES, choose_dtype, find_checkpoint, load_tokenizer
from megatron.inference.special_tokens import SpecialTokens, special_tokens
from megatron.planning.parameters import count_parameters

REQUESTS, SAMPLES = 32 << 20, 256 << 20  # bytes of the six tasks' results, without and with samples, and more


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What to evaluate, on what, and where the results go; the flags of tools/evaluate.py."""

    load: str
    output: str
    tasks: tuple[str, ...]
    data_dir: str | None = None
    limit: int | None = None
    batch_size: int = 8
    max_gen_toks: int | None = None
    device: str | None = None
    dtype: str | None = None
    expert_parallel: int = 1
    name: str | None = None
    log_samples: bool = False
    tokenizer_files: dict[str, str | None] = dataclasses.field(default_factory=dict)


def evaluate(wanted: Evaluation) -> str | None:
    """Run it, or go on with it; returns the Markdown table, on process 0.

    Nothing is written before checkpoint, tokenizer, tasks, data and the place of the results are known to be good.

    Raises:
        ValueError, OSError, CheckpointError: something that is missing, damaged or does not fit; it is named.
    """
    check_output(Path(wanted.output), SAMPLES if wanted.log_samples else REQUESTS)
    source = find_checkpoint(wanted.load)
    tokenizer = load_tokenizer(source, **wanted.tokenizer_files)
    tasks = build_tasks(wanted.tasks, Path(wanted.data_dir) if wanted.data_dir else None)
    _check_lengths(tasks, wanted.max_gen_toks, source.config.model.position_rows)
    processes, device = join(wanted.device, wanted.expert_parallel)
    dtype = choose_dtype(wanted.dtype, device, source)
    about = {
        "checkpoint": source.path.name,
        "contents": hash_file(source.path / MANIFEST),  # which holds the checksums of all other files
        "tokenizer": tokenizer.fingerprint,
        "dtype": dtype,
    }
    path, log = Path(wanted.output) / "requests.jsonl", None
    with contextlib.ExitStack() as stack:
        if processes.rank == 0 and path.exists():  # fails before the model is loaded if its answers are another model's
            log = stack.enter_context(contextlib.closing(RequestLog(path, about)))
        model = load_share(source, processes, device, DTYPES[dtype])
        if processes.rank == 0 and log is None:
            log = stack.enter_context(contextlib.closing(RequestLog(path, about)))
        special = special_tokens(source.meta, tokenizer)
        lm = HarnessLM(model, tokenizer, wanted.batch_size, processes, log, special=special)
        begun = time.perf_counter()
        results = _run(wanted, tasks, lm, device)
        if results is None:
            return None
        results["config"] |= {
            "model_num_parameters": count_parameters(
                source.config.model, source.config.moe, source.meta["vocab_size"]
            ).total,
            "model_revision": source.path.name,
            "model_sha": about["contents"],
            "checkpoint": str(source.path),
            "dtype": dtype,
            "data_dir": wanted.data_dir,
        }
        results |= _about_tokens(tokenizer, special, lm.max_length)
        return write(path.parent, wanted.name or source.path.parent.name, results, begun)


def _about_tokens(tokenizer: Tokenizer, special: SpecialTokens, longest: int) -> dict[str, Any]:
    """What lm-eval's own backends tell of the tokenizer: special tokens and their ids, and the model's positions."""

    def described(token: int) -> list[str]:
        return [tokenizer.decode([token]), str(token)]

    return {
        "tokenizer_pad_token": described(tokenizer.eod),
        "tokenizer_eos_token": described(tokenizer.eod),
        "tokenizer_bos_token": described(special.begin),
        "eot_token_id": tokenizer.eod,
        "max_length": longest,
    }


def _run(wanted: Evaluation, tasks: Sequence[Task], lm: HarnessLM, device: torch.device) -> dict[str, Any] | None:
    """lm-eval's results of all tasks; on process 0."""
    first = lm.processes.rank == 0
    os.environ["DISABLE_MULTIPROC"] = "1"  # else lm-eval forks this process, whose collectives have threads
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for the results alone
        results = simple_evaluate(
            lm,
            tasks=[*tasks],
            task_manager=TaskManager(include_defaults=False),  # the tasks are made; its index takes seconds
            batch_size=wanted.batch_size,
            device=str(device),  # for the record
            limit=wanted.limit,
            log_samples=wanted.log_samples,
            bootstrap_iters=1000 if first else 0,
            gen_kwargs={"max_gen_toks": wanted.max_gen_toks} if wanted.max_gen_toks else None,
        )
    return dict(results) if first and results is not None else None


def _check_lengths(tasks: Sequence[Task], wanted: int | None, positions: int) -> None:
    """Raises ValueError if a task's generated texts leave no room for a prompt."""
    for task in tasks:
        if task.OUTPUT_TYPE == "generate_until":
            count = wanted or (task.config.generation_kwargs or {}).get("max_gen_toks", LONGEST_TEXT)
            if count >= positions:
                raise ValueError(
                    f"{task.config.task}: texts of {count} tokens leave no room for a prompt in the model's "
                    f"{positions} positions; use --max-gen-toks {max(positions // 2, 1)}, for example"
                )
