"""An MoE layer whose experts are spread over all processes, forward and backward: in chunks, and hierarchical.

    torchrun --nproc-per-node 2 -m benchmarks.all_to_all --json all_to_all.json

Each form is first compared with the direct all-to-all in one piece: in the hierarchical form every bit must be
the same, with chunks (whose gradients are summed in another order) the numbers must be close. Then it is timed: with
CUDA events on a GPU, every run on fresh inputs, the median of the slowest process. ``--ranks-per-node`` cuts the
processes of one machine into pretended nodes.

"exchange" is the all-to-all of the layer's buffers alone, in one piece; its rate counts the bytes that a process sends
to others.

Shapes: T tokens of a process, H hidden.
"""

import argparse
import dataclasses
import logging
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from benchmarks.output import DTYPES, device_name, make_parser, markdown, number, write_json
from megatron.config import ModelConfig, MoEConfig
from megatron.moe.layer import MoELayer
from megatron.moe.plan import expert_capacity
from megatron.parallel.all_to_all import equal_all_to_all
from megatron.parallel.async_all_to_all import AsyncAllToAll
from megatron.parallel.groups import ExpertGroup, NodeGroups
from megatron.parallel.initialize import choose_device
from megatron.parallel.launch import Launch
from megatron.parallel.nodes import build_node_groups
from megatron.parallel.sharding import collect_layouts

TOLERANCE = {"bf16": 2e-2, "fp32": 1e-5}  # of a tensor's largest value


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    experts: int
    by_node: bool
    chunks: int
    layer_ms: float
    ratio: float  # of the time of the plain exchange in one piece
    exchange_ms: float
    exchange_gb_per_s: float


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__, dtype=True, repeats=(20, "Timed runs of each form"))
    parser.add_argument("--hidden-size", type=int, default=2048, metavar="H", help="Default: 2048.")
    parser.add_argument("--tokens", type=int, default=8192, metavar="T", help="Tokens of each process (default: 8192).")
    parser.add_argument(
        "--experts", type=int, nargs="+", default=[8, 32], metavar="E", help="Numbers of experts (default: 8 32)."
    )
    parser.add_argument("--topk", type=int, default=1, metavar="K", help="Experts of a token (default: 1).")
    parser.add_argument("--mlp-type", choices=("standard", "residual"), default="standard", help="Default: standard.")
    parser.add_argument(
        "--chunks", type=int, nargs="+", default=[1, 2, 4], metavar="N", help="Numbers of chunks (default: 1 2 4)."
    )
    parser.add_argument("--ranks-per-node", type=int, metavar="M", help="Also go by way of nodes of so many processes.")
    parser.add_argument("--warm-up", type=int, default=5, metavar="N", help="Runs before the timed ones (default: 5).")
    return parser.parse_args(words)


