"""A GPT with mixtures of experts for Hugging Face's transformers (4.57 or newer), on its own.

No token is dropped: an expert takes all tokens that are routed to it.

Shapes: B batch, S new tokens, H hidden, T = B * S tokens, E experts, K experts of each token.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast

from .attention_gpt_moe import GPTMoEAttention, SideOutputs, causal_mask, check_arguments, check_packing, the_cache
from .configuration_gpt_moe import GPTMoEConfig

try:
    from transformers.integrations.moe import use_experts_implementation

    if "has_gate" not in inspect.signature(use_experts_implementation).parameters:
        raise ImportError("experts without a gate came with transformers 5.4")
except ImportError:

    def use_experts_implementation(*_: Any, **__: Any) -> Any:
        """Before transformers 5.4: the experts' own ``forward`` is all there is."""
        return lambda experts_class: experts_class


# 5.24 renamed the cache in outputs
CACHE = "cache" if "cache" in MoeModelOutputWithPast.__dataclass_fields__ else "past_key_values"


class GPTMoEMLP(nn.Module):
    """A dense feed-forward."""

    def __init__(self, config: GPTMoEConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.hidden_size, config.intermediate_size)
        self.c_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class GPTMoERouter(nn.Linear):
    """Logits in fp32. A module of its own: accelerate fetches weights from a disk when their module is called."""

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        return F.linear(x_TH.float(), self.weight.float())


class GPTMoEBuffer(nn.Module):
    """A vector that was learned outside of gradient descent; None in a model without it.

    It is fp32 in a model of any format: rounded, it would choose other experts. So it is a buffer, as transformers
    rounds parameters on a disk. It is NaN until it is loaded.
    """

    name: str

    def __init__(self, size: int | None) -> None:
        super().__init__()
        self.register_buffer(self.name, None if size is None else torch.full((size,), torch.nan, dtype=torch.float32))
        self.is_loaded = False

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "GPTMoEBuffer":
        before = getattr(self, self.name)
        super()._apply(fn, recurse)
        after = getattr(self, self.name)
        if before is not None and after.dtype != before.dtype:
            setattr(self, self.name, before.to(after.device))
        return self

    def loaded(self) -> torch.Tensor | None:
        buffer = getattr(self, self.name)
        if buffer is not None and not (torch.jit.is_tracing() or torch.compiler.is_compiling() or self.is_loaded):
            if buffer.isnan().any():
                raise ValueError(
                    f"{self.name} was not loaded: the model's folder lacks it, or the layer is on a disk, where "
                    "transformers 4 does not load buffers; use transformers 5, or a device_map without a disk"
                )
            self.is_loaded = True
        return buffer


class GPTMoEBalancer(GPTMoEBuffer):
    """Scores for the choice of experts: logits, plus a bias for each expert with ``router_expert_bias``."""

    name = "expert_bias"

    def forward(self, logits_TE: torch.Tensor) -> torch.Tensor:
        bias_E = self.loaded()
        return logits_TE if bias_E is None else logits_TE.detach() + bias_E


class GPTMoECentering(GPTMoEBuffer):
    """The router's input, minus its mean in training with ``router_center_input``."""

    name = "input_mean"

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        mean_H = self.loaded()
        return x_TH if mean_H is None else x_TH.float() - mean_H


