"""One MoE layer, forward and backward, against the dense feed-forward of the same FLOPs and against other MoE layers.

    python -m benchmarks.moe_layer --json moe_layer.json
    python -m benchmarks.moe_layer --mode dropless --topk 2

Top-1 or top-k, capacity factor 1.0 with random token selection or dropless, bf16, GELU, biases; the router is part of
the layer. "dense" is the feed-forward that every token passes through: as many FLOPs as an MoE layer that fills its
buffers, so for top-k it is k times as wide. Tokens are random; in the columns "even" the router is nearly balanced, in
"skewed" the busiest expert is asked for several times its part.

Before anything is timed, answers and gradients of some tokens and of one expert's weights are compared with float64.
DeepSpeed's layer runs too where it can be imported.

Letters: T tokens, H hidden, F FFN hidden, E experts, K experts of each token.
"""

import argparse
import dataclasses
import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.output import device_name, write_json
from benchmarks.timing import median_ms, peak_bytes
from megatron.config import ModelConfig, MoEConfig
from megatron.moe import MoELayer, fused
from megatron.moe.mlp import MLP
from megatron.moe.router import Router
from megatron.training.profiling import profiled

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SKEW = 0.4  # added to the logits of the most favoured expert, whose random part is about 1
TOLERANCE = {"bf16": 2e-2, "fp32": 2e-5}  # of the norm of what is compared


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    layer: str
    hidden: int
    tokens: int
    experts: int
    even_ms: float
    skewed_ms: float | None
    forward_ms: float
    dense_over_even: float  # speed as a share of the dense layer's
    dense_over_skewed: float | None
    memory_mb: float  # most memory of forward and backward beside parameters and their gradients
    busiest: float | None = None  # skewed: tokens of the busiest expert over the mean
    dropped: float | None = None  # skewed, with a capacity: share of the assignments


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--sizes", nargs="+", default=["2048x16384", "1024x32768"], help="HIDDENxTOKENS ...")
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--mode", choices=("capacity", "dropless"), default="capacity")
    parser.add_argument("--topk", type=int, default=1)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--skip-peers", action="store_true", help="Leave other projects' layers out.")
    parser.add_argument("--profile", action="store_true", help="Print the kernels of each of our layers.")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    """Check, measure, print."""
    args = parse_args(words)
    logging.basicConfig()
    rows: list[Row] = []
    for size in args.sizes:
        hidden, tokens = (int(word) for word in size.split("x"))
        rows += measure_size(args, hidden, tokens)
    settings = f"{args.dtype}, {args.mode}, top-{args.topk}"
    print(f"\n{device_name(args.device)}, torch {torch.__version__}, {settings}\n" + table(rows), flush=True)
    write_json(args.json, args.device, rows, dtype=args.dtype, mode=args.mode, topk=args.topk)


def measure_size(args: argparse.Namespace, hidden: int, tokens: int) -> list[Row]:
    """The dense layer of one size, and every layer with experts."""
    dense = MLP(hidden, 4 * hidden * args.topk).to(args.device, DTYPES[args.dtype])
    initialize(dense)
    rows: list[Row] = [measure(args, "dense", dense, None, hidden, tokens, 1, None)]
    base = rows[0].even_ms
    for experts in args.experts:
        layer = make_layer(hidden, experts, args)
        check(layer, hidden, tokens, args)
        rows.append(measure(args, "ours", layer, layer.router.weight, hidden, tokens, experts, base))
        if args.profile:
            profile(layer, fresh(hidden, tokens, args))
        del layer
        if not args.skip_peers:
            peer = deepspeed_layer(hidden, experts, args)
            if peer is not None:
                rows.append(measure(args, "DeepSpeed", *peer, hidden, tokens, experts, base))
            del peer
    return rows


