"""Zero-shot evaluation against lm-eval's own `hf` backend: sample by sample, then the time of both.

    python -m benchmarks.zero_shot --load checkpoints/350M_MoE128 --data-dir eval --limit 200 --processes 1 2 \\
        --json zero_shot.json

The checkpoint is converted to Hugging Face's format, and lm-eval's `hf` backend runs the tasks with it, in one process.
tools/evaluate.py runs the same tasks with the checkpoint itself, once for each number of --processes, which share the
experts. Both get the same documents, batch size and fp32. "difference" is the largest absolute one of all
log-likelihoods; "texts" are the generated ones that are equal; "accuracy" is the metric of the publication's table.

Whatever is not the same (log-likelihoods to 1e-4, everything else exactly) is named, and the exit status is then 1.
"""

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.output import make_parser, markdown, number, write_json
from megatron.config.flags import add_tokenizer_files, tokenizer_files
from megatron.evaluation import report

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-4
SHOWN = 5  # differences of a task that are printed


@dataclasses.dataclass(frozen=True)
class Row:
    """One task with one number of processes. None where a task has no such answers."""

    task: str
    processes: int
    documents: int
    log_likelihoods: int
    difference: float | None
    texts: int
    equal_texts: int
    accuracy: float
    hf_accuracy: float


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--load", required=True, metavar="DIR", help="Folder of checkpoints (the latest is taken), or one of them.")
    add("--tasks", default=",".join(report.COLUMNS), metavar="A,B", help="Some of the six (default: all).")
    add("--data-dir", metavar="DIR", help="Folder with the tasks' files (default: the hub, as lm-eval does).")
    add("--limit", type=int, metavar="N", help="Only the first N documents of each task.")
    add("--batch-size", type=int, default=8, metavar="N", help="Sequences of one forward pass (default: 8).")
    add("--max-gen-toks", type=int, metavar="N", help="Longest generated answer (default: 256).")
    add("--processes", type=int, nargs="+", default=[1], metavar="N", help="Ours, one after the other (default: 1).")
    add_tokenizer_files(parser)
    args = parser.parse_args(words)
    args.tasks = args.tasks.split(",")
    if unknown := [task for task in args.tasks if task not in report.COLUMNS]:
        parser.error(f"--tasks {','.join(unknown)}: expected some of {','.join(report.COLUMNS)}")
    return args


def main(words: list[str] | None = None) -> int:
    """Measure, print; returns the exit status, 1 where something differs."""
    args = parse_args(words)
    if importlib.util.find_spec("lm_eval") is None:
        print('error: this needs lm-eval: pip install -c constraints.txt -e ".[eval,hf]"', file=sys.stderr)
        return 1
    rows, seconds, wrong = [], {}, []
    with tempfile.TemporaryDirectory() as folder:
        theirs, seconds["hf"] = run_hf(args, Path(folder))
        for count in args.processes:
            ours, seconds[f"ours, {count}"] = run_ours(args, Path(folder) / str(count), count)
            found = [compare(task, count, ours, theirs) for task in args.tasks]
            rows += [row for row, _ in found]
            wrong += [f"{row.task}, {count} processes: {line}" for row, lines in found for line in lines]
    print(table(rows))
    print("\n" + markdown("<run | seconds", [[name, number(value, 1)] for name, value in seconds.items()]))
    setting = {"limit": args.limit, "batch_size": args.batch_size, "seconds": seconds, "differences": wrong}
    write_json(args.json, args.device, rows, **setting)
    print("\n".join(wrong) if wrong else f"\nNothing differs: log-likelihoods to {TOLERANCE}, all else exactly.")
    return int(bool(wrong))


