"""Plan a run before it is launched: parameters, memory, FLOPs, time, cost, what is sent, checkpoints.

    python tools/plan_run.py --world-size 64 --gpu A100 --model 350M+MoE-128 --train-tokens 300B
    python tools/plan_run.py --world-size 64 --gpu A100 --model 6.7B --search
    python tools/plan_run.py --all-scripts
    python tools/plan_run.py --compare [FILE ...]

The first prints the plan of the run that the flags of ``pretrain_gpt_moe.py`` describe; if it does not fit, the nearest
layout that does. ``--search`` ranks all layouts that fit, whatever layout the flags give; it looks at what it can in
half a minute. ``--all-scripts`` makes a table of the launch scripts in examples_moe/, each on the GPUs that its #SBATCH
lines ask for. ``--compare`` sets measured peaks of memory beside planned ones: those that the planner was made with, or
those of files that ``python -m benchmarks.train_step --json FILE`` has written.
"""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron.config import RunConfig, flags
from megatron.config.errors import ConfigError
from megatron.config.flags import COUNT, number
from megatron.config.recipes import recipe_in_words
from megatron.config.validation import validate_numbers
from megatron.data.data_table import planned_data_table
from megatron.data.tokenizer import planned_vocab_size
from megatron.planning import measured
from megatron.planning.devices import DEVICES, find_device
from megatron.planning.memory import memory
from megatron.planning.plan import (
    GB,
    Machine,
    Plan,
    aligned,
    count,
    experiment,
    layout,
    make_plan,
    micro_batches,
    needs,
)
from megatron.planning.search import SearchResult, fitting, flags_of, nearest
from megatron.training.clock import total_samples

SCRIPTS = Path(__file__).parents[1] / "examples_moe"


