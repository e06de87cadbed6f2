"""The top-1 router alone: gate product, choice, losses, capacity, random token selection; forward and backward.

    python -m benchmarks.router --json router.json

Compared with plain torch, with DeepSpeed's gate where it can be imported, and with two floors: the gate product alone
(cuBLAS, in the tokens' format) and reading the tokens once. Decisions and gradients are compared with float64 first.

Letters: T tokens, H hidden, E experts.
"""

import argparse
import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.output import device_name, write_json
from benchmarks.timing import median_ms
from megatron.moe.kernels import gate as kernels
from megatron.moe.plan import expert_capacity


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
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 32, 128, 512])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    """Check, measure, print."""
    args = parse_args(words)
    logging.basicConfig()
    rows = [row for experts in args.experts for row in measure(args, experts)]
    print(f"{device_name('cuda')}, torch {torch.__version__}, bf16\n" + table(rows), flush=True)
    write_json(args.json, "cuda", rows)


def measure(args: argparse.Namespace, experts: int) -> list[Row]:
    """All routers for one number of experts."""
    T, H = args.tokens, args.hidden_size
    weight_EH = (torch.randn(experts, H, device="cuda") / H**0.5).bfloat16().requires_grad_()
    capacity = expert_capacity(T, experts, 1, 1.0, 4)
    check(T, H, weight_EH, capacity)

    def inputs() -> tuple[torch.Tensor, ...]:
        x_TH = torch.randn(T, H, device="cuda").bfloat16().requires_grad_()
        return x_TH, torch.randn(T, device="cuda"), torch.randn_like(x_TH)

    def ours(x_TH: torch.Tensor) -> tuple[torch.Tensor | None, kernels.Gating]:
        return kernels.gate(x_TH, weight_EH, capacity, random=True)

    def plain(x_TH: torch.Tensor) -> tuple[torch.Tensor | None, kernels.Gating]:
        return None, kernels.reference(x_TH.float(), weight_EH.float(), capacity, torch.randperm(T, device="cuda"))

    rows = []
    for name, route in (("ours", ours), ("plain torch, [T, E] masks", plain)):
        rows.append(Row(name, T, H, experts, *time(args, route, inputs, weight_EH)))
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
    small = torch.tensor(0.01, device="cuda")

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
    x_TH = torch.randn(T, H, device="cuda").bfloat16()
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
    except ImportError as error:
        print(f"DeepSpeed is left out: {error}", flush=True)
        return None
    gate = TopKGate(weight_EH.size(1), weight_EH.size(0), k=1, capacity_factor=1.0, min_capacity=4, use_rts=True)
    gate = gate.cuda()
    gate.wg.weight.data.copy_(weight_EH)
    return lambda x_TH: gate(x_TH)


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = ["| router | T | H | E | forward ms | forward + backward ms |", "|---|---:|---:|---:|---:|---:|"]
    for row in rows:
        both = "" if row.both_ms is None else f"{row.both_ms:.3f}"
        lines.append(f"| {row.router} | {row.tokens} | {row.hidden} | {row.experts} | {row.forward_ms:.3f} | {both} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