@use_experts_implementation(has_gate=False, has_bias=True, is_transposed=True)
class GPTMoEExperts(nn.Module):
    """Feed-forwards, stacked. transformers 5.4 and newer replace ``forward`` as ``experts_implementation`` says."""

    def __init__(self, config: GPTMoEConfig, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.up_proj = nn.Parameter(torch.empty(num_experts, config.hidden_size, config.intermediate_size))
        self.up_proj_bias = nn.Parameter(torch.empty(num_experts, config.intermediate_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, config.intermediate_size, config.hidden_size))
        self.down_proj_bias = nn.Parameter(torch.empty(num_experts, config.hidden_size))
        self.act_fn = nn.GELU(approximate="tanh")

    def forward(self, x_TH: torch.Tensor, expert_TK: torch.Tensor, gate_TK: torch.Tensor) -> torch.Tensor:
        """One expert after the other: the weighted sum of each token's experts, [T, H]; sums are in fp32."""
        y_TH = torch.zeros_like(x_TH, dtype=torch.float32)
        traced = torch.jit.is_tracing() or torch.compiler.is_compiling()  # other inputs take other experts
        for number in range(self.num_experts) if traced else expert_TK.unique().tolist():
            token, choice = (expert_TK == number).nonzero(as_tuple=True)
            h = self.act_fn(F.linear(x_TH[token], self.up_proj[number].T, self.up_proj_bias[number]))
            output = F.linear(h, self.down_proj[number].T, self.down_proj_bias[number])
            y_TH = y_TH.index_add(0, token, output.float() * gate_TK[token, choice, None])
        return y_TH.to(x_TH.dtype)


class GPTMoESparseMLP(nn.Module):
    """Each token's K experts with the highest scores, weighted by the softmax of logits; with ``residual_moe`` mixed
    with a dense feed-forward."""

    def __init__(self, config: GPTMoEConfig, num_experts: int) -> None:
        super().__init__()
        self.topk = config.num_experts_per_tok
        self.router = GPTMoERouter(config.hidden_size, num_experts, bias=False)
        self.balancer = GPTMoEBalancer(num_experts if config.router_expert_bias else None)
        self.centering = GPTMoECentering(config.hidden_size if config.router_center_input else None)
        self.experts = GPTMoEExperts(config, num_experts)
        self.dense = GPTMoEMLP(config) if config.residual_moe else None
        if config.residual_moe:
            self.coefficient = nn.Linear(config.hidden_size, 2)

    def forward(self, x_BSH: torch.Tensor, side_outputs: SideOutputs | None = None) -> torch.Tensor:
        x_TH = x_BSH.reshape(-1, x_BSH.size(-1))
        logits_TE = self.router(self.centering(x_TH))
        if side_outputs is not None:
            side_outputs.router_logits = logits_TE
        expert_TK = choose(self.balancer(logits_TE), self.topk)
        gate_TK = logits_TE.softmax(-1).gather(1, expert_TK)
        if self.topk > 1:
            gate_TK = gate_TK / gate_TK.sum(-1, keepdim=True)
        y_BSH = self.experts(x_TH, expert_TK, gate_TK).view(x_BSH.shape)
        if self.dense is not None:
            c = self.coefficient(x_BSH).softmax(-1)
            y_BSH = y_BSH * c[..., :1] + self.dense(x_BSH) * c[..., 1:]
        return y_BSH


def choose(scores_TE: torch.Tensor, topk: int) -> torch.Tensor:
    """The K experts with the highest scores, int64 [T, K], best first; among equals the lowest number."""
    left_TE, choices = scores_TE.detach(), []
    for _ in range(topk):
        choices.append(left_TE.argmax(-1, keepdim=True))
        left_TE = left_TE.scatter(1, choices[-1], -torch.inf)
    return torch.cat(choices, dim=1)


class GPTMoEBlock(nn.Module):
    def __init__(self, config: GPTMoEConfig, layer_idx: int) -> None:
        super().__init__()
        experts = config.experts_per_layer[layer_idx]
        self.is_sparse = experts > 1
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = GPTMoEAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = GPTMoESparseMLP(config, experts) if self.is_sparse else GPTMoEMLP(config)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self,
        x_BSH: torch.Tensor,
        attention_mask: Any = None,
        past_key_values: Any = None,
        side_outputs: SideOutputs | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        x_BSH = x_BSH + self.dropout(
            self.attn(self.ln_1(x_BSH), attention_mask, past_key_values, side_outputs, **kwargs)
        )
        out_BSH = self.ln_2(x_BSH)
        out_BSH = self.mlp(out_BSH, side_outputs) if self.is_sparse else self.mlp(out_BSH)
        return x_BSH + self.dropout(out_BSH)


class GPTMoEPreTrainedModel(PreTrainedModel):
    config: GPTMoEConfig
    config_class = GPTMoEConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GPTMoEBlock"]  # noqa: RUF012 (transformers declares lists)
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_attention_backend = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=std)
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
        if getattr(module, "bias", None) is not None and isinstance(module, nn.Linear | nn.LayerNorm):
            nn.init.zeros_(module.bias)
        if isinstance(module, GPTMoEBuffer) and getattr(module, module.name) is not None:
            nn.init.constant_(getattr(module, module.name), torch.nan)
        if isinstance(module, GPTMoEExperts):
            for name, parameter in module.named_parameters():
                if name.endswith("_bias"):
                    nn.init.zeros_(parameter)
                else:
                    nn.init.normal_(parameter, mean=0.0, std=std)