def parse_args(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, RunConfig | None]:
    """What to do, and the run that is described, if one is."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="All flags of pretrain_gpt_moe.py describe the run; without --train-tokens it has 300B.",
        allow_abbrev=False,
    )
    rate = number(float, above=0)
    parser.add_argument("--world-size", type=COUNT, default=64, metavar="N", help="GPUs (default: 64)")
    parser.add_argument("--gpus-per-node", type=COUNT, default=8, metavar="N", help="GPUs of a node (default: 8)")
    parser.add_argument("--gpu", default="A100", help=f"{', '.join(DEVICES)} (default: A100, of 80 GB)")
    parser.add_argument("--price-per-gpu-hour", type=rate, metavar="X", help="adds the cost of the run")
    parser.add_argument("--network-gb-per-second", type=rate, metavar="X", help="a GPU's share of the node's network")
    parser.add_argument(
        "--storage-gb-per-second", type=rate, default=5.0, metavar="X", help="of all processes together (default: 5)"
    )
    parser.add_argument(
        "--vocab-size", type=COUNT, metavar="N", help="before padding (default: 50257, GPT-2's; with ByteTokenizer 257)"
    )
    parser.add_argument("--search", action="store_true", help="rank the layouts that fit")
    parser.add_argument("--top", type=COUNT, default=10, metavar="N", help="layouts that --search shows (default: 10)")
    parser.add_argument("--all-scripts", action="store_true", help="a table of the scripts in examples_moe/")
    parser.add_argument(
        "--compare", nargs="*", type=Path, metavar="FILE", help="measured peaks of memory beside planned ones"
    )
    args, rest = parser.parse_known_args(argv)
    if args.all_scripts or args.compare is not None:
        if rest:
            parser.error(f"--all-scripts and --compare take no run; got {' '.join(rest)}")
        return args, None
    return args, flags.parse_args(["--train-tokens", "300B", *rest])


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns its exit status: 1 where the run does not fit, 2 for a mistake."""
    args, run = parse_args(argv)
    try:
        if args.compare is not None:
            return _compare(args.compare)
        machine = machine_of(args)
        if args.all_scripts:
            runs = [(name, found, replace(machine, world=world, node=node)) for name, found, world, node in scripts()]
            sizes = [args.vocab_size or planned_vocab_size(found.data) for _, found, _ in runs]
            print(
                table(
                    [
                        (name, plan_of(found, place, size))
                        for (name, found, place), size in zip(runs, sizes, strict=True)
                    ]
                )
            )
            return 0
        assert run is not None  # only the options above describe none
        vocab_size = args.vocab_size or planned_vocab_size(run.data)
        if args.search:
            return _search(fitting(run, machine, vocab_size), args.top)
        return _show(plan_of(run, machine, vocab_size), run)
    except (ConfigError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def machine_of(args: argparse.Namespace) -> Machine:
    """The machine that the command line describes."""
    device = find_device(args.gpu)
    if args.network_gb_per_second:
        device = device.with_network(args.network_gb_per_second * GB)
    storage = args.storage_gb_per_second * GB
    return Machine(args.world_size, args.gpus_per_node, device, storage, args.price_per_gpu_hour)


def plan_of(run: RunConfig, machine: Machine, vocab_size: int) -> Plan:
    """The plan of a run that must be valid on this many GPUs; ``vocab_size`` is not padded yet."""
    validate_numbers(run, machine.world)
    padded = run.model.padded_vocab_size(vocab_size, run.parallel.tensor_model_parallel_size)
    return make_plan(run, machine, padded)


def scripts() -> list[tuple[str, RunConfig, int, int]]:
    """The launch scripts' names, the runs they start, the GPUs they ask SLURM for, and the GPUs of a node."""
    changing = ("NNODES", "GPUS_PER_NODE", "TP", "PP", "EP", "MICRO_BATCH", "GLOBAL_BATCH", "RECIPE", "EXTRA_ARGS")
    unset = {*changing, "RUN_NAME"}
    clean = {name: text for name, text in os.environ.items() if name not in unset and not name.startswith("SLURM_")}
    found = []
    for script in sorted(SCRIPTS.glob("pretrain_gpt_*.sh"), key=_by_size):
        done = subprocess.run(
            ["bash", script], env=clean | {"DRY_RUN": "command"}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise ValueError(f"{script.name}: {done.stderr.strip()}")
        words = shlex.split(done.stdout)
        nodes, node = (int(words[words.index(flag) + 1]) for flag in ("--nodes", "--ntasks-per-node"))
        trainer = next(place for place, word in enumerate(words) if word.endswith("pretrain_gpt_moe.py"))
        run = flags.parse_args(words[trainer + 1 :])
        found.append((script.stem.removeprefix("pretrain_gpt_"), run, nodes * node, node))
    return found


def _by_size(script: Path) -> tuple[float, str]:
    size, _, kind = script.stem.removeprefix("pretrain_gpt_").partition("_")
    return float(size[:-1]) * {"M": 1, "B": 1000}[size[-1]], "" if kind == "dense" else kind


def table(plans: Sequence[tuple[str, Plan]]) -> str:
    """Markdown, one line a plan."""
    header = ["run", "GPUs", "layout", "micro-batches", "parameters", "active", "GB a GPU", "fits", "TFLOP/s a GPU"]
    header += ["tokens/s", "days", "GPU-hours", "GB sent", "checkpoint GB"]
    priced = plans[0][1].machine.price is not None
    lines = [[*header, *["cost"] * priced], ["---"] * 4 + ["---:"] * (len(header) - 4 + priced)]
    for name, plan in plans:
        step, world = plan.step, plan.machine.world
        assert step is not None  # the device is known
        sent = sum(traffic.total for traffic in step.traffic.values())
        cells = [name, str(world), layout(plan.config, world), micro_batches(plan.config, world)]
        cells += [
            count(plan.parameters.total),
            count(plan.parameters.active),
            f"{plan.memory.peak / GB:.1f}",
            "yes" if plan.fits else "NO",
        ]
        cells += [f"{step.tflops:.0f}", count(step.tokens_per_second), f"{step.days:.1f}", f"{step.gpu_hours:,.0f}"]
        cells += [f"{sent / GB:.1f}", f"{plan.checkpoint_bytes / GB:.0f}"]
        lines.append([*cells, *[f"{step.gpu_hours * (plan.machine.price or 0):,.0f}"] * priced])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _show(plan: Plan, run: RunConfig) -> int:
    device, machine = plan.machine.device, plan.machine
    assert device is not None  # of machine_of
    print(f"{plan.config.logging.run_name or 'run'} on {machine.world} x {device.name}, {machine.node} a node")
    print(aligned([*experiment(plan.config, machine.world), ("recipe", recipe_in_words(plan.config))]))
    print(aligned(needs(plan)))
    if run.data.data_path or run.data.train_data_path:
        print(planned_data_table(run, total_samples(run.training, run.model.seq_length)))
    if plan.fits:
        return 0
    found = fitting(plan.config, machine, plan.vocab_size)
    other = nearest(plan.config, found)
    if other is None:
        print(f"\n{_none_fits(found)}")
    else:
        print(f"\nThe nearest layout that fits, with {other.memory.peak / GB:.1f} GB a GPU:")
        print(f"  {flags_of(other.config)}")
    return 1


def _none_fits(found: SearchResult) -> str:
    return (
        f"No layout of this run fits into this many GPUs of this kind ({found.in_words}). Take more of them, or larger "
        "ones."
    )


def _search(found: SearchResult, top: int) -> int:
    if not found.plans:
        print(_none_fits(found))
        return 1
    print(f"{len(found.plans)} of {found.in_words} fit; the fastest:\n")
    print(table([(str(rank), other) for rank, other in enumerate(found.plans[:top], start=1)]))
    print()
    for rank, other in enumerate(found.plans[:top], start=1):
        print(f"{rank}. {flags_of(other.config)}")
    return 0


def _compare(files: Sequence[Path]) -> int:
    peaks = [peak for file in files for peak in measured.peaks_in(file)] if files else measured.PEAKS
    print("| run | options | measured GB | planned GB | planned / measured |\n|---|---|---:|---:|---:|")
    for peak in peaks:
        planned = memory(measured.run_of(peak.run, **peak.options), 1, measured.VOCAB).peak / GB
        options = ", ".join(f"{name} {value}" for name, value in peak.options.items())
        print(f"| {peak.run} | {options} | {peak.gb:.1f} | {planned:.1f} | {planned / peak.gb:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
