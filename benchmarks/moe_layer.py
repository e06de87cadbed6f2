"""One MoE layer, forward and backward, against the dense feed-forward of the same FLOPs and against other MoE layers.

    python -m benchmarks.moe_layer --scattermoe CHECKOUT --json moe_layer.json
    python -m benchmarks.moe_layer --mode dropless --topk 2

Ours is top-1 or top-k, capacity factor 1.0 with random token selection or dropless, GELU, biases; the router is part of
the layer. "dense" is the feed-forward that every token passes through: as many FLOPs as an MoE layer that fills its
buffers, so for top-k it is k times as wide. In the columns "even" every expert gets exactly as many of the random
tokens as any other, in "skewed" the busiest gets twice the mean as first choice (benchmarks/loads.py); "dropped" is the
share of assignments that are then dropped.

Before anything is timed, outputs and gradients are compared with float64. The other layers (benchmarks/peers.py) run
where they can be imported: DeepSpeed's, Megatron-core's, ScatterMoE's, and a sort before torch's grouped product.
"peer / ours" is the ratio of their milliseconds, even and skewed.

Shapes: T tokens, H hidden, F FFN hidden, E experts, K experts of each token.
"""

import argparse
import dataclasses
import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import peers
from benchmarks.loads import Loads
from benchmarks.output import DTYPES, device_name, make_parser, markdown, number, one_line, write_json
from benchmarks.peers import initialize, output
from benchmarks.timing import median_ms, peak_bytes, time_limit
from megatron.config import ModelConfig, MoEConfig
from megatron.moe.layer import MoELayer
from megatron.moe.mlp import MLP
from megatron.training.hooks.profiling import profiled

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
    memory_mb: float | None  # most memory of forward and backward beside parameters and their gradients; on a GPU
    over_ours_even: float | None = None  # a peer's milliseconds over ours
    over_ours_skewed: float | None = None
    busiest: float | None = None  # skewed: tokens of the busiest expert over the mean
    dropped: float | None = None  # skewed: share of the assignments that are dropped


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(
        __doc__,
        dtype=True,
        repeats=(20, "Timed runs of each layer"),
        profile="Print the kernels of each of our layers.",
    )
    parser.add_argument(
        "--sizes", nargs="+", default=["2048x16384", "1024x32768"], metavar="HxT", help="Hidden size x tokens."
    )
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 32, 128], metavar="E", help="Numbers of experts.")
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=tuple(peers.PEERS),
        default=list(peers.PEERS),
        metavar="NAME",
        help=f"Other projects' layers, of {', '.join(peers.PEERS)} (default: all).",
    )
    parser.add_argument(
        "--mode", choices=("capacity", "dropless"), default="capacity", help="Of our layer (default: capacity)."
    )
    parser.add_argument(
        "--balancing",
        nargs="+",
        choices=("global_aux_loss", "quantile_balancing"),
        default=[],
        help="Time our layer with these balancing methods too.",
    )
    parser.add_argument("--topk", type=int, default=1, metavar="K", help="Experts of a token; peers have 1 only.")
    parser.add_argument("--skip-peers", action="store_true", help="Leave other projects' layers out.")
    parser.add_argument(
        "--peer-seconds", type=int, default=120, metavar="N",
        help="Time in which a peer must be through with one number of experts (default: 120).",
    )  # fmt: skip
    parser.add_argument("--scattermoe", type=Path, metavar="DIR", help="A checkout of ScatterMoE.")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    """Check, measure, print."""
    args = parse_args(words)
    logging.basicConfig()
    rows: list[Row] = []
    for size in args.sizes:
        hidden, tokens = (int(word) for word in size.split("x"))
        rows += measure_size(args, hidden, tokens)
        settings = {"dtype": args.dtype, "mode": args.mode, "topk": args.topk}
        write_json(args.json, args.device, rows, **settings)  # after each size, lest a later one fail
    settings = f"{args.dtype}, {args.mode}, top-{args.topk}"
    print(f"\n{device_name(args.device)}, torch {torch.__version__}, {settings}\n" + table(rows), flush=True)


