"""Which feed-forward layers are mixtures of experts, and how tokens are routed."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from megatron.config.option import option, rule

if TYPE_CHECKING:
    from megatron.config.run import RunConfig


def one_for_all_or_each(values: Sequence[int], index: int) -> int:
    """The value of MoE layer number ``index`` of an option that lists one number for all MoE layers or one for each."""
    return values[0] if len(values) == 1 else values[index]


@dataclasses.dataclass
class MoEConfig:
    """Mixtures of experts; with ``num_experts`` 1 the model is dense."""

    num_experts: tuple[int, ...] = option(
        (1,), "Experts of an MoE layer: one number for all, or one per MoE layer; 1 is the dense model.", min=1,
        nargs="+", resumable=False,
    )  # fmt: skip
    expert_interval: int = option(
        2, "Every this-many-th layer is an MoE layer, starting with layer number INTERVAL.", min=1, resumable=False
    )
    topk: int = option(1, "Experts that process each token.", min=1)
    mlp_type: str = option(
        "standard", "'residual' adds a dense feed-forward beside the experts.", choices=("standard", "residual"),
        resumable=False,
    )  # fmt: skip
    moe_router_load_balancing_type: str = option(
        "aux_loss",
        "What keeps experts evenly loaded: a loss over each micro-batch (as published), the same over the whole global "
        "batch, a bias for each expert read off the global batch before (beside the loss), or nothing (but see "
        "--moe-router-enable-expert-bias).",
        choices=("aux_loss", "global_aux_loss", "quantile_balancing", "none"),
    )
    moe_router_enable_expert_bias: bool = option(
        False, "With type none: a bias for each expert that grows while it gets too few tokens (loss-free balancing)."
    )
    moe_router_bias_update_rate: float = option(
        1e-3, "Shortest step of a bias of --moe-router-enable-expert-bias; steps grow while their direction stays.",
        above=0, max=1,
    )  # fmt: skip
    moe_router_quantile_balancing_ema: float = option(
        0.0, "Share of the old bias that quantile_balancing keeps in each update; 0 takes the new one.", min=0, below=1
    )
    moe_loss_coeff: float | None = option(
        None, "Coefficient of the load-balancing loss (default: 0.01, and 0 with type none).", min=0
    )
    moe_z_loss_coeff: float = option(0.0, "Coefficient of the router z-loss.", min=0)
    moe_router_center_input: bool = option(
        False,
        "Subtract from the router's input its mean over the tokens of the update before, which would otherwise decide "
        "the choice of experts in the first updates.",
        resumable=False,
    )
    moe_router_lr_mult: float = option(1.0, "The router's learning rate, as a multiple of that of the model.", above=0)
    moe_router_init_mult: float = option(
        1.0, "Standard deviation of the router's initial weights, as a multiple of --init-method-std.", above=0
    )
    moe_train_capacity_factor: float = option(
        1.0, "Slots of an expert in training, as a multiple of an even share.", above=0
    )
    moe_eval_capacity_factor: float | None = option(
        None, "Slots of an expert in evaluation, as a multiple of an even share (default: nothing is dropped).",
        above=0, resumable=True,
    )  # fmt: skip
    moe_min_capacity: int = option(4, "Least slots of an expert.", min=0)
    moe_token_dropping: bool = option(
        True, "Never drop a token in training: experts take all that are routed to them.",
        flag="--disable-moe-token-dropping",
    )  # fmt: skip
    moe_noise_policy: str | None = option(
        None, "Noise of the router in training: Jitter scales its inputs, RSample adds Gumbel noise to its logits.",
        choices=("Jitter", "RSample"),
    )  # fmt: skip
    moe_rts: bool = option(
        True, "Over-full experts keep the first tokens instead of a random choice.", flag="--no-moe-rts"
    )

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer number ``layer`` (from 0) is an MoE layer."""
        return self.enabled and (layer + 1) % self.expert_interval == 0

    def experts_per_layer(self, num_layers: int) -> list[int]:
        """Experts of each of ``num_layers`` layers; 1 for a dense one."""
        return [self.experts_of_layer(layer) for layer in range(num_layers)]

    def experts_of_layer(self, layer: int) -> int:
        """Experts of layer number ``layer`` (from 0); 1 for a dense layer."""
        return one_for_all_or_each(self.num_experts, self.moe_layer_index(layer)) if self.is_moe_layer(layer) else 1

    def moe_layer_index(self, layer: int) -> int:
        """Which of the MoE layers, from 0, layer number ``layer`` (from 0) is."""
        return (layer + 1) // self.expert_interval - 1

    @property
    def balancing(self) -> str:
        """The balancing method: a load balancing type or, for an expert bias without one, "expert_bias"."""
        with_bias = self.moe_router_enable_expert_bias and self.moe_router_load_balancing_type == "none"
        return "expert_bias" if with_bias else self.moe_router_load_balancing_type

    @property
    def has_aux_loss(self) -> bool:
        """Whether the balancing method is a loss, or has one beside it."""
        return self.moe_router_load_balancing_type != "none"

    @property
    def has_expert_bias(self) -> bool:
        """Whether the choice of experts depends on a bias that is learned outside of gradient descent."""
        return self.balancing in ("expert_bias", "quantile_balancing")

    @property
    def aux_loss_coeff(self) -> float:
        """Coefficient of the load-balancing loss; 0 if it is only reported."""
        if self.moe_loss_coeff is not None:
            return self.moe_loss_coeff
        return 0.01 if self.has_aux_loss else 0.0

    @property
    def enabled(self) -> bool:
        """Whether the model has MoE layers at all."""
        return max(self.num_experts) > 1


