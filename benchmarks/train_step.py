"""Whole training steps on one GPU: tokens/s, model TFLOP/s, share of the device's peak, peak memory.

    python -m benchmarks.train_step --runs 350M:16 350M+8:16 350M+32:16 1.3B:8 --nanogpt PATH --json train_step.json

A run is PRESET[+EXPERTS]:MICRO_BATCH[:MICRO_BATCHES]: the preset's shape and optimizer, with so many experts in every
other layer, and micro-batches of one update (1 by default). Sequences of 2 048 random tokens, vocabulary 50 304.
Activations are not recomputed unless --checkpoint-activations asks for it. --documents cuts the sequences into
documents that do not see each other. With the path of a nanoGPT checkout, its
model runs too, compiled and with its fused AdamW, in the shape of each dense run. Memory and MFU, the share of the
device's peak, are shown for GPUs.

--set changes options of all runs, by their names in a configuration file, such as to try the benchmark on a CPU:

    python -m benchmarks.train_step --runs 125M:2 125M+4:2 --device cpu --steps 2 \\
        --set num_layers=2 hidden_size=32 num_attention_heads=2 seq_length=32
"""

import argparse
import contextlib
import dataclasses
import itertools
import logging
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.output import device_name, make_parser, markdown, number, one_line, write_json
from megatron.config import RunConfig
from megatron.config.run import read_mapping
from megatron.data.documents import with_documents
from megatron.parallel.determinism import make_deterministic
from megatron.planning.flops import model_flops_per_token, peak_tflops
from megatron.planning.measured import VOCAB, run_of
from megatron.planning.parameters import count_parameters
from megatron.training.hooks.profiling import profiled

EOD = VOCAB - 1
PROFILED = 3  # steps: in the first the host is not yet ahead of the device


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    run: str
    parameters: int
    step_ms: float
    tokens_per_second: float
    tflops: float
    mfu: float | None  # where the peak of the device is known
    memory_gb: float | None  # on a GPU


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__, profile="Print the kernels of a step and the GPU's idle share.")
    parser.add_argument(
        "--runs",
        nargs="+",
        metavar="RUN",
        default=["350M:16", "350M+8:16", "350M+32:16", "1.3B:8"],
        help="PRESET[+EXPERTS]:MICRO_BATCH[:MICRO_BATCHES] ... (default: %(default)s).",
    )
    parser.add_argument("--dropout", type=float, default=0.0, help="Of hidden states and attention (default: 0).")
    parser.add_argument("--checkpoint-activations", action="store_true", help="Recompute activations.")
    parser.add_argument("--precision", choices=("bf16", "fp16"), default="bf16", help="Default: bf16.")
    parser.add_argument(
        "--documents",
        type=int,
        metavar="TOKENS",
        help="Mean length of documents, kept apart by --reset-attention-mask and --reset-position-ids.",
    )
    parser.add_argument("--nanogpt", type=Path, metavar="DIR", help="A checkout of nanoGPT.")
    parser.add_argument("--steps", type=int, default=12, help="Timed steps; as many again before them, at most 5.")
    parser.add_argument("--set", nargs="+", default=[], metavar="OPTION=VALUE", help="Options of all runs.")
    args = parser.parse_args(words)
    if args.documents is not None and args.documents < 1:
        parser.error(f"--documents {args.documents}: expected a mean length of 1 or more")
    if args.documents and args.nanogpt:
        parser.error("--documents: nanoGPT does not keep documents apart; drop --nanogpt")
    return args


def main(words: list[str] | None = None) -> None:
    """Measure and print."""
    args = parse_args(words)
    logging.basicConfig()
    rows: list[Row] = []
    for name in args.runs:
        done = [alone(ours, name, args)]
        if args.nanogpt and not describe(name, args).moe.enabled:
            done.append(alone(nanogpt, name, args))
        done = [row for row in done if row is not None]
        rows += done
        print(table(done), flush=True)
        setting = {"precision": args.precision, "checkpoint_activations": args.checkpoint_activations}
        setting |= {"dropout": args.dropout, "options": args.set, "documents": args.documents}
        write_json(args.json, args.device, rows, **setting)  # lest a later one fail
    print(f"\n{device_name(args.device)}, torch {torch.__version__}, {args.precision}\n" + table(rows), flush=True)


def describe(name: str, args: argparse.Namespace) -> RunConfig:
    """The configuration of a run."""
    options = {
        "checkpoint_activations": args.checkpoint_activations,
        "hidden_dropout": args.dropout,
        "attention_dropout": args.dropout,
        "precision": args.precision,
        "reset_position_ids": bool(args.documents),
        "reset_attention_mask": bool(args.documents),
    }
    return run_of(name, **options | read_mapping(dict(changed(word) for word in args.set)))


def changed(word: str) -> tuple[str, object]:
    """Name and value of ``OPTION=VALUE``, the value as in YAML."""
    name, equals, value = word.partition("=")
    if not equals:
        raise SystemExit(f"--set {word}: expected OPTION=VALUE, such as num_layers=2")
    return name, yaml.safe_load(value)