def main() -> None:
    """Join the processes, measure, leave."""
    args, launch = parse_args(), Launch.from_environment()
    device = choose_device(args.device, launch.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    logging.basicConfig()
    run(args, device)
    dist.destroy_process_group()


def run(args: argparse.Namespace, device: torch.device) -> None:
    """Measure with processes that have met; the first prints the table and writes the file."""
    size, node_groups = dist.get_world_size(), None
    if args.ranks_per_node:
        node_groups = build_node_groups([range(size)], [rank // args.ranks_per_node for rank in range(size)])
    rows = [row for experts in args.experts for row in measure(args, experts, node_groups, device)]
    if dist.get_rank() > 0:
        return
    print(table(args, device, rows), flush=True)
    setting = {key: value for key, value in vars(args).items() if key not in ("json", "device")}
    write_json(args.json, device.type, rows, **setting, processes=size)


def measure(args: argparse.Namespace, experts: int, node_groups: NodeGroups | None, device: torch.device) -> list[Row]:
    """All forms of a layer with so many experts."""
    size, rank = dist.get_world_size(), dist.get_rank()
    plain = ExpertGroup(size, rank, dist.group.WORLD)
    groups = [plain] if node_groups is None else [plain, dataclasses.replace(plain, node_groups=node_groups)]
    buffer_rows = experts * expert_capacity(args.tokens, experts, args.topk, 1.0, 4)
    sent_bytes = buffer_rows * args.hidden_size * DTYPES[args.dtype].itemsize * (size - 1) / size
    reference = results(args, make_layer(args, experts, plain, device), device)
    rows: list[Row] = []
    for group in groups:
        exchange_ms = median_ms(args, buffer_rows, exchange_step(group), device)
        for chunks in args.chunks:
            layer = make_layer(args, experts, dataclasses.replace(group, overlap_chunks=chunks), device)
            compare(results(args, layer, device), reference, TOLERANCE[args.dtype] if chunks > 1 else 0.0)
            ms = median_ms(args, args.tokens, layer_step(layer), device)
            base = rows[0].layer_ms if rows else ms
            by_node = group.node_groups is not None
            rows.append(Row(experts, by_node, chunks, ms, ms / base, exchange_ms, sent_bytes / exchange_ms / 1e6))
    return rows


def make_layer(args: argparse.Namespace, experts: int, group: ExpertGroup, device: torch.device) -> MoELayer:
    """The same layer for every form of the exchange."""
    model = ModelConfig(num_layers=2, hidden_size=args.hidden_size, num_attention_heads=1)
    moe = MoEConfig(num_experts=(experts,), topk=args.topk, mlp_type=args.mlp_type)
    with torch.device("meta"):
        layer = MoELayer(model, moe, experts, group)
    layer = layer.to_empty(device=device).to(DTYPES[args.dtype])
    generator = torch.Generator(device).manual_seed(dist.get_rank())
    common = torch.Generator(device).manual_seed(1000)
    layouts = collect_layouts(layer)
    for name, parameter in layer.named_parameters():  # initial values on the CPU would take minutes
        of_all = not layouts[name].is_expert
        torch.nn.init.normal_(parameter, std=0.02, generator=common if of_all else generator)
    return layer


def fresh_rows(args: argparse.Namespace, rows: int, device: torch.device) -> torch.Tensor:
    """New rows, [rows, H]."""
    return torch.randn(rows, args.hidden_size, dtype=DTYPES[args.dtype], device=device, requires_grad=True)


def exchange_step(group: ExpertGroup) -> Callable[[torch.Tensor], None]:
    """The all-to-all alone."""

    def step(x: torch.Tensor) -> None:
        AsyncAllToAll(x.detach(), equal_all_to_all(group)).wait()

    return step


def layer_step(layer: MoELayer) -> Callable[[torch.Tensor], None]:
    """Forward and backward of one micro-batch."""

    def step(x_TH: torch.Tensor) -> None:
        y_TH, stats = layer(x_TH)
        torch.autograd.backward([y_TH, stats.aux_loss], [y_TH.detach(), torch.ones_like(stats.aux_loss)])
        layer.zero_grad()

    return step


def results(args: argparse.Namespace, layer: MoELayer, device: torch.device) -> dict[str, torch.Tensor]:
    """Output and gradients of the micro-batch that all forms are compared on."""
    torch.manual_seed(dist.get_rank())
    x_TH = fresh_rows(args, args.tokens, device)
    y_TH, _ = layer(x_TH)
    y_TH.backward(y_TH.detach())
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"output": y_TH.detach(), "input": x_TH.grad, **gradients}


def compare(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Raises AssertionError where two forms of the exchange disagree."""
    for name, value in expected.items():
        atol = tolerance * value.abs().max().item()
        torch.testing.assert_close(found[name], value, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def median_ms(args: argparse.Namespace, rows: int, step: Callable[[torch.Tensor], None], device: torch.device) -> float:
    """Median milliseconds of ``step`` on fresh rows, of the process where it is longest."""
    times = []
    for _ in range(args.warm_up + args.repeats):
        x = fresh_rows(args, rows, device)
        dist.barrier()
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(device)
            start.record()
            step(x)
            end.record()
            torch.cuda.synchronize(device)
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            step(x)
            times.append(1e3 * (time.perf_counter() - begin))
    slowest = torch.tensor(statistics.median(times[args.warm_up :]), device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.item()


def table(args: argparse.Namespace, device: torch.device, rows: list[Row]) -> str:
    """The rows as Markdown, under the setting."""
    setting = (
        f"{dist.get_world_size()} processes on {device_name(device.type)}; each T={args.tokens}, H={args.hidden_size},"
        f" top-{args.topk}, {args.mlp_type}, {args.dtype}; forward + backward"
    )

    def cells(row: Row) -> list[str]:
        numbers = [number(row.layer_ms, 2), number(row.ratio, 3), number(row.exchange_ms, 2)]
        form = "by node" if row.by_node else "plain"
        return [str(row.experts), form, str(row.chunks), *numbers, number(row.exchange_gb_per_s, 1)]

    columns = "experts | <exchange | chunks | layer ms | of plain, 1 chunk | exchange alone ms | GB/s sent"
    return f"{setting}\n\n" + markdown(columns, [cells(row) for row in rows])


if __name__ == "__main__":
    main()
