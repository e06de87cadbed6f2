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
    moe_loss_coeff: float = option(0.01, "Coefficient of the load-balancing loss.", min=0)
    moe_z_loss_coeff: float = option(0.0, "Coefficient of the router z-loss.", min=0)
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
