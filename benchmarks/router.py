"""The top-1 router alone: gate product, choice, losses, capacity, random token selection; forward and backward.

    python -m benchmarks.router --json router.json

Compared with plain torch, with DeepSpeed's gate where it can be imported, and with two floors: the gate product alone
(cuBLAS, in the tokens' format) and reading the tokens once. Decisions, gates and losses are first compared with
float64.

Without a GPU the kernels run in Triton's interpreter, to try them and not to time them; it cannot multiply bf16:

    TRITON_INTERPRET=1 python -m benchmarks.router --device cpu --dtype fp32 --tokens 64 --hidden-size 32 --experts 8

Shapes: T tokens, H hidden, E experts.
"""

import argparse
import dataclasses
import logging
from collections.abc import Callable

import torch

from benchmarks.output import DTYPES, device_name, make_parser, markdown, number, one_line, write_json
from benchmarks.timing import median_ms
from megatron.config import MoEConfig
from megatron.moe.balancing import QuantileBias
from megatron.moe.kernels import gate as kernels
from megatron.moe.plan import expert_capacity
from megatron.training.hooks.profiling import profiled


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    router: str
    tokens: int
    hidden: int
    experts: int
    forward_ms: float
    both_ms: float | None  # forward and backward


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(
        __doc__, dtype=True, repeats=(30, "Timed runs of each router"), profile="Print the kernels of our router."
    )
    parser.add_argument("--tokens", type=int, default=16384, metavar="T", help="Tokens (default: 16384).")
    parser.add_argument("--hidden-size", type=int, default=2048, metavar="H", help="Hidden size (default: 2048).")
    parser.add_argument(
        "--experts", type=int, nargs="+", default=[8, 32, 128, 512], metavar="E", help="Numbers of experts."
    )
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    """Check, measure, print."""
    args = parse_args(words)
    logging.basicConfig()
    rows = [row for experts in args.experts for row in measure(args, experts)]
    print(f"{device_name(args.device)}, torch {torch.__version__}, {args.dtype}\n" + table(rows), flush=True)
    write_json(args.json, args.device, rows, dtype=args.dtype)


def measure(args: argparse.Namespace, experts: int) -> list[Row]:
    """All routers for one number of experts."""
    T, H = args.tokens, args.hidden_size
    weight_EH = (torch.randn(experts, H, device=args.device) / H**0.5).to(DTYPES[args.dtype]).requires_grad_()
    capacity = expert_capacity(T, experts, 1, 1.0, 4)
    check(T, H, weight_EH, capacity)

    def inputs() -> tuple[torch.Tensor, ...]:
        x_TH = torch.randn(T, H, device=args.device).to(weight_EH.dtype).requires_grad_()
        return x_TH, torch.randn(T, device=args.device), torch.randn_like(x_TH)

    def ours(x_TH: torch.Tensor) -> tuple[torch.Tensor | None, kernels.Gating]:
        return kernels.gate(x_TH, weight_EH, capacity, random=True)

    balancer = QuantileBias(experts, MoEConfig(num_experts=(experts,))).to(args.device)
    balance = kernels.Balance(balancer.bias_E, None, balancer.histogram_REB)

    def quantile_balancing(x_TH: torch.Tensor) -> tuple[torch.Tensor | None, kernels.Gating]:
        return kernels.gate(x_TH, weight_EH, capacity, random=True, balance=balance)

    def plain(x_TH: torch.Tensor) -> tuple[torch.Tensor | None, kernels.Gating]:
        return None, kernels.reference(x_TH.float(), weight_EH.float(), capacity, torch.randperm(T, device=args.device))

    rows = []
    for name, route in (
        ("ours", ours),
        ("ours, quantile balancing", quantile_balancing),
        ("plain torch, [T, E] masks", plain),
    ):
        rows.append(Row(name, T, H, experts, *time(args, route, inputs, weight_EH)))
    if args.profile:
        with profiled(None, f"our router, {experts} experts, forward", torch.device(args.device)), torch.no_grad():
            ours(inputs()[0])
    rows.append(Row("gate product alone", T, H, experts, alone(args, inputs, lambda x: x @ weight_EH.detach().T), None))
    rows.append(Row("tokens read once", T, H, experts, alone(args, inputs, lambda x: x.view(torch.int32).max()), None))
    deepspeed = deepspeed_gate(T, weight_EH.detach())
    if deepspeed is not None:
        rows.append(Row("DeepSpeed, forward", T, H, experts, alone(args, inputs, deepspeed), None))
    return rows