def measure_size(args: argparse.Namespace, hidden: int, tokens: int) -> list[Row]:
    """The dense layer of one size, and every layer with experts."""
    dense = MLP(ModelConfig(hidden_size=hidden, ffn_hidden_size=4 * hidden * args.topk)).to(
        args.device, DTYPES[args.dtype]
    )
    initialize(dense)
    rows: list[Row] = [measure(args, "dense", dense, None, hidden, tokens, 1, None)]
    base = rows[0].even_ms
    for experts in args.experts:
        layer = make_layer(hidden, experts, args)
        check(layer, hidden, tokens, args)
        ours = measure(
            args, "ours", layer, layer.router.weight, hidden, tokens, experts, base,
            topk=args.topk, dropless=args.mode == "dropless",
        )  # fmt: skip
        rows.append(ours)
        for method in args.balancing:
            layer = make_layer(hidden, experts, args, method)
            weight, name = layer.router.weight, f"ours, {method}"
            dropless = args.mode == "dropless"
            rows.append(
                measure(args, name, layer, weight, hidden, tokens, experts, base, topk=args.topk, dropless=dropless)
            )
        if args.profile:
            profile(layer, fresh(hidden, tokens, args))
        del layer
        for name in () if args.skip_peers or args.topk > 1 else args.peers:
            row = measure_peer(args, name, hidden, tokens, experts, base)
            if row is not None:
                ratios = {
                    "over_ours_even": row.even_ms / ours.even_ms,
                    "over_ours_skewed": row.skewed_ms / ours.skewed_ms,
                }
                rows.append(dataclasses.replace(row, **ratios))
    return rows


def measure_peer(
    args: argparse.Namespace, name: str, hidden: int, tokens: int, experts: int, dense_ms: float
) -> Row | None:
    """Build, verify and time another project's layer; None, with a printed line, where that fails."""
    peer = None
    try:
        with time_limit(args.peer_seconds):
            peer = peers.PEERS[name](peers.Shape(hidden, experts, args.device, DTYPES[args.dtype], args.scattermoe))
            peers.verify(peer, fresh(hidden, tokens, args), TOLERANCE[args.dtype])
            dropless = peer.capacity_factor is None
            return measure(
                args, peer.name, peer.layer, peer.router_EH, hidden, tokens, experts, dense_ms, dropless=dropless
            )
    except Exception as error:  # whatever another project raises must not end the run
        print(f"{name} with {experts} experts is left out: {one_line(error)}", flush=True)
        return None
    finally:
        del peer
        if args.device == "cuda":
            torch.cuda.empty_cache()


def make_layer(hidden: int, experts: int, args: argparse.Namespace, balancing: str = "aux_loss") -> MoELayer:
    """A layer of ours in training mode."""
    model = ModelConfig(num_layers=2, hidden_size=hidden, num_attention_heads=1)
    moe = MoEConfig(
        num_experts=(experts,),
        topk=args.topk,
        moe_token_dropping=args.mode == "capacity",
        moe_router_load_balancing_type=balancing,
    )
    with torch.device("meta"):
        layer = MoELayer(model, moe, experts)
    layer = layer.to(DTYPES[args.dtype]).to_empty(device=args.device)
    initialize(layer)
    for buffer in layer.buffers():
        buffer.zero_()
    return layer


def fresh(hidden: int, tokens: int, args: argparse.Namespace) -> torch.Tensor:
    """Random tokens."""
    return torch.randn(tokens, hidden, device=args.device).to(DTYPES[args.dtype]).requires_grad_()