def initialize(module: nn.Module) -> None:
    """Weights of a size that keeps activations near 1; drawn on the device."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=parameter.size(-2 if parameter.dim() == 3 else -1) ** -0.5)


def make_layer(hidden: int, experts: int, args: argparse.Namespace) -> MoELayer:
    """A layer of ours in training mode."""
    model = ModelConfig(num_layers=2, hidden_size=hidden, num_attention_heads=1)
    moe = MoEConfig(num_experts=(experts,), topk=args.topk, moe_token_dropping=args.mode == "capacity")
    with torch.device("meta"):
        layer = MoELayer(model, moe, experts)
    layer = layer.to(DTYPES[args.dtype]).to_empty(device=args.device)
    initialize(layer)
    return layer


def skew(weight_EH: torch.Tensor, direction_H: torch.Tensor) -> None:
    """Make a router favour some experts, for tokens that have ``direction_H`` in common."""
    E = weight_EH.size(0)
    with torch.no_grad():
        bias_E = SKEW * torch.linspace(1.0, -1.0, E, device=weight_EH.device)
        weight_EH += (bias_E[:, None] * direction_H / direction_H.norm() ** 2).to(weight_EH.dtype)


def fresh(hidden: int, tokens: int, args: argparse.Namespace, direction_H: torch.Tensor | None = None) -> torch.Tensor:
    """Random tokens; all with ``direction_H`` in common if given."""
    x_TH = torch.randn(tokens, hidden, device=args.device)
    if direction_H is not None:
        x_TH += direction_H
    return x_TH.to(DTYPES[args.dtype]).requires_grad_()


def answer(layer: nn.Module, x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Output and load-balancing loss of any of the layers."""
    out = layer(x_TH)
    if isinstance(out, torch.Tensor):
        return out, None
    return out[0], out[1]