class GPTMoEModel(GPTMoEPreTrainedModel):
    """The layers, without the head."""

    def __init__(self, config: GPTMoEConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wpe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(GPTMoEBlock(config, i) for i in range(config.num_hidden_layers))
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.wte = value

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast | tuple:
        """``cache`` is transformers 5.24's name of ``past_key_values``; ``kwargs`` go to the attention."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() not in (2, 4):
            raise ValueError(f"attention_mask is {list(attention_mask.shape)}; expected [batch, cached and new tokens]")
        check_arguments(kwargs)
        past_key_values = the_cache(past_key_values, cache)
        if past_key_values is None:
            check_packing("flash" in (self.config._attn_implementation or ""), attention_mask, position_ids, kwargs)
        keep_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        if keep_attentions and self.config._attn_implementation != "eager":
            raise ValueError(
                f"output_attentions needs attn_implementation='eager', but it is "
                f"{self.config._attn_implementation!r}: give the former to from_pretrained"
            )
        keep_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        embeds_BSH: torch.Tensor = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        recompute = self.gradient_checkpointing and self.training
        use_cache = (self.config.use_cache if use_cache is None else use_cache) and not recompute

        S, device = embeds_BSH.size(1), embeds_BSH.device
        slots_S = kwargs.pop("cache_position", None)  # version 4 gives it
        if slots_S is None:
            slots_S = torch.arange(S, device=device)
            # a paged cache has no length, and comes with position_ids
            if past_key_values is not None and hasattr(past_key_values, "get_seq_length"):
                slots_S = slots_S + past_key_values.get_seq_length()
        mask = causal_mask(self.config, embeds_BSH, attention_mask, past_key_values, slots_S, position_ids)
        if position_ids is None:
            position_ids = slots_S[None]
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        kwargs |= {"position_ids": position_ids, "cache_position": slots_S}

        x_BSH = self.drop(embeds_BSH + self.wpe(position_ids).to(device))
        hidden_states, router_logits, attentions = [], [], []
        for block in self.h:
            run = partial(run_block, block, attention_mask=mask, past_key_values=past_key_values, **kwargs)
            if recompute:
                run = partial(self._gradient_checkpointing_func, run)
            if keep_states:
                hidden_states.append(x_BSH)
            x_BSH, logits_TE, probabilities = run(x_BSH)
            if logits_TE is not None:
                router_logits.append(logits_TE)
            if keep_attentions:
                attentions.append(probabilities)
        x_BSH = self.ln_f(x_BSH)
        output = MoeModelOutputWithPast(
            last_hidden_state=x_BSH,
            hidden_states=(*hidden_states, x_BSH) if keep_states else None,
            attentions=tuple(attentions) if keep_attentions else None,
            router_logits=tuple(router_logits),
            **{CACHE: past_key_values if use_cache else None},
        )
        return output.to_tuple() if return_dict is False else output


def run_block(
    block: GPTMoEBlock, x_BSH: torch.Tensor, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """A block's output, router logits and attention probabilities; all are outputs, as recomputation needs them."""
    side_outputs = SideOutputs()
    return block(x_BSH, side_outputs=side_outputs, **kwargs), side_outputs.router_logits, side_outputs.attentions


class GPTMoEForCausalLM(GPTMoEPreTrainedModel, GenerationMixin):
    """The model with its head, which is the token table."""

    # its form changed with version 5
    _tied_weights_keys: Any = (
        {"lm_head.weight": "transformer.wte.weight"}
        if int(transformers.__version__.split(".")[0]) >= 5
        else ["lm_head.weight"]
    )

    def __init__(self, config: GPTMoEConfig) -> None:
        super().__init__(config)
        self.transformer = GPTMoEModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.num_experts = config.num_experts  # with version 4, TRL looks for both here
        self.num_experts_per_tok = config.num_experts_per_tok
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        past_key_values=None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Any = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast | tuple:
        """``cache`` is transformers 5.24's name of ``past_key_values``; ``kwargs`` go to the attention and the loss."""
        out = self.transformer(
            input_ids, past_key_values, attention_mask, position_ids, inputs_embeds, use_cache, output_hidden_states,
            output_attentions, cache=cache, **kwargs,
        )  # fmt: skip
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        aux_loss = None
        if out.router_logits and (output_router_logits or self.training):
            mlps = [block.mlp for block in self.transformer.h]
            balancers = [mlp.balancer for mlp in mlps if isinstance(mlp, GPTMoESparseMLP)]
            balance = (
                balance_loss(layer, choose(balancer(layer), self.config.num_experts_per_tok)).to(logits.device)
                for layer, balancer in zip(out.router_logits, balancers, strict=True)
            )
            aux_loss = sum(balance, logits.new_zeros((), dtype=torch.float32))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
            if self.training and aux_loss is not None:
                z_loss = sum(layer.logsumexp(-1).square().mean().to(loss.device) for layer in out.router_logits)
                loss = loss + self.config.router_aux_loss_coef * aux_loss + self.config.router_z_loss_coef * z_loss
        output = MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss if output_router_logits else None,
            logits=logits,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            router_logits=out.router_logits if output_router_logits else None,
            **{CACHE: getattr(out, CACHE)},
        )
        return output.to_tuple() if return_dict is False else output


def balance_loss(logits_TE: torch.Tensor, expert_TK: torch.Tensor) -> torch.Tensor:
    """E * sum over experts of (mean probability) * (share of the choices); of two choices only the first counts."""
    counted_TK = expert_TK[:, :1] if expert_TK.size(1) == 2 else expert_TK
    share_E = F.one_hot(counted_TK.flatten(), logits_TE.size(1)).float().mean(0)
    return logits_TE.size(1) * torch.sum(logits_TE.softmax(-1).mean(0) * share_E)
