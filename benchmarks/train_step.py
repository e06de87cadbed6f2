"""Whole training steps on one GPU: tokens/s, model TFLOP/s, share of the device's peak, peak memory.

    python -m benchmarks.train_step --runs 350M:16 350M+8:16 350M+32:16 1.3B:8 --nanogpt PATH --json train_step.json

A run is PRESET[+EXPERTS]:MICRO_BATCH[:MICRO_BATCHES]: the preset's shape and optimizer, with so many experts in every
other layer, and micro-batches of one update (1 by default). Sequences of 2 048 random tokens, vocabulary 50 304.
Activations are not recomputed unless --checkpoint-activations asks for it. With the path of a nanoGPT checkout, its
model runs too, compiled and with its fused AdamW, in the shape of each dense run.
"""

import argparse
import dataclasses
import gc
import logging
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.output import device_name, write_json
from megatron.config import RunConfig
from megatron.config.options import build
from megatron.config.presets import PRESETS
from megatron.planning.flops import model_flops_per_token, peak_tflops
from megatron.planning.parameters import count_parameters
from megatron.training.profiling import profiled

VOCAB = 50304


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    run: str
    parameters: int
    step_ms: float
    tokens_per_second: float
    tflops: float
    mfu: float | None
    memory_gb: float


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--runs", nargs="+", default=["350M:16", "350M+8:16", "350M+32:16", "1.3B:8"])
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--checkpoint-activations", action="store_true")
    parser.add_argument("--precision", choices=("bf16", "fp16"), default="bf16")
    parser.add_argument("--optimizer", choices=("adamw", "adamw8bit"), default="adamw")
    parser.add_argument("--optimizer-cpu-offload", action="store_true")
    parser.add_argument("--nanogpt", type=Path, metavar="DIR")
    parser.add_argument("--steps", type=int, default=12, help="Timed steps; as many again before them, at most 5.")
    parser.add_argument("--profile", action="store_true", help="Print the kernels of a step and the GPU's idle share.")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    """Measure and print."""
    args = parse_args(words)
    logging.basicConfig()
    rows: list[Row] = []
    for name in args.runs:
        run = describe(name, args)
        rows.append(ours(name, run, args))
        forget()
        if args.nanogpt and not run.moe.enabled:
            rows.append(nanogpt(name, run, args))
            forget()
        print(table(rows[-1:]), flush=True)
    optimizer = args.optimizer + (" in CPU memory" if args.optimizer_cpu_offload else "")
    print(
        f"\n{device_name('cuda')}, torch {torch.__version__}, {args.precision}, {optimizer}\n" + table(rows), flush=True
    )
    write_json(args.json, "cuda", rows, precision=args.precision, optimizer=optimizer)


def describe(name: str, args: argparse.Namespace) -> RunConfig:
    """The configuration of a run."""
    shape, *numbers = name.split(":")
    preset, _, experts = shape.partition("+")
    micro, count = int(numbers[0]), int(numbers[1]) if len(numbers) > 1 else 1
    values = PRESETS[preset] | {
        "micro_batch_size": micro,
        "global_batch_size": micro * count,
        "rampup_batch_size": None,
        "tensor_model_parallel_size": 1,
        "checkpoint_activations": args.checkpoint_activations,
        "hidden_dropout": args.dropout,
        "attention_dropout": args.dropout,
        "precision": args.precision,
        "optimizer_name": args.optimizer,
        "optimizer_cpu_offload": args.optimizer_cpu_offload,
    }
    if experts:
        values |= {"num_experts": (int(experts),)}
    return build(values)


def forget() -> None:
    """Give the memory of the last run back."""
    gc.collect()
    torch.cuda.empty_cache()


def batch(run: RunConfig, number: int) -> dict:
    """A micro-batch of random tokens."""
    size = (run.training.micro_batch_size, run.model.seq_length)
    tokens, labels = (torch.randint(0, VOCAB, size).pin_memory() for _ in range(2))
    return {"tokens": tokens, "labels": labels, "loss_mask": torch.ones(size), "sample_index": number * size[0]}


def ours(name: str, run: RunConfig, args: argparse.Namespace) -> Row:
    """Our engine."""
    from megatron.engine.pipeline import build_engine
    from megatron.parallel.initialize import forget_groups, initialize, meet
    from megatron.parallel.launch import Launch

    device = torch.device("cuda", 0)
    launch = Launch.from_environment({})
    if torch.distributed.is_initialized():
        from megatron.parallel.initialize import build_groups

        topology = build_groups(run.parallel, launch, device)
    else:
        launch, store = meet(launch, run.parallel.timeout)
        topology = initialize(run.parallel, launch, device, store)
    with torch.device("cpu"):
        engine = build_engine(run, topology, VOCAB)
    count = run.training.global_batch_size // run.training.micro_batch_size
    batches = [batch(run, number) for number in range(count)]
    tokens = run.training.global_batch_size * run.model.seq_length
    done = [0]

    def step() -> None:
        done[0] += tokens
        engine.train_step(batches, done[0])

    row = measure(f"{name} ours", run, step, args)
    forget_groups()
    return row


def nanogpt(name: str, run: RunConfig, args: argparse.Namespace) -> Row:
    """nanoGPT's model and optimizer, as its train.py uses them."""
    sys.path.insert(0, str(args.nanogpt))
    from model import GPT, GPTConfig

    model = run.model
    shape = {"block_size": model.seq_length, "vocab_size": VOCAB, "n_layer": model.num_layers, "bias": True}
    gpt = GPT(GPTConfig(**shape, n_head=model.num_attention_heads, n_embd=model.hidden_size, dropout=args.dropout))
    gpt = gpt.cuda()
    optimizer = gpt.configure_optimizers(0.1, 1e-4, (0.9, 0.95), "cuda")
    compiled = torch.compile(gpt)
    count = run.training.global_batch_size // run.training.micro_batch_size
    batches = [batch(run, number) for number in range(count)]

    def step() -> None:
        for made in batches:
            x, y = (made[key].cuda(non_blocking=True) for key in ("tokens", "labels"))
            with torch.amp.autocast("cuda", dtype=torch.bfloat16):
                _, loss = compiled(x, y)
            (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return measure(f"{name} nanoGPT", run, step, args)


def measure(name: str, run: RunConfig, step: Callable[[], None], args: argparse.Namespace) -> Row:
    """Time steps one after another, as in training."""
    torch.cuda.reset_peak_memory_stats()
    for _ in range(min(5, args.steps)):
        step()
    torch.cuda.synchronize()
    times = []
    for _ in range(args.steps):
        begin = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    seconds = statistics.median(times)
    if args.profile:
        with profiled(None, name, torch.device("cuda", 0)):
            step()
    tokens = run.training.global_batch_size * run.model.seq_length
    tflops = tokens * model_flops_per_token(run.model, run.moe, VOCAB) / seconds / 1e12
    peak = peak_tflops(torch.cuda.get_device_name(), run.optimizer.precision)
    parameters = count_parameters(run.model, run.moe, VOCAB).total
    memory = torch.cuda.max_memory_allocated() / 1e9
    return Row(name, parameters, 1e3 * seconds, tokens / seconds, tflops, tflops / peak if peak else None, memory)


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = [
        "| run | parameters | step ms | tokens/s | TFLOP/s | MFU | memory GB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        mfu = "" if row.mfu is None else f"{row.mfu:.0%}"
        lines.append(
            f"| {row.run} | {row.parameters / 1e6:.0f}M | {row.step_ms:.1f} | {row.tokens_per_second:,.0f} |"
            f" {row.tflops:.0f} | {mfu} | {row.memory_gb:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
