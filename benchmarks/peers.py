"""MoE layers of other projects, as peers for ours: each built from its own code, compared with float64, then timed.

A peer that cannot be built, is wrong or fails costs one printed line. All are top-1 with GELU; what else they do:

    DeepSpeed                   capacity factor 1.0, random token selection, biases
    Megatron-core               dropless; with Transformer Engine its grouped products, its fusions and biases, but for
                                the router's; without it one product an expert, no biases
    ScatterMoE                  dropless, no biases
    sort + grouped_mm           dropless, no biases: what torch alone can do in a few lines

Dropless layers without biases do less work than ours does on balanced tokens, and more on skewed ones.

Shapes: T tokens, H hidden, F FFN hidden, E experts.
"""

import dataclasses
import functools
import importlib.util
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.output import one_line
from megatron.moe.layer import MoEStats

CLEAR = 0.05  # lead of a token's first expert from which its rounded logits must give the same expert
gelu = functools.partial(F.gelu, approximate="tanh")


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a layer is built for."""

    hidden: int
    experts: int
    device: str
    dtype: torch.dtype
    scattermoe: Path | None = None  # a checkout of ScatterMoE


@dataclasses.dataclass(frozen=True)
class Peer:
    """A layer and how to look into it."""

    name: str
    layer: nn.Module  # [T, H] -> [T, H], or a tuple of that, the load-balancing loss and anything
    router_EH: torch.Tensor
    expert: Callable[[int], tuple[torch.Tensor | None, ...]]  # number -> w1 [H, F], b1 [F], w2 [F, H], b2 [H]
    capacity_factor: float | None  # None: dropless


def output(layer: nn.Module, x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Output and load-balancing loss of any of the layers."""
    out = layer(x_TH)
    if isinstance(out, torch.Tensor):
        return out, None
    y_TH, extra, *_ = out
    return y_TH, extra.aux_loss if isinstance(extra, MoEStats) else extra


def initialize(module: nn.Module) -> None:
    """Weights of a size that keeps activations near 1; drawn on the device."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=parameter.size(-2 if parameter.dim() == 3 else -1) ** -0.5)


def deepspeed_layer(shape: Shape) -> Peer:
    """DeepSpeed's ``MoE``."""
    import deepspeed
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups

    from megatron.engine.deepspeed_internals import SHARED_MEMORY_OP

    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(shape.hidden, 4 * shape.hidden), nn.Linear(4 * shape.hidden, shape.hidden)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc2(gelu(self.fc1(x)))

    backend = _start_alone(shape.device)
    deepspeed.ops.__compatible_ops__[SHARED_MEMORY_OP] = False  # on CPUs it would compile this, and not use it
    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    groups._create_expert_and_data_parallel(1)
    layer = MoE(shape.hidden, Expert(), num_experts=shape.experts, k=1, capacity_factor=1.0, min_capacity=4)
    layer.set_deepspeed_parallelism()
    layer = layer.to(device=shape.device, dtype=shape.dtype)
    initialize(layer)
    router_EH = layer.deepspeed_moe.gate.wg.float().weight
    experts = layer.deepspeed_moe.experts.deepspeed_experts

    def expert(number: int) -> tuple[torch.Tensor, ...]:
        fc1, fc2 = experts[number].fc1, experts[number].fc2
        return fc1.weight.T, fc1.bias, fc2.weight.T, fc2.bias

    return Peer(f"DeepSpeed {deepspeed.__version__}", layer, router_EH, expert, 1.0)


class _Flat(nn.Module):
    """A Megatron-core layer, [sequence, batch, H] -> (the same, no bias), for tokens in a row."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        return self.layer(x_TH[:, None])[0][:, 0]


def megatron_layer(shape: Shape) -> Peer:
    """Megatron-core's ``MoELayer``, with as many fusions as run with the installed Transformer Engine."""
    fusions = []
    if importlib.util.find_spec("transformer_engine"):
        fusions = ["use_te_activation_func", "moe_permute_fusion", "moe_router_fusion"]
    while True:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what it would like to be installed
                peer = _megatron_layer(shape, fusions)
            x_TH = torch.randn(8 * shape.experts, shape.hidden, device=shape.device, dtype=shape.dtype)
            y_TH, _ = output(peer.layer, x_TH.requires_grad_())
            y_TH.backward(torch.ones_like(y_TH))
            return peer
        except Exception as error:  # versions of the two do not always fit
            if not fusions:
                raise
            print(f"Megatron-core without {fusions.pop()}, with which it fails: {one_line(error)}", flush=True)


