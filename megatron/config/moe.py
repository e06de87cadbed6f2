"""Which feed-forward layers are mixtures of experts, and how tokens are routed."""

import dataclasses
from collections.abc import Sequence

from megatron.config.fields import option


def one_for_all_or_each(values: Sequence[int], place: int) -> int:
    """The value of MoE layer number ``place`` of an option that lists one number for all MoE layers or one for each."""
    return values[0] if len(values) == 1 else values[place]


@dataclasses.dataclass
class MoEConfig:
    """Mixtures of experts; with ``num_experts`` 1 the model is dense."""

    num_experts: tuple[int, ...] = option(
        (1,), "Experts of an MoE layer: one number for all, or one per MoE layer; 1 is the dense model.", nargs="+"
    )
    expert_interval: int = option(2, "Every this-many-th layer is an MoE layer, starting with layer number INTERVAL.")
    topk: int = option(1, "Experts that process each token.")
    mlp_type: str = option(
        "standard", "'residual' adds a dense feed-forward beside the experts.", choices=("standard", "residual")
    )
    moe_loss_coeff: float = option(0.01, "Coefficient of the load-balancing loss.")
    moe_z_loss_coeff: float = option(0.0, "Coefficient of the router z-loss.")
    moe_train_capacity_factor: float = option(1.0, "Slots of an expert in training, as a multiple of an even share.")
    moe_eval_capacity_factor: float | None = option(
        None, "Slots of an expert in evaluation, as a multiple of an even share (default: nothing is dropped)."
    )
    moe_min_capacity: int = option(4, "Least slots of an expert.")
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

    def experts_of_layer(self, layer: int) -> int:
        """Experts of layer number ``layer`` (from 0); 1 for a dense layer."""
        return one_for_all_or_each(self.num_experts, self.place(layer)) if self.is_moe_layer(layer) else 1

    def place(self, layer: int) -> int:
        """Which of the MoE layers, from 0, layer number ``layer`` (from 0) is."""
        return (layer + 1) // self.expert_interval - 1

    @property
    def enabled(self) -> bool:
        """Whether the model has MoE layers at all."""
        return max(self.num_experts) > 1
