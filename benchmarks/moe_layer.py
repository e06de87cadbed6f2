"""One MoE layer, forward and backward, against the dense feed-forward of the same FLOPs and against other MoE layers.

    python -m benchmarks.moe_layer --json moe_layer.json

Top-1, capacity factor 1.0, random token selection, bf16, GELU, biases; the router is part of the layer. "dense" is the
feed-forward that every token passes through: as many FLOPs as an MoE layer that fills its buffers. Tokens are random;
in the columns "even" the router is nearly balanced, in "skewed" the busiest expert is asked for several times its part.

Before anything is timed, answers and gradients of some tokens and of one expert's weights are compared with float64.
DeepSpeed's layer runs too where it can be imported.

Letters: T tokens, H hidden, F FFN hidden, E experts.
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
from megatron.moe import MoELayer
from megatron.moe.mlp import MLP
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
    dropped: float | None = None  # skewed: share of the tokens


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--sizes", nargs="+", default=["2048x16384", "1024x32768"], help="HIDDENxTOKENS ...")
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 32, 128])
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
    print(f"\n{device_name(args.device)}, torch {torch.__version__}, {args.dtype}\n" + table(rows), flush=True)
    write_json(args.json, args.device, rows, dtype=args.dtype)


def measure_size(args: argparse.Namespace, hidden: int, tokens: int) -> list[Row]:
    """The dense layer of one size, and every layer with experts."""
    dtype = DTYPES[args.dtype]
    dense = MLP(hidden, 4 * hidden).to(args.device, dtype)
    initialize(dense)
    rows: list[Row] = [measure(args, "dense", dense, None, hidden, tokens, 1, None)]
    base = rows[0].even_ms
    for experts in args.experts:
        layer = make_layer(hidden, experts, args.device, dtype)
        check(layer, hidden, tokens, args)
        rows.append(measure(args, "ours", layer, layer.router.weight, hidden, tokens, experts, base))
        if args.profile:
            profile(layer, fresh(hidden, tokens, args))
        del layer
        if not args.skip_peers:
            peer = deepspeed_layer(hidden, experts, args.device, dtype)
            if peer is not None:
                rows.append(measure(args, "DeepSpeed", *peer, hidden, tokens, experts, base))
            del peer
    return rows


def initialize(module: nn.Module) -> None:
    """Weights of a size that keeps activations near 1; drawn on the device."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=parameter.size(-2 if parameter.dim() == 3 else -1) ** -0.5)


def make_layer(hidden: int, experts: int, device: str, dtype: torch.dtype) -> MoELayer:
    """A layer of ours in training mode."""
    model, moe = ModelConfig(num_layers=2, hidden_size=hidden, num_attention_heads=1), MoEConfig(num_experts=(experts,))
    with torch.device("meta"):
        layer = MoELayer(model, moe, experts)
    layer = layer.to(dtype).to_empty(device=device)
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
        counts_E = torch.bincount(F.linear(x_TH, router_EH.to(x_TH.dtype)).argmax(-1), minlength=experts)
        busiest = float(counts_E.max()) * experts / tokens
        dropped = float((counts_E - tokens / experts).clamp(min=0).sum()) / tokens
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
    out = layer(x_TH)
    out.y.backward(dy_TH)
    # Which tokens found room is random: it shows in the answers.
    kept_T = out.y.detach().abs().sum(-1) > 0
    router, ex = layer.router.weight.detach().double(), layer.experts
    expert_T = F.linear(x_TH.detach().double(), router).argmax(-1)
    chosen = int(torch.bincount(expert_T[kept_T], minlength=router.size(0)).argmax())
    own = ((expert_T == chosen) & kept_T).nonzero()[:, 0]
    x, weights = x_TH.detach()[own].double().requires_grad_(), [
        p.detach()[chosen].double().requires_grad_() for p in (ex.w1, ex.b1, ex.w2, ex.b2)
    ]  # fmt: skip
    w1, b1, w2, b2 = weights
    gate = F.linear(x, router).softmax(-1)[:, chosen]
    y = (F.gelu(x @ w1 + b1, approximate="tanh") @ w2 + b2) * gate[:, None]
    y.backward(dy_TH[own].double())
    pairs = {"answers": (out.y[own], y), "tokens' gradient": (x_TH.grad[own], x.grad)}
    for name, parameter, exact in zip(("w1", "b1", "w2", "b2"), (ex.w1, ex.b1, ex.w2, ex.b2), weights, strict=True):
        pairs[f"{name}'s gradient"] = (parameter.grad[chosen], exact.grad)
    for name, (found, exact) in pairs.items():
        error = float((found.detach().double() - exact.detach()).norm() / exact.detach().norm())
        assert error <= TOLERANCE[args.dtype], f"{name} of expert {chosen}: relative error {error}"  # NaN fails too
    dropped = (~kept_T).nonzero()[:, 0]
    assert int(out.dropped) == len(dropped)
    for parameter in layer.parameters():
        parameter.grad = None


def deepspeed_layer(
    hidden: int, experts: int, device: str, dtype: torch.dtype
) -> tuple[nn.Module, torch.Tensor] | None:
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
        backend = "nccl" if device == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        deepspeed.init_distributed(dist_backend=backend, verbose=False)
    groups._create_expert_and_data_parallel(1)
    layer = MoE(hidden, Expert(), num_experts=experts, k=1, capacity_factor=1.0, min_capacity=4, use_rts=True)
    layer.set_deepspeed_parallelism()
    layer = layer.to(device=device, dtype=dtype)
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
