"""What a router learns outside of gradient descent, so that its experts are evenly loaded.

It is learned from all tokens of one update (a global batch: all micro-batches of all data-parallel ranks), for the next
one. So it depends on no layout, no token changes the expert of one before it, and a model is evaluated just as it was
trained.

* :class:`ExpertBias`: an expert that got too few tokens is preferred a little more (Wang et al. 2024, arXiv
  2408.15664).
* :class:`QuantileBias`: an expert is preferred just as much as it takes to get its share of the tokens, read off the
  scores of all of them ("MoE Odyssey 6", kexue.fm/archives/11619; Kimi K3 technical report, section 2.3.3).
* :class:`GlobalLoad`: no bias, but the loads that the load-balancing loss weighs gates with (Qiu et al. 2025, arXiv
  2501.11873).

Biases are added to the logits for the choice of experts only: gates and losses are those of the logits alone.

Beside these, :class:`InputMean` is what the router subtracts from its input. All tokens have a part in common, to which
the first updates give large logits, the same for all tokens: then a few experts are everybody's choice, and others
change in every update.

Shapes: T tokens, H hidden, E experts, K experts of each token, B bins, L layers with equally many experts.
"""

import math
from collections.abc import Callable, Iterable
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import nn

from megatron.config import MoEConfig
from megatron.moe.plan import count_experts
from megatron.parallel.groups import TensorGroup
from megatron.parallel.tensor_collectives import broadcast_first

# The steps of an expert's bias, as in Rprop (Riedmiller and Braun 1993): longer while it moves in one direction.
GROWTH, SHRINKAGE, LONGEST_STEP = 1.5, 0.5, 1.0

# Bins of differences between scores: bin i is where asinh(difference / FINEST) is i - BINS / 2 bin widths. Around 0
# they are 0.001 wide, far from it 10% of the difference; the outermost ones have all that is beyond COARSEST.
BINS, FINEST, COARSEST = 256, 0.01, 1000.0
BIN_WIDTH = 2 * math.asinh(COARSEST / FINEST) / BINS

# A kernel adds to so many copies of all histograms of a layer, divided by its experts: on one GPU, additions to one
# number wait for each other.
COPIES = 4096