@rule("num_layers", "num_experts", "expert_interval", "moe_expert_parallel_size")
def moe_layers(config: "RunConfig", world_size: int) -> Iterator[str]:
    """There are MoE layers, and options that list one number for each of them list that many."""
    layers, interval = config.model.num_layers, config.moe.expert_interval
    if not config.moe.enabled:
        return
    if interval > layers:
        yield (
            f"--expert-interval {interval} must be from 1 to --num-layers {layers}, or no layer has experts;"
            f" use --expert-interval {min(2, layers)}"
        )
        return
    for flag, given in (
        ("--num-experts", len(config.moe.num_experts)),
        ("--moe-expert-parallel-size", len(config.parallel.moe_expert_parallel_size)),
    ):
        if given not in (1, layers // interval):
            yield (
                f"{flag} lists {given} numbers; {layers} layers with --expert-interval {interval} have {layers} //"
                f" {interval} = {layers // interval} MoE layers; give one number for all of them or"
                f" {layers // interval}"
            )


@rule("num_experts", "topk")
def topk(config: "RunConfig", world_size: int) -> Iterator[str]:
    """A token goes to different experts."""
    topk = config.moe.topk
    fewest = min((count for count in config.moe.num_experts if count > 1), default=topk)
    if topk > fewest:
        yield f"--topk {topk} must not exceed the {fewest} experts of a layer; use --topk {fewest}"


@rule("moe_router_lr_mult", "pipeline_model_parallel_size")
def router_learning_rate(config: "RunConfig", world_size: int) -> Iterator[str]:
    """All pipeline stages have the same parameter groups, and one without MoE layers would have none of routers."""
    mult, stages = config.moe.moe_router_lr_mult, config.parallel.pipeline_model_parallel_size
    if mult != 1 and stages > 1:
        yield (
            f"--moe-router-lr-mult {mult:g} with --pipeline-model-parallel-size {stages}: routers cannot have a"
            " learning rate of their own in a pipeline; drop one of the two"
        )


@rule(
    "moe_router_load_balancing_type", "moe_router_enable_expert_bias", "moe_router_bias_update_rate",
    "moe_router_quantile_balancing_ema", "moe_loss_coeff",
)  # fmt: skip
def balancing(config: "RunConfig", world_size: int) -> Iterator[str]:
    """One method balances the experts, and has the options that were given."""
    moe = config.moe
    kind = moe.moe_router_load_balancing_type
    if moe.moe_router_enable_expert_bias and kind != "none":
        yield (
            f"--moe-router-enable-expert-bias beside --moe-router-load-balancing-type {kind}: one method balances; add "
            "--moe-router-load-balancing-type none for the bias, or drop the flag"
        )
    if moe.moe_loss_coeff and not moe.has_aux_loss:
        method = "--moe-router-enable-expert-bias" if moe.moe_router_enable_expert_bias else f"type {kind}"
        yield (
            f"--moe-loss-coeff {moe.moe_loss_coeff:g} beside {method}, which balances without a loss; drop it, or "
            "use --moe-router-load-balancing-type aux_loss, global_aux_loss or quantile_balancing"
        )
    for flag, value, unset, method in (
        ("--moe-router-bias-update-rate", moe.moe_router_bias_update_rate, 1e-3, "expert_bias"),
        ("--moe-router-quantile-balancing-ema", moe.moe_router_quantile_balancing_ema, 0.0, "quantile_balancing"),
    ):
        if value != unset and moe.balancing != method:
            needs = {
                "expert_bias": "--moe-router-load-balancing-type none --moe-router-enable-expert-bias",
                "quantile_balancing": "--moe-router-load-balancing-type quantile_balancing",
            }[method]
            yield f"{flag} {value:g} changes nothing here; add {needs}, or drop it"
