#!/usr/bin/env python3
"""Score a trained model on zero-shot tasks. ``--help`` lists the flags."""

import argparse
import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout that is not installed

from megatron.config.flags import COUNT, TOKENIZER_FILES, add_dtype_flag, add_tokenizer_files

TASKS = "lambada_openai,piqa,boolq,race,triviaqa,webqs"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        description="Score a trained model on zero-shot tasks of lm-evaluation-harness; docs/evaluation.md tells more. "
        "Started again with the same --output, it goes on with what is not finished. Needs the extra [eval].",
        epilog="example: torchrun --nproc-per-node 8 tools/evaluate.py --load checkpoints/350M_MoE128 --output "
        "scores/350M_MoE128 --expert-parallel 8",
    )
    add = parser.add_argument
    add("--load", required=True, metavar="DIR", help="Folder of checkpoints (the latest is taken), or one of them.")
    add("--output", required=True, metavar="DIR", help="Folder for the results and for requests.jsonl.")
    add("--tasks", default=TASKS, metavar="A,B", help=f"lm-eval's names (default: the published six, {TASKS}).")
    add("--data-dir", metavar="DIR", help="Folder with the tasks' files (default: the hub, as lm-eval does).")
    add("--limit", type=COUNT, metavar="N", help="Only the first N samples of each task, for a try.")
    add("--batch-size", type=COUNT, default=8, metavar="N", help="Sequences of one forward pass (default: 8).")
    add("--max-gen-toks", type=COUNT, metavar="N", help="Longest generated answer (default: the task's, else 256).")
    add("--expert-parallel", type=COUNT, default=1, metavar="N", help="Processes that share the experts (default: 1).")
    add("--device", metavar="NAME", help="cpu or cuda (default: cuda where there is a GPU).")
    add_dtype_flag(parser)
    add("--name", help="The model's name in the tables (default: the folder's).")
    add("--log-samples", action="store_true", help="Keep every sample with its answers too.")
    add_tokenizer_files(parser)
    args = parser.parse_args(argv)
    args.tasks = tuple(filter(None, (name.strip() for name in args.tasks.split(","))))
    if not args.tasks:
        parser.error(f"--tasks names none; expected some of lm-eval's, such as {TASKS}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0; 1 when checkpoint, tokenizer, tasks or data do not do; 2 for unusable flags."""
    args = vars(parse_args(argv))  # before the heavy imports: --help and a wrong flag answer at once
    if args["data_dir"] is not None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        from megatron.evaluation.harness import Evaluation, evaluate
    except ModuleNotFoundError as error:
        print(f'error: {error}; install the extra: pip install -c constraints.txt -e ".[eval]"', file=sys.stderr)
        return 1
    from megatron.checkpoint import CheckpointError
    from megatron.parallel.initialize import shut_down

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    files = {name: args.pop(name) for name in TOKENIZER_FILES}
    try:
        table = evaluate(Evaluation(**args, tokenizer_files=files))
    except (ValueError, OSError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        shut_down()
    if table is not None:
        print(table, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
