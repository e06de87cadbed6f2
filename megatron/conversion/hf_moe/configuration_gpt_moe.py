"""Configuration of a GPT with mixtures of experts."""

from collections.abc import Sequence

from transformers import PretrainedConfig


class GPTMoEConfig(PretrainedConfig):
    """A GPT-2 of which some feed-forward layers are mixtures of experts, or which normalizes queries and keys.

    Args:
        experts_per_layer: experts of each layer; 1 is a dense feed-forward.
        num_experts: the largest of ``experts_per_layer``, for libraries that look for one number.
        num_experts_per_tok: experts that process each token. With one, its output is multiplied by its probability;
            with several, by their probabilities divided by their sum.
        residual_moe: whether an MoE layer also has a dense feed-forward, mixed in by learned coefficients.
        qk_layernorm: whether queries and keys are normalized, each head by itself, before attention.
        router_expert_bias: whether each expert has a bias, which is added to its logit for the choice of experts only.
        router_center_input: whether the mean that the router's input had in training is subtracted from it.
            It is learned in pretraining and fixed in fine-tuning.
        router_aux_loss_coef: coefficient of the load-balancing loss in training.
        router_z_loss_coef: coefficient of the router z-loss in training.
    """

    model_type = "gpt_moe"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 (transformers' Trainer adds a list)
    attribute_map = {"num_local_experts": "num_experts"}  # noqa: RUF012

    def __init__(
        self,
        vocab_size: int = 50304,
        hidden_size: int = 1024,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        intermediate_size: int = 4096,
        max_position_embeddings: int = 2048,
        experts_per_layer: Sequence[int] | None = None,
        num_experts: int | None = None,
        num_experts_per_tok: int = 1,
        residual_moe: bool = False,
        qk_layernorm: bool = False,
        router_expert_bias: bool = False,
        router_center_input: bool = False,
        router_aux_loss_coef: float = 0.01,
        router_z_loss_coef: float = 0.0,
        embd_pdrop: float = 0.1,
        resid_pdrop: float = 0.1,
        attn_pdrop: float = 0.1,
        layer_norm_epsilon: float = 1e-5,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        output_router_logits: bool = False,
        tie_word_embeddings: bool = True,
        **kwargs,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.experts_per_layer = list(experts_per_layer or [1] * num_hidden_layers)
        if len(self.experts_per_layer) != num_hidden_layers:
            raise ValueError(
                f"experts_per_layer has {len(self.experts_per_layer)} numbers for {num_hidden_layers} layers"
            )
        self.num_experts = max(self.experts_per_layer)
        if num_experts not in (None, self.num_experts):
            raise ValueError(f"num_experts is {num_experts}; the largest of experts_per_layer is {self.num_experts}")
        self.num_experts_per_tok = num_experts_per_tok
        self.residual_moe = residual_moe
        self.qk_layernorm = qk_layernorm
        self.router_expert_bias = router_expert_bias
        self.router_center_input = router_center_input
        self.router_aux_loss_coef = router_aux_loss_coef
        self.router_z_loss_coef = router_z_loss_coef
        self.embd_pdrop = embd_pdrop
        self.resid_pdrop = resid_pdrop
        self.attn_pdrop = attn_pdrop
        self.layer_norm_epsilon = layer_norm_epsilon
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.output_router_logits = output_router_logits
        kwargs["tie_word_embeddings"] = tie_word_embeddings
        super().__init__(**kwargs)