def _megatron_layer(shape: Shape, fusions: list[str]) -> Peer:
    from megatron.core import package_info, parallel_state
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig

    _start_alone(shape.device)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    if shape.device == "cuda":
        model_parallel_cuda_manual_seed(1)  # some of its layers ask for its generators
    if not hasattr(moe_utils, "te_general_gemm"):  # without Transformer Engine 0.16 tests a name it never defines
        moe_utils.te_general_gemm = None
    engine, name = moe_utils.HAVE_TE, f"Megatron-core {package_info.__version__}"
    config = TransformerConfig(
        num_layers=1,
        hidden_size=shape.hidden,
        num_attention_heads=1,
        ffn_hidden_size=4 * shape.hidden,
        num_moe_experts=shape.experts,
        moe_ffn_hidden_size=4 * shape.hidden,
        moe_router_topk=1,
        moe_router_pre_softmax=True,
        moe_router_dtype="fp32",
        moe_aux_loss_coeff=0.01,  # its gradient comes with the output's
        moe_token_dispatcher_type="alltoall",
        activation_func=F.gelu if engine else gelu,  # Transformer Engine's is the tanh form
        add_bias_linear=engine,  # without it experts add their bias in place, which autograd refuses
        expert_tensor_parallel_size=1,
        bias_dropout_fusion=False,
        perform_initialization=False,
        params_dtype=shape.dtype,
        bf16=shape.dtype == torch.bfloat16,
        moe_grouped_gemm=engine,
        **dict.fromkeys(fusions, True),
    )
    spec = get_moe_module_spec(use_te=engine, num_experts=shape.experts, moe_grouped_gemm=engine)
    layer = build_module(spec, config=config)
    layer.router.bias = None  # the others' routers have none
    layer = layer.to(device=shape.device)
    initialize(layer)
    if not engine:
        name += " without Transformer Engine, no biases"
    else:
        import transformer_engine

        name += f" + Transformer Engine {transformer_engine.__version__}"

    def expert(number: int) -> tuple[torch.Tensor, ...]:
        if engine:
            fc1, fc2 = layer.experts.linear_fc1, layer.experts.linear_fc2
            w1, b1, w2, b2 = (getattr(fc, f"{what}{number}") for fc in (fc1, fc2) for what in ("weight", "bias"))
        else:
            fc1, fc2 = (getattr(layer.experts.local_experts[number], key) for key in ("linear_fc1", "linear_fc2"))
            w1, b1, w2, b2 = fc1.weight, fc1.bias, fc2.weight, fc2.bias
        return w1.T, b1, w2.T, b2

    return Peer(name, _Flat(layer), layer.router.weight, expert, None)


class _Routed(nn.Module):
    """A router in plain torch before experts that only multiply."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.router = nn.Linear(shape.hidden, shape.experts, bias=False, device=shape.device, dtype=shape.dtype)

    def route(self, x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gate and expert of each token, [T]; probabilities [T, E], fp32."""
        p_TE = self.router(x_TH).float().softmax(-1)
        gate_T, expert_T = p_TE.max(-1)
        return gate_T, expert_T, p_TE