def measure(
    args: argparse.Namespace,
    name: str,
    layer: nn.Module,
    router_EH: torch.Tensor | None,
    hidden: int,
    tokens: int,
    experts: int,
    dense_ms: float | None,
) -> Row:
    """Time one layer."""

    def both(x_TH: torch.Tensor, dy_TH: torch.Tensor) -> None:
        y_TH, aux_loss = answer(layer, x_TH)
        outputs, gradients = [y_TH], [dy_TH]
        if aux_loss is not None:
            outputs, gradients = [y_TH, aux_loss], [dy_TH, torch.full_like(aux_loss, 0.01)]
        torch.autograd.backward(outputs, gradients)
        for parameter in layer.parameters():
            parameter.grad = None

    def forward(x_TH: torch.Tensor, dy_TH: torch.Tensor) -> None:
        with torch.no_grad():
            answer(layer, x_TH)

    def inputs(direction_H: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        x_TH = fresh(hidden, tokens, args, direction_H)
        return x_TH, torch.randn_like(x_TH)

    even, _, _ = median_ms(both, inputs, repeats=args.repeats)
    forward_ms, _, _ = median_ms(forward, inputs, repeats=args.repeats)
    memory = 0
    if args.device == "cuda":
        gradients = sum(p.numel() * p.element_size() for p in layer.parameters())
        memory = peak_bytes(both, *inputs()) - gradients
    skewed = busiest = dropped = None
    if router_EH is not None:
        direction_H = torch.randn(hidden, device=args.device)
        skew(router_EH, direction_H)
        skewed, _, _ = median_ms(both, lambda: inputs(direction_H), repeats=args.repeats)
        x_TH = inputs(direction_H)[0].detach()
        logits_TE = F.linear(x_TH, router_EH.to(x_TH.dtype))
        counts_E = torch.bincount(logits_TE.topk(args.topk).indices.flatten(), minlength=experts)
        even_share = tokens * args.topk / experts
        busiest = float(counts_E.max()) / even_share
        if args.mode == "capacity":
            dropped = float((counts_E - even_share).clamp(min=0).sum()) / (tokens * args.topk)
    base = dense_ms or even
    ratio = None if skewed is None else base / skewed
    return Row(
        name, hidden, tokens, experts, even, skewed, forward_ms, base / even, ratio, memory / 1e6, busiest, dropped
    )


def check(layer: MoELayer, hidden: int, tokens: int, args: argparse.Namespace) -> None:
    """Compare answers and gradients of some tokens, and gradients of one expert's weights, with float64.

    Raises:
        AssertionError: they are further apart than the number format explains.
    """
    x_TH = fresh(hidden, tokens, args)
    dy_TH = torch.randn_like(x_TH)
    torch.manual_seed(0)
    out = layer(x_TH)
    out.y.backward(dy_TH)
    torch.manual_seed(0)  # which tokens find room is random
    with torch.no_grad():
        route = fused.route if fused.routes(layer.router, x_TH) else Router.__call__
        plan = route(layer.router, x_TH).plan
    logits_TE = F.linear(x_TH.detach().double(), layer.router.weight.detach().double())
    best_TK = logits_TE.topk(args.topk).indices
    assert float((best_TK != plan.expert_TK).double().mean()) <= 1e-3, "tokens do not go to their best experts"
    kept_TK = plan.slot_TK < (tokens if plan.capacity is None else plan.capacity)
    assert int(out.dropped) == int((~kept_TK).sum())
    assert not out.y[~kept_TK.any(1)].any(), "a token that found no room got an answer"

    chosen = int(torch.bincount(plan.expert_TK[kept_TK], minlength=logits_TE.size(1)).argmax())
    own = ((plan.expert_TK == chosen) & kept_TK).any(1).nonzero()[:, 0]
    some = own if args.topk == 1 else own[:8]  # these pass through many experts
    _, y, weights = in_float64(layer, x_TH[own], plan.expert_TK[own], kept_TK[own], [chosen])
    y.backward(dy_TH[own].double())
    pairs = {
        f"{name}'s gradient": (getattr(layer.experts, name).grad[chosen], weight.grad)
        for name, weight in weights[chosen].items()
    }
    everywhere = plan.expert_TK[some].unique().tolist()
    x, y, _ = in_float64(layer, x_TH[some], plan.expert_TK[some], kept_TK[some], everywhere)
    y.backward(dy_TH[some].double())
    pairs |= {"answers": (out.y[some], y), "tokens' gradient": (x_TH.grad[some], x.grad)}
    for name, (found, exact) in pairs.items():
        error = float((found.detach().double() - exact.detach()).norm() / exact.detach().norm())
        assert error <= TOLERANCE[args.dtype], f"{name} of expert {chosen}: relative error {error}"  # NaN fails too
    for parameter in layer.parameters():
        parameter.grad = None


def in_float64(
    layer: MoELayer, x_TH: torch.Tensor, expert_TK: torch.Tensor, kept_TK: torch.Tensor, experts: list[int]
) -> tuple[torch.Tensor, torch.Tensor, dict[int, dict[str, torch.Tensor]]]:
    """Tokens, the answers of those of their experts that are among ``experts``, and the weights of these."""
    x_TH = x_TH.detach().double().requires_grad_()
    gate_TK = F.linear(x_TH, layer.router.weight.detach().double()).softmax(-1).gather(1, expert_TK) * kept_TK
    if expert_TK.size(1) > 1:
        gate_TK = gate_TK / gate_TK.sum(1, keepdim=True)
    y_TH, weights = torch.zeros_like(x_TH), {}
    for expert in experts:
        weights[expert] = {
            name: p.detach()[expert].double().requires_grad_() for name, p in layer.experts.named_parameters()
        }
        w1, b1, w2, b2 = (weights[expert][name] for name in ("w1", "b1", "w2", "b2"))
        answer_TH = F.gelu(x_TH @ w1 + b1, approximate="tanh") @ w2 + b2
        y_TH = y_TH + answer_TH * (gate_TK * (expert_TK == expert)).sum(1, keepdim=True)
    return x_TH, y_TH, weights


def deepspeed_layer(hidden: int, experts: int, args: argparse.Namespace) -> tuple[nn.Module, torch.Tensor] | None:
    """DeepSpeed's own layer and its router, or None with one line of output."""
    try:
        import deepspeed
        from deepspeed.moe.layer import MoE
        from deepspeed.utils import groups
    except ImportError as error:
        print(f"DeepSpeed is left out: {error}", flush=True)
        return None

    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))

    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        backend = "nccl" if args.device == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        deepspeed.init_distributed(dist_backend=backend, verbose=False)
    groups._create_expert_and_data_parallel(1)
    settings = {"k": args.topk, "capacity_factor": 1.0, "min_capacity": 4, "use_rts": True}
    layer = MoE(hidden, Expert(), num_experts=experts, drop_tokens=args.mode == "capacity", **settings)
    layer.set_deepspeed_parallelism()
    layer = layer.to(device=args.device, dtype=DTYPES[args.dtype])
    initialize(layer)
    router = layer.deepspeed_moe.gate.wg.float().weight
    return layer, router


def profile(layer: nn.Module, x_TH: torch.Tensor) -> None:
    """Print the kernels of one forward and backward by time."""
    dy_TH = torch.randn_like(x_TH)
    for _ in range(3):
        answer(layer, x_TH)[0].backward(dy_TH)
    with profiled(None, "one layer, forward and backward", x_TH.device):
        answer(layer, x_TH)[0].backward(dy_TH)


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = [
        "| layer | H | T | E | even ms | skewed ms | forward ms | dense / even | dense / skewed | memory MB | busiest"
        " expert | dropped |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]

    def number(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    for row in rows:
        cells = [row.layer, str(row.hidden), str(row.tokens), str(row.experts), number(row.even_ms, 2)]
        cells += [number(row.skewed_ms, 2), number(row.forward_ms, 2), number(row.dense_over_even, 2)]
        cells += [number(row.dense_over_skewed, 2), number(row.memory_mb, 0), number(row.busiest, 1)]
        lines.append("| " + " | ".join([*cells, number(row.dropped, 2)]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
