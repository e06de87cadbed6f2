"""Print what each rank sends in one update, as a Markdown table.

    python tools/plan_communication.py
    python tools/plan_communication.py --world-size 128 --model 350M+MoE-128 --moe-expert-parallel-size 8

Without arguments: the published runs on 64 GPUs, their layout, and on 128, where a micro-batch is halved if the global
batch asks for it. With them: one run, described by the flags of ``pretrain_gpt_moe.py``.
"""

import argparse
import sys
from collections.abc import Sequence

from megatron.config import RunConfig, flags
from megatron.config.errors import ConfigError
from megatron.config.flags import COUNT
from megatron.config.presets import PRESETS
from megatron.config.run import build
from megatron.config.validation import validate_numbers
from megatron.data.tokenizer import planned_vocab_size
from megatron.planning.communication import PURPOSES, communication
from megatron.planning.plan import layout, micro_batches


def parse_args(argv: Sequence[str]) -> tuple[argparse.Namespace, RunConfig | None]:
    """What to print: sizes of the machine, and the run, if one is described."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="All flags of pretrain_gpt_moe.py describe the run.",
        allow_abbrev=False,
    )
    parser.add_argument("--world-size", type=COUNT, default=64, metavar="N", help="GPUs (default: 64)")
    parser.add_argument("--gpus-per-node", type=COUNT, default=8, metavar="N", help="GPUs of a node (default: 8)")
    args, rest = parser.parse_known_args(argv)
    return args, flags.parse_args(["--train-tokens", "300B", *rest]) if argv else None


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns its exit status."""
    args, one = parse_args(sys.argv[1:] if argv is None else argv)
    runs = _published() if one is None else [(one.logging.run_name or "run", one, args.world_size)]
    try:
        rows = [_row(name, run, world, args.gpus_per_node) for name, run, world in runs]
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    header = ["run", "GPUs", "layout", "micro-batches", *PURPOSES, "in the node", "between nodes"]
    for cells in (header, ["---"] * 4 + ["---:"] * (len(PURPOSES) + 2), *rows):
        print(f"| {' | '.join(cells)} |")
    return 0


def _published() -> list[tuple[str, RunConfig, int]]:
    runs = []
    for name, values in PRESETS.items():
        for world in (64, 128):
            run = build(values)
            replicas = run.parallel.data_parallel_size(world)
            if name == "6.7B+MoE-128":
                run.parallel.moe_expert_parallel_size = (replicas,)
            training = run.training
            training.micro_batch_size = min(training.micro_batch_size, training.global_batch_size // replicas)
            training.rampup_batch_size = None  # the full batch counts
            runs.append((name, run, world))
    return runs


def _row(name: str, run: RunConfig, world: int, node: int) -> list[str]:
    """The cells of one run, in GB (10^9 bytes)."""
    validate_numbers(run, world)
    vocab_size = run.model.padded_vocab_size(planned_vocab_size(run.data), run.parallel.tensor_model_parallel_size)
    sent = communication(run, world, vocab_size, node)
    inside, between = (sum(getattr(traffic, link) for traffic in sent.values()) for link in ("inside", "between"))
    volumes = [*(sent[purpose].total for purpose in PURPOSES), inside, between]
    cells = [f"{volume / 1e9:.2f}" if volume else "–" for volume in volumes]
    return [name, str(world), layout(run, world), micro_batches(run, world), *cells]


if __name__ == "__main__":
    sys.exit(main())
