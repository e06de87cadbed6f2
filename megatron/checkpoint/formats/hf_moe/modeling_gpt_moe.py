"""A GPT with mixtures of experts for Hugging Face's transformers (4.57 or newer), on its own.

No token is dropped: an expert takes all tokens that are routed to it.

Letters: B batch, S new tokens, M cached and new tokens, N heads, D head size, H hidden, T = B * S tokens, E experts,
K experts of each token.
"""

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast

from .configuration_gpt_moe import GPTMoEConfig


class Positions:
    """Where the new tokens stand, and what each may look at."""

    def __init__(self, slots_S: torch.Tensor, keep: torch.Tensor | None, plain: bool) -> None:
        self.slots_S = slots_S  # places in the cache
        self._keep = keep  # [B, M], 0 where a token is padding; or the whole mask, [B, 1, S, M]
        self._plain = plain  # nothing cached, nothing padded: causal attention as it is
        self._masks: dict = {}

    def mask(self, keys: int, device: torch.device) -> torch.Tensor | None:
        """Bool [B or 1, 1, S, M], True where a token may look; None for plain causal attention."""
        if self._plain and keys == len(self.slots_S):
            return None
        if self._keep is not None and self._keep.dim() == 4:
            return self._keep.to(device)
        if (keys, device) not in self._masks:
            slots_S1, key_M = self.slots_S.to(device)[:, None], torch.arange(keys, device=device)
            allowed = (key_M <= slots_S1)[None]  # (1, S, M)
            if self._keep is not None:
                keep_BM = self._keep.to(device).bool()
                keep_BM = F.pad(keep_BM, (0, max(keys - keep_BM.size(1), 0)), value=True)[:, :keys]
                # padding looks at itself, so that no row is empty
                allowed = allowed & keep_BM[:, None] | (key_M == slots_S1)[None]
            self._masks[keys, device] = allowed[:, None]
        return self._masks[keys, device]


class GPTMoEAttention(nn.Module):
    def __init__(self, config: GPTMoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.dropout = config.attn_pdrop
        self.layer_idx = layer_idx
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x_BSH: torch.Tensor, positions: Positions, past_key_values=None) -> torch.Tensor:
        B, S, _ = x_BSH.shape
        qkv = self.c_attn(x_BSH).view(B, S, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, N, S, D)
        if past_key_values is not None:
            # version 4's caches of fixed size ask for the slots; others take no notice
            k, v = past_key_values.update(k, v, self.layer_idx, {"cache_position": positions.slots_S})
        mask = positions.mask(k.size(2), q.device)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None)
        return self.c_proj(y.transpose(1, 2).reshape(B, S, -1))


class GPTMoEMLP(nn.Module):
    """A dense feed-forward; each expert is one, too."""

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