def run_hf(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], float]:
    """lm-eval's results of its own backend with the exported model, and the seconds that the tasks took."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron.conversion.convert import convert
    from megatron.conversion.job import Conversion
    from megatron.evaluation.tasks import build_tasks

    for line in convert(Conversion(args.load, str(folder / "hf"), "hf", **tokenizer_files(args))):
        print(line, flush=True)
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", trust_remote_code=True, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf", trust_remote_code=True)  # it looks at the model's class
    tasks = build_tasks(args.tasks, Path(args.data_dir) if args.data_dir else None)
    backend = HFLM(model.to(args.device).eval(), tokenizer=tokenizer, batch_size=args.batch_size)
    begin = time.perf_counter()
    results = lm_eval.simple_evaluate(
        backend,
        tasks=tasks,
        task_manager=TaskManager(include_defaults=False),
        limit=args.limit,
        gen_kwargs={"max_gen_toks": args.max_gen_toks} if args.max_gen_toks else None,
        bootstrap_iters=0,
    )
    return results, time.perf_counter() - begin


def run_ours(args: argparse.Namespace, folder: Path, processes: int) -> tuple[dict[str, Any], float]:
    """The same of tools/evaluate.py."""
    from megatron.inference.load import find_checkpoint

    given = {
        "load": args.load, "output": folder, "tasks": ",".join(args.tasks), "data_dir": args.data_dir,
        "limit": args.limit, "batch_size": args.batch_size, "max_gen_toks": args.max_gen_toks,
        "device": args.device, "dtype": "fp32",
        "expert_parallel": processes if find_checkpoint(args.load).config.moe.enabled else 1,
    } | tokenizer_files(args)  # fmt: skip
    words = [
        word for name, value in given.items() if value is not None for word in (f"--{name.replace('_', '-')}", value)
    ]
    starter = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *starter, ROOT / "tools" / "evaluate.py", *words, "--log-samples"]
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL, env=os.environ)
    results = json.loads((folder / "results.json").read_text())
    return results, float(results["total_evaluation_time_seconds"])


def compare(task: str, processes: int, ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[Row, list[str]]:
    """A line of the table, and what is not the same.

    Args:
        task: lm-eval's name.
        processes: of ours.
        ours: lm-eval's results, with samples.
        theirs: the same of the other backend.
    """
    answers, expected = _answers(task, ours), _answers(task, theirs)
    wrong = []
    if answers.keys() != expected.keys():
        wrong.append(f"{len(answers)} answers, hf has {len(expected)}, or not to the same requests")
    difference, texts, equal = 0.0, 0, 0
    for key in expected.keys() & answers.keys():
        got, want = answers[key], expected[key]
        if isinstance(want, str):
            texts, equal = texts + 1, equal + (got == want)
            same = got == want
        else:
            apart = abs(float(got[0]) - float(want[0]))
            difference = max(difference, math.inf if math.isnan(apart) else apart)
            same = apart <= TOLERANCE and str(got[1]) == str(want[1])
        if not same:
            wrong.append(f"document {key[0]}, request {key[1]}: {got!r}, hf {want!r}")
    wrong = sorted(wrong)[:SHOWN] + ([f"and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else [])
    mine, other = _metrics(task, ours), _metrics(task, theirs)
    for name in mine.keys() | other.keys():
        got, want = mine.get(name, math.nan), other.get(name, math.nan)
        exact = not name.startswith("perplexity")
        if not (got == want if exact else math.isclose(got, want, rel_tol=TOLERANCE)):
            wrong.append(f"{name}: {got}, hf {want}")
    metric, scored = report.COLUMNS[task][1], len(expected) - texts
    documents = len({document for document, _ in expected})
    apart = difference if scored else None
    return Row(task, processes, documents, scored, apart, texts, equal, mine[metric], other[metric]), wrong


def _answers(task: str, results: dict[str, Any]) -> dict[tuple[int, int], Any]:
    return {
        (sample["doc_id"], request): answer
        for sample in results["samples"][task]
        for request, (answer,) in enumerate(sample["resps"])
    }


def _metrics(task: str, results: dict[str, Any]) -> dict[str, float]:
    return {name: value for _, name, value, _ in report.rows({task: results["results"][task]})}


def table(rows: list[Row]) -> str:
    """Markdown."""
    columns = "<task | processes | documents | log-likelihoods | difference | texts | equal | accuracy | of hf"
    cells = [
        [
            row.task,
            str(row.processes),
            str(row.documents),
            str(row.log_likelihoods),
            "" if row.difference is None else f"{row.difference:.1e}",
            str(row.texts),
            str(row.equal_texts),
            number(row.accuracy, 4),
            number(row.hf_accuracy, 4),
        ]
        for row in rows
    ]
    return markdown(columns, cells)


if __name__ == "__main__":
    sys.exit(main())