class _ScatterMoE(_Routed):
    def __init__(self, shape: Shape, mlp: nn.Module) -> None:
        super().__init__(shape)
        self.mlp = mlp

    def forward(self, x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate_T, expert_T, p_TE = self.route(x_TH)
        y_TH = self.mlp(x_TH, gate_T[:, None].to(x_TH.dtype), expert_T[:, None])
        share_E = torch.bincount(expert_T, minlength=p_TE.size(1)) / len(x_TH)
        return y_TH, p_TE.size(1) * (p_TE.mean(0) * share_E).sum()


def scattermoe_layer(shape: Shape) -> Peer:
    """ScatterMoE's ``MLP``, from a checkout or installed.

    Raises:
        ImportError: it is in neither place.
    """
    if shape.scattermoe is not None and str(shape.scattermoe) not in sys.path:
        sys.path.insert(0, str(shape.scattermoe))
    try:
        from scattermoe.mlp import MLP
    except ImportError as error:
        raise ImportError(f"{error}; give the path of a checkout as --scattermoe DIR") from error
    mlp = MLP(shape.hidden, 4 * shape.hidden, shape.experts, 1, activation=gelu)
    layer = _ScatterMoE(shape, mlp).to(shape.device, shape.dtype)
    initialize(layer)
    w1_EFH, w2_EHF = mlp.experts.weight, mlp.output_experts.weight
    return Peer("ScatterMoE", layer, layer.router.weight, lambda e: (w1_EFH[e].T, None, w2_EHF[e].T, None), None)


class _Sorted(_Routed):
    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        sizes = (shape.experts, shape.hidden, 4 * shape.hidden), (shape.experts, 4 * shape.hidden, shape.hidden)
        self.w1_EHF, self.w2_EFH = (
            nn.Parameter(torch.empty(*size, device=shape.device, dtype=shape.dtype)) for size in sizes
        )
        self.product = getattr(F, "grouped_mm", None) or torch._grouped_mm

    def forward(self, x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate_T, expert_T, p_TE = self.route(x_TH)
        E = p_TE.size(1)
        in_order_T, order_T = expert_T.sort()
        ends_E = torch.searchsorted(in_order_T, torch.arange(E, device=x_TH.device), right=True)
        offsets_E = ends_E.to(torch.int32)
        h_TF = gelu(self.product(x_TH.index_select(0, order_T), self.w1_EHF, offs=offsets_E))
        y_TH = self.product(h_TF, self.w2_EFH, offs=offsets_E) * gate_T[order_T, None].to(x_TH.dtype)
        share_E = ends_E.diff(prepend=ends_E.new_zeros(1)) / len(x_TH)
        return torch.empty_like(x_TH).index_copy(0, order_T, y_TH), E * (p_TE.mean(0) * share_E).sum()


def sorted_layer(shape: Shape) -> Peer:
    """Tokens sorted by expert, and torch's ``grouped_mm``."""
    layer = _Sorted(shape)
    initialize(layer)
    return Peer(
        "sort + grouped_mm", layer, layer.router.weight, lambda e: (layer.w1_EHF[e], None, layer.w2_EFH[e], None), None
    )


PEERS = {
    "deepspeed": deepspeed_layer,
    "grouped_mm": sorted_layer,
    "scattermoe": scattermoe_layer,
    "megatron": megatron_layer,
}


def verify(peer: Peer, x_TH: torch.Tensor, tolerance: float) -> None:
    """Compare outputs and the tokens' gradient with float64, from the peer's own weights.

    Left out are tokens that stand between two experts, and those that were dropped.

    Args:
        tolerance: of the norm of what is compared.

    Raises:
        AssertionError: they are further apart, or another number of tokens was dropped.
    """
    x_TH, dy_TH = x_TH.detach().clone().requires_grad_(), torch.randn_like(x_TH)
    y_TH, _ = output(peer.layer, x_TH)
    y_TH.backward(dy_TH)
    exact_TH, router_EH = x_TH.detach().double().requires_grad_(), peer.router_EH.detach().double()
    logits_TE = exact_TH.detach() @ router_EH.T
    (first_T, second_T), expert_T = logits_TE.topk(2, -1).values.T, logits_TE.argmax(-1)
    clear_T, kept_T = first_T - second_T > CLEAR, (y_TH.detach() != 0).any(-1)
    counts_E = torch.bincount(expert_T, minlength=len(router_EH))
    room = len(x_TH) if peer.capacity_factor is None else max(4, -(-len(x_TH) // len(router_EH)))
    wrong = abs(int((~kept_T).sum()) - int((counts_E - room).clamp(min=0).sum()))
    allowed = 0 if peer.capacity_factor is None else int((~clear_T).sum())
    assert wrong <= allowed, f"{wrong} tokens more or less were dropped than should be"
    assert y_TH.isfinite().all(), "outputs that are not finite"
    for number in range(len(router_EH)):
        rows = (clear_T & kept_T & (expert_T == number)).nonzero()[:, 0]
        w1, b1, w2, b2 = (None if part is None else part.detach().double() for part in peer.expert(number))
        x = exact_TH[rows]
        h = x @ w1 if b1 is None else x @ w1 + b1
        y = gelu(h) @ w2 if b2 is None else gelu(h) @ w2 + b2
        y = y * F.linear(x, router_EH).softmax(-1)[:, number, None]
        y.backward(dy_TH[rows].double())
        _assert_close(f"outputs of expert {number}", y_TH[rows], y, tolerance)
    rows = (clear_T & kept_T).nonzero()[:, 0]
    _assert_close("tokens' gradient", x_TH.grad[rows], exact_TH.grad[rows], tolerance)
    for parameter in peer.layer.parameters():
        parameter.grad = None


def _assert_close(what: str, found: torch.Tensor, exact: torch.Tensor, tolerance: float) -> None:
    difference, norm = float((found.detach().double() - exact.detach()).norm()), float(exact.detach().norm())
    assert difference <= tolerance * norm, f"{what}: relative error {difference / max(norm, 1e-300):.3g}"  # NaN fails


def _start_alone(device: str) -> str:
    """Start torch.distributed with this process alone; returns the backend."""
    backend = "nccl" if device == "cuda" else "gloo"
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    return backend
