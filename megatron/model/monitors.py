"""What shows that a training is about to become unstable: attention logits, router logits, and whose gradients grow.

They are computed on a sample, the first sequence of a micro-batch, and some of its queries: there is never a full
attention matrix.

Shapes: B batch, S sequence, Q sampled queries, T sampled tokens, N heads (of this process), D head size, H hidden,
E experts.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from megatron.model.attention import SelfAttention
from megatron.model.document_attention import document_numbers
from megatron.model.gpt import GPTModel
from megatron.moe.layer import MoELayer
from megatron.moe.router import Router

QUERIES = 64  # of a sequence, each against all keys before it
TOKENS = 256  # of a sequence, that a router sees
KINDS = ("attention", "router", "experts", "embedding", "rest")  # of parameters


def parameter_kind(name: str) -> str:
    """Which of :data:`KINDS` the parameter of a :class:`GPTModel` with this name is."""
    module = f".{name}"
    for part, kind in (
        (".attention.", "attention"),
        (".mlp.router.", "router"),
        (".mlp.experts.", "experts"),
        (".embedding.", "embedding"),
    ):
        if part in module:
            return kind
    return "rest"


class Sample(NamedTuple):
    """A part of what went into a layer, without gradients.

    Of a transformer layer ``x`` is the first sequence [1, S, H], with sequence parallelism this process's piece of it;
    ``cu_seqlens`` are those of the whole micro-batch. Of an MoE layer ``x`` are every few tokens of it, [T, H].
    """

    x: torch.Tensor
    cu_seqlens: torch.Tensor | None = None


class LayerSamples:
    """Keeps a sample of what goes into each layer: of the last micro-batch that ran while this was ``active``.

    A sample of a transformer layer shares the memory of the layer's input, which the backward pass needs anyway.

    Attributes:
        active: whether samples are taken; they are not from the start.
        kept: the samples, by :class:`megatron.model.layer.TransformerLayer` or :class:`MoELayer`.
    """

    def __init__(self, model: GPTModel) -> None:
        self.active = self._copies = False
        self.kept: dict[nn.Module, Sample] = {}
        for layer in model.layers.values():
            layer.register_forward_pre_hook(self._take, with_kwargs=True)
            if isinstance(layer.mlp, MoELayer):
                layer.mlp.register_forward_pre_hook(self._take, with_kwargs=True)

    @contextlib.contextmanager
    def copied(self) -> Iterator[None]:
        """Inside, samples are taken, all of them in memory of their own."""
        before, self.active, self._copies = self.active, True, True
        try:
            yield
        finally:
            self.active, self._copies = before, False

    @torch.no_grad()
    def _take(self, module: nn.Module, inputs: tuple[torch.Tensor], others: Mapping[str, Any]) -> None:
        if not self.active:
            return
        (x,) = inputs
        if isinstance(module, MoELayer):
            group = module.tensor_group
            pieces = group.size if group.sequence_parallel else 1
            x = x[0, :: max(1, x.size(1) * pieces // TOKENS)].clone()  # else recomputed activations would stay alive
        else:
            x = x.detach()[:1]
            x = x.clone() if self._copies else x
        self.kept[module] = Sample(x, others.get("cu_seqlens"))


@torch.no_grad()
def max_attention_logit(
    attention: SelfAttention, normed_BSH: torch.Tensor, queries_Q: torch.Tensor, hidden_QS: torch.Tensor
) -> torch.Tensor:
    """The largest logit q k / sqrt(D) of one sequence and of this process's heads; a scalar in the model's format.

    Args:
        attention: of the layer.
        normed_BSH: what it takes in, of one sequence.
        queries_Q: places of queries in the sequence.
        hidden_QS: True for each key that a query does not attend to.
    """
    q, k, _ = attention.queries_keys_values(normed_BSH)
    q_NQD = q[0].index_select(1, queries_Q) * attention.head_size**-0.5
    return (q_NQD @ k[0].transpose(1, 2)).masked_fill_(hidden_QS, -torch.inf).amax()


def sampled_queries(length: int, device: torch.device) -> torch.Tensor:
    """At most :data:`QUERIES` evenly spaced places in a sequence, the last one among them, from there to the front."""
    return torch.arange(length - 1, -1, -length // QUERIES, device=device)


def hidden_keys(queries_Q: torch.Tensor, length: int, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """True for each key of the first sequence of a micro-batch that a query does not attend to: bool [Q, S]."""
    hidden_QS = torch.arange(length, device=queries_Q.device) > queries_Q[:, None]
    if cu_seqlens is not None:
        document_S = document_numbers(cu_seqlens, length)
        hidden_QS |= document_S != document_S[queries_Q][:, None]
    return hidden_QS


class RouterFigures(NamedTuple):
    """What a router makes of some tokens: scalars, fp32 or wider."""

    largest: torch.Tensor  # of all absolute values of logits
    variance: torch.Tensor  # of a token's logits over the experts, mean over tokens
    entropy: torch.Tensor  # of a token's softmax, in nats, mean over tokens


@torch.no_grad()
def router_figures(router: Router, x_TH: torch.Tensor) -> RouterFigures:
    """Those of the logits as in evaluation, so that nothing is drawn at random."""
    training, router.training = router.training, False
    try:
        logits_TE = router.logits(x_TH)
    finally:
        router.training = training
    log_p_TE = logits_TE.log_softmax(-1)
    entropy_T = -(log_p_TE.exp() * log_p_TE).sum(-1)
    return RouterFigures(logits_TE.abs().amax(), logits_TE.var(-1, correction=0).mean(), entropy_T.mean())