def time(
    args: argparse.Namespace, route: Callable, inputs: Callable[[], tuple], weight_EH: torch.Tensor
) -> tuple[float, float]:
    """Milliseconds of forward, and of forward and backward."""
    small = torch.tensor(0.01, device=args.device)

    def forward(x_TH: torch.Tensor, *_: torch.Tensor) -> None:
        with torch.no_grad():
            route(x_TH)

    def both(x_TH: torch.Tensor, d_gate_T: torch.Tensor, dx_TH: torch.Tensor) -> None:
        passed, found = route(x_TH)
        outputs, gradients = [found.gate_T, found.aux_loss, found.z_loss], [d_gate_T, small, small]
        if passed is not None:
            outputs, gradients = [*outputs, passed], [*gradients, dx_TH]
        torch.autograd.backward(outputs, [g.to(o.dtype) for g, o in zip(gradients, outputs, strict=True)])
        weight_EH.grad = None

    return tuple(median_ms(step, inputs, repeats=args.repeats)[0] for step in (forward, both))


def alone(args: argparse.Namespace, inputs: Callable[[], tuple], function: Callable) -> float:
    """Milliseconds of ``function`` on the tokens."""

    def step(x_TH: torch.Tensor, *_: torch.Tensor) -> None:
        with torch.no_grad():
            function(x_TH)

    return median_ms(step, inputs, repeats=args.repeats)[0]


def check(T: int, H: int, weight_EH: torch.Tensor, capacity: int) -> None:
    """Compare with float64.

    Raises:
        AssertionError: another expert although the best two differ clearly, other gates or losses.
    """
    x_TH = torch.randn(T, H, device=weight_EH.device).to(weight_EH.dtype)
    _, found = kernels.gate(x_TH, weight_EH, None, random=False)
    exact = kernels.reference(x_TH.double(), weight_EH.detach().double(), None)
    best_T2 = (x_TH.double() @ weight_EH.detach().double().T).topk(2, -1).values
    clear_T = best_T2[:, 0] - best_T2[:, 1] > 1e-5
    assert torch.equal(found.expert_T[clear_T], exact.expert_T[clear_T])
    for name in ("gate_T", "aux_loss", "z_loss"):
        torch.testing.assert_close(getattr(found, name).detach().double(), getattr(exact, name), rtol=1e-5, atol=1e-5)
    _, dropping = kernels.gate(x_TH, weight_EH, capacity, random=True)
    assert (
        int(dropping.dropped) == int((exact.counts_E - capacity).clamp(min=0).sum()) == int((dropping.row_T < 0).sum())
    )


def deepspeed_gate(T: int, weight_EH: torch.Tensor) -> Callable | None:
    """DeepSpeed's own gate, or None with one line of output."""
    try:
        from deepspeed.moe.sharded_moe import TopKGate

        gate = TopKGate(weight_EH.size(1), weight_EH.size(0), k=1, capacity_factor=1.0, min_capacity=4, use_rts=True)
        gate = gate.to(weight_EH.device)
        gate.wg.weight.data.copy_(weight_EH)
        gate(torch.randn(T, weight_EH.size(1), device=weight_EH.device).to(weight_EH.dtype))
    except Exception as error:  # whatever another project raises must not end the run
        print(f"DeepSpeed is left out: {one_line(error)}", flush=True)
        return None
    return lambda x_TH: gate(x_TH)


def table(rows: list[Row]) -> str:
    """Markdown."""
    return markdown(
        "<router | T | H | E | forward ms | forward + backward ms",
        [
            [row.router, str(row.tokens), str(row.hidden), str(row.experts)]
            + [number(value, 3) for value in (row.forward_ms, row.both_ms)]
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