class Learner(nn.Module):
    """Something that a router learns from each update.

    Attributes:
        learned: names of the buffers that it learns, fp32; checkpoints have them.
        statistics: of this rank's tokens since the last update, [R, ...], the sum of R parts.
        own_tokens: whether, with sequence parallelism, each tensor-parallel rank observes its own tokens.
    """

    statistics: torch.Tensor
    own_tokens: ClassVar[bool] = False

    def __init__(self, statistics: torch.Tensor, **learned: torch.Tensor) -> None:
        super().__init__()
        self.learned = tuple(learned)
        for name, start in learned.items():
            self.register_buffer(name, start)
        self.register_buffer("statistics", statistics, persistent=False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "Learner":
        """Follow the model to another device, but not to another number format: a bias's steps are small."""
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, old in before.items():
            if (new := getattr(self, name)).dtype != old.dtype:
                setattr(self, name, old.to(new.device))
        return self

    def step(self, learned: list[torch.Tensor], statistics: torch.Tensor) -> list[torch.Tensor]:
        """What L alike learners know after an update: their new buffers, [L, ...] each.

        Args:
            learned: the old ones.
            statistics: of the global batch, [L, ...], all parts added.
        """
        raise NotImplementedError


class InputMean(Learner):
    """The mean of the router's input over the tokens of the update before; 0 until there is one.

    ``statistics`` are the sum of this rank's tokens and their number, float64 [1, H + 1].
    """

    own_tokens = True
    input_mean: torch.Tensor

    def __init__(self, hidden_size: int) -> None:
        super().__init__(torch.zeros(1, hidden_size + 1, dtype=torch.float64), input_mean=torch.zeros(hidden_size))

    @torch.no_grad()
    def observe(self, x: torch.Tensor) -> None:
        """Take in the tokens of a micro-batch in training, [..., H]."""
        x_TH, precise = x.flatten(0, -2), torch.promote_types(x.dtype, torch.float32)
        rows = 128 if x_TH.size(0) % 128 == 0 else 1  # two sums in a row: one of few columns leaves a GPU idle
        self.statistics[0, :-1] += x_TH.unflatten(0, (-1, rows)).sum(1, dtype=precise).sum(0)
        self.statistics[0, -1] += x_TH.size(0)

    def step(self, learned: list[torch.Tensor], statistics: torch.Tensor) -> list[torch.Tensor]:
        """See :meth:`Learner.step`."""
        sum_LH, tokens_L1 = statistics[:, :-1], statistics[:, -1:]
        return [torch.where(tokens_L1 > 0, sum_LH / tokens_L1.clamp(min=1), learned[0]).float()]


class Balancer(Learner):
    """What keeps one router's experts evenly loaded. ``statistics`` are int32 [R, E, ...]."""

    def __init__(
        self, num_experts: int, moe: MoEConfig, parts: int = 1, shape: tuple[int, ...] = (), **learned: torch.Tensor
    ) -> None:
        super().__init__(torch.zeros(parts, num_experts, *shape, dtype=torch.int32), **learned)
        self.num_experts, self.moe = num_experts, moe

    @property
    def bias_E(self) -> torch.Tensor | None:
        """What is added to the logits for the choice of experts, fp32."""
        return getattr(self, "expert_bias", None)

    @property
    def share_E(self) -> torch.Tensor | None:
        """Each expert's share of assignments for the load-balancing loss, fp32; None: that of the micro-batch."""
        return getattr(self, "expert_share", None)

    @property
    def histogram_REB(self) -> torch.Tensor | None:
        """``statistics`` where these are histograms of :func:`shift_bins`; None where they are tokens per expert."""
        return None

    def observe(self, scores_TE: torch.Tensor, expert_TK: torch.Tensor) -> None:
        """Take in a micro-batch in training: the scores that decided, biases included, and the choices."""
        self.statistics += count_experts(expert_TK, self.num_experts)


class ExpertBias(Balancer):
    """A bias that moves by the sign of each expert's load error.

    The published step has one length. Here each expert has its own, ``bias_step``, which grows while its error keeps
    its sign and shrinks when that changes, never below ``moe_router_bias_update_rate``.
    """

    expert_bias: torch.Tensor
    bias_step: torch.Tensor  # the last step; its sign is the direction

    def __init__(self, num_experts: int, moe: MoEConfig) -> None:
        super().__init__(num_experts, moe, expert_bias=torch.zeros(num_experts), bias_step=torch.zeros(num_experts))

    def step(self, learned: list[torch.Tensor], statistics: torch.Tensor) -> list[torch.Tensor]:
        """See :meth:`Learner.step`."""
        bias_LE, step_LE = learned
        counts_LE = statistics.double()
        direction_LE = (counts_LE.mean(-1, keepdim=True) - counts_LE).sign().float()
        factor_LE = torch.where(direction_LE * step_LE > 0, GROWTH, SHRINKAGE)
        length_LE = (step_LE.abs() * factor_LE).clamp(self.moe.moe_router_bias_update_rate, LONGEST_STEP)
        step_LE = direction_LE * length_LE
        return [centered(bias_LE + step_LE), step_LE]


class QuantileBias(Balancer):
    """A bias that is solved for: with it, each expert would have got K / E of the tokens of the update before.

    A token's threshold is the score of the best expert that it did not choose: an expert needs more to get the token.
    The K / E quantile, over all tokens, of what an expert's score lacks is what its bias lacks. All biases change at
    once, and thresholds with them, so this is a step of coordinate descent on the dual of the balanced assignment
    problem; the next one follows after the next update.
    """

    expert_bias: torch.Tensor

    def __init__(self, num_experts: int, moe: MoEConfig) -> None:
        parts = max(1, min(64, COPIES // num_experts))
        super().__init__(num_experts, moe, parts, (BINS,), expert_bias=torch.zeros(num_experts))

    @property
    def histogram_REB(self) -> torch.Tensor:
        """See :attr:`Balancer.histogram_REB`."""
        return self.statistics

    def observe(self, scores_TE: torch.Tensor, expert_TK: torch.Tensor) -> None:
        """Count what scores lack."""
        if (K := self.moe.topk) == self.num_experts:
            return
        threshold_T1 = scores_TE.topk(K + 1)[0][:, K:]
        bin_TE = shift_bins(threshold_T1 - scores_TE) + BINS * torch.arange(self.num_experts, device=scores_TE.device)
        at_N = bin_TE.flatten()
        self.statistics[0].view(-1).scatter_add_(0, at_N, torch.ones_like(at_N, dtype=torch.int32))

    def step(self, learned: list[torch.Tensor], statistics: torch.Tensor) -> list[torch.Tensor]:
        """See :meth:`Learner.step`."""
        shift_LE = quantile(statistics, self.moe.topk / self.num_experts)
        kept = self.moe.moe_router_quantile_balancing_ema
        return [centered(learned[0] + (1 - kept) * shift_LE)]


class GlobalLoad(Balancer):
    """The loads of the update before, for the load-balancing loss. At the start of a run they are even."""

    expert_share: torch.Tensor

    def __init__(self, num_experts: int, moe: MoEConfig) -> None:
        super().__init__(num_experts, moe, expert_share=torch.full((num_experts,), 1 / num_experts))

    def observe(self, scores_TE: torch.Tensor, expert_TK: torch.Tensor) -> None:
        """Count the choices that the load-balancing loss counts."""
        super().observe(scores_TE, expert_TK[:, :1] if self.moe.topk == 2 else expert_TK)

    def step(self, learned: list[torch.Tensor], statistics: torch.Tensor) -> list[torch.Tensor]:
        """See :meth:`Learner.step`."""
        return [(statistics / statistics.sum(-1, keepdim=True).clamp(min=1)).float()]


_BALANCERS: dict[str, type[Balancer]] = {
    "global_aux_loss": GlobalLoad,
    "expert_bias": ExpertBias,
    "quantile_balancing": QuantileBias,
}


def build_balancer(num_experts: int, moe: MoEConfig) -> Balancer | None:
    """The balancer of a layer; None where nothing balances, or the micro-batch's load-balancing loss alone."""
    kind = _BALANCERS.get(moe.balancing)
    return None if kind is None else kind(num_experts, moe)


def learners(model: nn.Module) -> list[Learner]:
    """All learners of a model, or of this rank's part of it, in the order of its layers."""
    return [module for module in model.modules() if isinstance(module, Learner)]


def learned_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """What the routers of a model learn outside of gradient descent, by name within the model."""
    return {
        f"{prefix}.{name}" if prefix else name: getattr(module, name)
        for prefix, module in model.named_modules()
        if isinstance(module, Learner)
        for name in module.learned
    }


@torch.no_grad()
def learn(
    found: Iterable[Learner],
    data_group: dist.ProcessGroup | None,
    tensor_group: TensorGroup,
    finite: torch.Tensor | bool,
) -> None:
    """Let routers learn from the update that has just been made, and forget its statistics.

    All ranks of both groups call this together; afterwards all know the same. The host does not wait.

    Args:
        found: of :func:`learners`.
        data_group: ranks with other tokens; None for a process alone.
        tensor_group: ranks that route the same tokens; their logits may differ in the last bits.
        finite: whether the gradient norm was; otherwise the update was skipped, and nothing is learned of it.
    """
    alike: dict[object, list[Learner]] = {}
    for each in found:
        alike.setdefault((type(each), each.statistics.shape), []).append(each)
    for layers in alike.values():
        first = layers[0]
        statistics = torch.stack([each.statistics for each in layers])
        statistics = statistics.sum(1, dtype=statistics.dtype)
        if data_group is not None and data_group.size() > 1:
            dist.all_reduce(statistics, group=data_group)
        if first.own_tokens and tensor_group.sequence_parallel:
            dist.all_reduce(statistics, group=tensor_group.group)
        else:
            broadcast_first(statistics, tensor_group)
        buffers = [[getattr(each, name) for each in layers] for name in first.learned]
        old = [torch.stack(each) for each in buffers]
        for each, before, after in zip(buffers, old, first.step(old, statistics), strict=True):
            torch._foreach_copy_(each, torch.where(torch.as_tensor(finite), after, before).unbind())
        torch._foreach_zero_([each.statistics for each in layers])


def centered(bias_LE: torch.Tensor) -> torch.Tensor:
    """Biases with a mean of 0; which experts are chosen does not depend on it."""
    return bias_LE - bias_LE.mean(-1, keepdim=True)


def shift_bins(shift: torch.Tensor) -> torch.Tensor:
    """The bin of each difference between scores, int64."""
    return (torch.asinh(shift / FINEST) / BIN_WIDTH + BINS / 2).nan_to_num().clamp(0, BINS - 1).long()


def quantile(histogram_LEB: torch.Tensor, share: float) -> torch.Tensor:
    """The difference that a ``share`` of those in each histogram are below, fp32 [L, E]; 0 where there are none.

    Within a bin the counted ones are taken to be spread evenly over the bin, as asinh sees it.
    """
    above_LEB = histogram_LEB.double().cumsum(-1)
    wanted_LE1 = share * above_LEB[..., -1:]
    bin_LE1 = (above_LEB < wanted_LE1).sum(-1, keepdim=True).clamp(max=BINS - 1)
    inside_LE1 = histogram_LEB.gather(-1, bin_LE1).double()
    passed_LE1 = wanted_LE1 - (above_LEB.gather(-1, bin_LE1) - inside_LE1)
    at_LE1 = bin_LE1 + (passed_LE1 / inside_LE1.clamp(min=1)).clamp(0, 1)
    shift_LE1 = FINEST * torch.sinh((at_LE1 - BINS / 2) * BIN_WIDTH)
    return torch.where(above_LEB[..., -1:] > 0, shift_LE1, 0.0).squeeze(-1).float()