def measure(
    args: argparse.Namespace,
    name: str,
    layer: nn.Module,
    router_EH: torch.Tensor | None,
    hidden: int,
    tokens: int,
    experts: int,
    dense_ms: float | None,
    *,
    topk: int = 1,
    dropless: bool = False,
) -> Row:
    """Time one layer."""
    loads = None if router_EH is None else Loads(router_EH, tokens)

    def both(x_TH: torch.Tensor, dy_TH: torch.Tensor) -> None:
        y_TH, aux_loss = output(layer, x_TH)
        outputs, gradients = [y_TH], [dy_TH]
        if aux_loss is not None:
            outputs, gradients = [y_TH, aux_loss], [dy_TH, torch.full_like(aux_loss, 0.01)]
        torch.autograd.backward(outputs, gradients)
        for parameter in layer.parameters():
            parameter.grad = None

    def forward(x_TH: torch.Tensor, dy_TH: torch.Tensor) -> None:
        with torch.no_grad():
            output(layer, x_TH)

    def inputs(skewed: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        x_TH = torch.randn(tokens, hidden, device=args.device)
        if loads is not None:
            x_TH = loads.skewed(x_TH) if skewed else loads.even(x_TH, topk)
        x_TH = x_TH.to(DTYPES[args.dtype])
        return x_TH.requires_grad_(), torch.randn_like(x_TH)

    even, _, _ = median_ms(both, inputs, repeats=args.repeats)
    forward_ms, _, _ = median_ms(forward, inputs, repeats=args.repeats)
    memory = None
    if args.device == "cuda":
        gradients = sum(p.numel() * p.element_size() for p in layer.parameters())
        memory = (peak_bytes(both, *inputs()) - gradients) / 1e6
    skewed = busiest = dropped = None
    if loads is not None:
        skewed, _, _ = median_ms(both, lambda: inputs(skewed=True), repeats=args.repeats)
        counts_E = loads.counts(inputs()[0], topk)
        assert int(counts_E.max() - counts_E.min()) <= topk, (
            f"tokens of each expert: {counts_E.tolist()}; expected as many"
        )
        counts_E = loads.counts(inputs(skewed=True)[0], topk)
        mean = tokens * topk / experts
        busiest = float(counts_E.max()) / mean
        dropped = 0.0 if dropless else float((counts_E - mean).clamp(min=0).sum()) / (tokens * topk)
    base = dense_ms or even
    ratio = None if skewed is None else base / skewed
    return Row(
        name, hidden, tokens, experts, even, skewed, forward_ms, base / even, ratio, memory,
        busiest=busiest, dropped=dropped,
    )  # fmt: skip


def check(layer: MoELayer, hidden: int, tokens: int, args: argparse.Namespace) -> None:
    """Compare outputs and gradients of some tokens, and gradients of one expert's weights, with float64.

    Raises:
        AssertionError: they are further apart than the number format explains.
    """
    x_TH = fresh(hidden, tokens, args)
    dy_TH = torch.randn_like(x_TH)
    torch.manual_seed(0)
    output_TH, stats = layer(x_TH)
    output_TH.backward(dy_TH)
    torch.manual_seed(0)  # which tokens are dropped is random
    with torch.no_grad():
        plan = layer.router(x_TH).plan
    logits_TE = F.linear(x_TH.detach().double(), layer.router.weight.detach().double())
    best_TK = logits_TE.topk(args.topk).indices
    assert float((best_TK != plan.expert_TK).double().mean()) <= 1e-3, "tokens do not go to their best experts"
    kept_TK = plan.slot_TK < (tokens if plan.capacity is None else plan.capacity)
    assert int(stats.dropped) == int((~kept_TK).sum())
    assert not output_TH[~kept_TK.any(1)].any(), "a dropped token got an output"

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
    pairs |= {"outputs": (output_TH[some], y), "tokens' gradient": (x_TH.grad[some], x.grad)}
    for name, (found, exact) in pairs.items():
        error = float((found.detach().double() - exact.detach()).norm() / exact.detach().norm())
        assert error <= TOLERANCE[args.dtype], f"{name} of expert {chosen}: relative error {error}"  # NaN fails too
    for parameter in layer.parameters():
        parameter.grad = None


def in_float64(
    layer: MoELayer, x_TH: torch.Tensor, expert_TK: torch.Tensor, kept_TK: torch.Tensor, experts: list[int]
) -> tuple[torch.Tensor, torch.Tensor, dict[int, dict[str, torch.Tensor]]]:
    """Tokens, the outputs of those of their experts that are among ``experts``, and the weights of these."""
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
        output_TH = F.gelu(x_TH @ w1 + b1, approximate="tanh") @ w2 + b2
        y_TH = y_TH + output_TH * (gate_TK * (expert_TK == expert)).sum(1, keepdim=True)
    return x_TH, y_TH, weights


def profile(layer: nn.Module, x_TH: torch.Tensor) -> None:
    """Print the kernels of one forward and backward by time."""
    dy_TH = torch.randn_like(x_TH)
    for _ in range(3):
        output(layer, x_TH)[0].backward(dy_TH)
    with profiled(None, "one layer, forward and backward", x_TH.device):
        output(layer, x_TH)[0].backward(dy_TH)


def table(rows: list[Row]) -> str:
    """Markdown."""

    def ratios(row: Row) -> str:
        return " / ".join(filter(None, (number(row.over_ours_even, 2), number(row.over_ours_skewed, 2))))

    def cells(row: Row) -> list[str]:
        times = [number(value, 2) for value in (row.even_ms, row.skewed_ms, row.forward_ms)]
        shares = [number(value, 2) for value in (row.dense_over_even, row.dense_over_skewed)]
        rest = [ratios(row), number(row.memory_mb, 0), number(row.busiest, 1), number(row.dropped, 2)]
        return [row.layer, str(row.hidden), str(row.tokens), str(row.experts), *times, *shares, *rest]

    columns = "<layer | H | T | E | even ms | skewed ms | forward ms | dense / even | dense / skewed | peer / ours"
    return markdown(columns + " | memory MB | busiest | dropped", [cells(row) for row in rows])


if __name__ == "__main__":
    main()