class GPTMoESparseMLP(nn.Module):
    """Each token's K likeliest experts, weighted; with ``residual_moe`` mixed with a dense feed-forward."""

    def __init__(self, config: GPTMoEConfig, num_experts: int) -> None:
        super().__init__()
        self.topk = config.num_experts_per_tok
        self.router = GPTMoERouter(config.hidden_size, num_experts, bias=False)
        self.experts = nn.ModuleList(GPTMoEMLP(config) for _ in range(num_experts))
        self.dense = GPTMoEMLP(config) if config.residual_moe else None
        if config.residual_moe:
            self.coefficient = nn.Linear(config.hidden_size, 2)

    def forward(self, x_BSH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The output, [B, S, H], and the router's logits in fp32, [T, E]."""
        x_TH = x_BSH.reshape(-1, x_BSH.size(-1))
        logits_TE = self.router(x_TH)
        expert_TK = choose(logits_TE, self.topk)
        gate_TK = logits_TE.softmax(-1).gather(1, expert_TK)
        if self.topk > 1:
            gate_TK = gate_TK / gate_TK.sum(-1, keepdim=True)
        y_TH = torch.zeros_like(x_TH, dtype=torch.float32)
        for number in expert_TK.unique().tolist():
            token, choice = (expert_TK == number).nonzero(as_tuple=True)
            answer = self.experts[number](x_TH[token])
            y_TH = y_TH.index_add(0, token, answer.float() * gate_TK[token, choice, None])
        y_BSH = y_TH.to(x_BSH.dtype).view(x_BSH.shape)
        if self.dense is not None:
            c = self.coefficient(x_BSH).softmax(-1)
            y_BSH = y_BSH * c[..., :1] + self.dense(x_BSH) * c[..., 1:]
        return y_BSH, logits_TE


def choose(logits_TE: torch.Tensor, topk: int) -> torch.Tensor:
    """The K experts with the highest logits, int64 [T, K], best first; among equals the lowest number."""
    left_TE, choices = logits_TE.detach(), []
    for _ in range(topk):
        choices.append(left_TE.argmax(-1, keepdim=True))
        left_TE = left_TE.scatter(1, choices[-1], -torch.inf)
    return torch.cat(choices, dim=1)


class GPTMoEBlock(nn.Module):
    def __init__(self, config: GPTMoEConfig, layer_idx: int) -> None:
        super().__init__()
        experts = config.experts_per_layer[layer_idx]
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = GPTMoEAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = GPTMoESparseMLP(config, experts) if experts > 1 else GPTMoEMLP(config)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self, x_BSH: torch.Tensor, positions: Positions, past_key_values=None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        x_BSH = x_BSH + self.dropout(self.attn(self.ln_1(x_BSH), positions, past_key_values))
        out, logits_TE = self.mlp(self.ln_2(x_BSH)), None
        if isinstance(out, tuple):
            out, logits_TE = out
        return x_BSH + self.dropout(out), logits_TE


class GPTMoEPreTrainedModel(PreTrainedModel):
    config_class = GPTMoEConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ("GPTMoEBlock",)
    _skip_keys_device_placement = "past_key_values"
    _supports_sdpa = True
    _supports_cache_class = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
        if getattr(module, "bias", None) is not None and isinstance(module, nn.Linear | nn.LayerNorm):
            nn.init.zeros_(module.bias)


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
        past_key_values=None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> MoeModelOutputWithPast | tuple:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError("attention probabilities are not kept by this model; drop output_attentions")
        if attention_mask is not None and attention_mask.dim() not in (2, 4):
            raise ValueError(f"attention_mask is {list(attention_mask.shape)}; expected [batch, cached and new tokens]")
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
        recompute = self.gradient_checkpointing and self.training
        use_cache = (self.config.use_cache if use_cache is None else use_cache) and not recompute
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        S, device = inputs_embeds.size(1), inputs_embeds.device
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        slots_S = torch.arange(past, past + S, device=device)
        if position_ids is None:
            position_ids = slots_S[None]
        positions = Positions(slots_S, attention_mask, plain=past == 0 and attention_mask is None)
        x_BSH = self.drop(inputs_embeds + self.wpe(position_ids).to(device))
        keep = output_hidden_states or (output_hidden_states is None and self.config.output_hidden_states)
        hidden_states, router_logits = [], []
        for block in self.h:
            hidden_states.append(x_BSH)
            if recompute:
                x_BSH, logits_TE = self._gradient_checkpointing_func(block.__call__, x_BSH, positions)
            else:
                x_BSH, logits_TE = block(x_BSH, positions, past_key_values=past_key_values)
            if logits_TE is not None:
                router_logits.append(logits_TE)
        x_BSH = self.ln_f(x_BSH)
        output = MoeModelOutputWithPast(
            last_hidden_state=x_BSH,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*hidden_states, x_BSH) if keep else None,
            router_logits=tuple(router_logits),
        )
        return output.to_tuple() if return_dict is False else output


class GPTMoEForCausalLM(GPTMoEPreTrainedModel, GenerationMixin):
    """The model with its head, which is the token table."""

    # its form changed with version 5
    _tied_weights_keys = (
        {"lm_head.weight": "transformer.wte.weight"}
        if int(transformers.__version__.split(".")[0]) >= 5
        else ["lm_head.weight"]
    )

    def __init__(self, config: GPTMoEConfig) -> None:
        super().__init__(config)
        self.transformer = GPTMoEModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
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
        **kwargs,
    ) -> MoeCausalLMOutputWithPast | tuple:
        out = self.transformer(
            input_ids, past_key_values, attention_mask, position_ids, inputs_embeds, use_cache, output_hidden_states,
            output_attentions,
        )  # fmt: skip
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        aux_loss = None
        if out.router_logits and (output_router_logits or self.training):
            aux_loss = sum(
                balance_loss(layer, self.config.num_experts_per_tok).to(logits.device) for layer in out.router_logits
            )
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
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            router_logits=out.router_logits if output_router_logits else None,
        )
        return output.to_tuple() if return_dict is False else output


def balance_loss(logits_TE: torch.Tensor, topk: int) -> torch.Tensor:
    """E * sum over experts of (mean probability) * (share of the choices); of two choices only the first counts."""
    expert_TK = choose(logits_TE, topk)
    counted_TK = expert_TK[:, :1] if topk == 2 else expert_TK
    share_E = F.one_hot(counted_TK.flatten(), logits_TE.size(1)).float().mean(0)
    return logits_TE.size(1) * torch.sum(logits_TE.softmax(-1).mean(0) * share_E)