def alone(measurement: Callable[[str, argparse.Namespace], Row], name: str, args: argparse.Namespace) -> Row | None:
    """Measure in a process of its own, in whose memory nothing is left of another run; None if it fails."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(measurement, name, args).result()
        except Exception as error:  # memory may not suffice, and another project may raise whatever it likes
            print(f"{name} {measurement.__name__} is left out: {one_line(error)}", flush=True)
            return None


def batch(run: RunConfig, number: int, documents: int | None = None) -> dict:
    """A micro-batch of random tokens, in documents of so many tokens on average."""
    size = (run.training.micro_batch_size, run.model.seq_length)
    tokens, labels = (torch.randint(0, EOD, size) for _ in range(2))
    if documents:
        tokens[torch.rand(size) < 1 / documents] = EOD
    made = with_documents({"tokens": tokens, "labels": labels, "loss_mask": torch.ones(size)}, run.data, EOD)
    if torch.cuda.is_available():
        made = {key: tensor.pin_memory() for key, tensor in made.items()}
    return made | {"sample_index": number * size[0]}


def ours(name: str, args: argparse.Namespace) -> Row:
    """Our engine."""
    from megatron.engine.pipeline import build_engine
    from megatron.parallel.initialize import initialize, rendezvous
    from megatron.parallel.launch import Launch

    run = describe(name, args)
    if run.training.deterministic:
        make_deterministic()
    device = torch.device(args.device, 0 if args.device == "cuda" else None)
    launch, store = rendezvous(Launch.from_environment({}), run.parallel.timeout)
    topology = initialize(run.parallel, launch, device, store)
    with torch.device(device), quick_initial_values():
        engine = build_engine(run, topology, VOCAB)
    count = run.training.global_batch_size // run.training.micro_batch_size
    batches = [batch(run, number, args.documents) for number in range(count)]
    tokens = run.training.global_batch_size * run.model.seq_length
    done = [0]

    def step() -> None:
        done[0] += tokens
        engine.train_step(batches, done[0])

    return measure(f"{name} ours", run, step, args)


@contextlib.contextmanager
def quick_initial_values() -> Iterator[None]:
    """Draw 16M normal numbers once and repeat them, from another one on in each tensor: billions take a CPU minutes."""
    count = 1 << 24
    numbers = torch.randn(count, device="cpu").repeat(2)
    normal = torch.Tensor.normal_

    def repeat(x: torch.Tensor, mean: float = 0.0, std: float = 1.0, *, generator: torch.Generator | None = None):
        if x.is_cuda or x.numel() < count or mean:
            return normal(x, mean, std, generator=generator)
        first = int(torch.randint(count, (), generator=generator, device="cpu"))
        for part in x.view(-1).split(count):
            torch.mul(numbers[first : first + part.numel()], std, out=part)
        return x

    torch.Tensor.normal_ = repeat
    try:
        yield
    finally:
        torch.Tensor.normal_ = normal


def nanogpt(name: str, args: argparse.Namespace) -> Row:
    """nanoGPT's model and optimizer, as its train.py uses them."""
    run = describe(name, args)
    if run.training.deterministic:
        make_deterministic()
    sys.path.insert(0, str(args.nanogpt))
    from model import GPT, GPTConfig

    model = run.model
    shape = {"block_size": model.seq_length, "vocab_size": VOCAB, "n_layer": model.num_layers, "bias": True}
    gpt = GPT(GPTConfig(**shape, n_head=model.num_attention_heads, n_embd=model.hidden_size, dropout=args.dropout))
    gpt = gpt.to(args.device)
    optimizer = gpt.configure_optimizers(0.1, 1e-4, (0.9, 0.95), args.device)
    compiled = torch.compile(gpt)
    count = run.training.global_batch_size // run.training.micro_batch_size
    batches = [batch(run, number) for number in range(count)]

    def step() -> None:
        for made in batches:
            x, y = (made[key].to(args.device, non_blocking=True) for key in ("tokens", "labels"))
            with torch.amp.autocast(args.device, dtype=torch.bfloat16):
                _, loss = compiled(x, y)
            (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return measure(f"{name} nanoGPT", run, step, args)


def measure(name: str, run: RunConfig, step: Callable[[], None], args: argparse.Namespace) -> Row:
    """Time steps one after another, as in training: the host waits for the device once, after the last."""
    on_gpu = args.device == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(min(5, args.steps)):
        step()
    ends = [end_of_work(on_gpu)]
    for _ in range(args.steps):
        step()
        ends.append(end_of_work(on_gpu))
    if on_gpu:
        torch.cuda.synchronize()
        times = [1e-3 * begin.elapsed_time(end) for begin, end in itertools.pairwise(ends)]
    else:
        times = [end - begin for begin, end in itertools.pairwise(ends)]
    seconds = statistics.median(times)
    if args.profile:
        with profiled(None, f"{name}, {PROFILED} steps", torch.device(args.device)):
            for _ in range(PROFILED):
                step()
    tokens = run.training.global_batch_size * run.model.seq_length
    tflops = tokens * model_flops_per_token(run.model, run.moe, VOCAB) / seconds / 1e12
    peak = peak_tflops(device_name(args.device), run.optimizer.precision)
    parameters = count_parameters(run.model, run.moe, VOCAB).total
    memory = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None
    return Row(name, parameters, 1e3 * seconds, tokens / seconds, tflops, tflops / peak if peak else None, memory)


def end_of_work(on_gpu: bool) -> Any:
    """The moment at which all work queued so far is done: an event on a GPU, elsewhere now, in seconds."""
    if not on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def table(rows: list[Row]) -> str:
    """Markdown."""

    def cells(row: Row) -> list[str]:
        numbers = [f"{row.parameters / 1e6:.0f}M", number(row.step_ms, 1), number(row.tokens_per_second, 0)]
        mfu = "" if row.mfu is None else f"{row.mfu:.0%}"
        return [row.run, *numbers, number(row.tflops, 0), mfu, number(row.memory_gb, 1)]

    columns = "<run | parameters | step ms | tokens/s | TFLOP/s | MFU | memory GB"
    return markdown(columns, [cells(row) for row in rows])


if __name__ == "__main__":
    main()
