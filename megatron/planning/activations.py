"""What a layer keeps for its backward pass, in closed form.

In numbers a token, in the number format of the computation; compiled layers keep as much as plain ones:

    attention        H before the norm, H after it, 3 H of Q, K and V, H of the heads' output; 2 H more with QK norms
    feed-forward     H before the norm, H after it, F before and F after GELU
    experts          H before the norm, H after it, and for each row of their buffers H, F before and F after GELU

That is a top-1 layer with a capacity on one process, one function of kernels. Other layers also keep the expert
outputs, H for each row; kernels then do not keep the F after GELU, and plain torch keeps above top-1 the tokens as they
were sent, K H. A router in plain torch keeps the tokens in fp32 and a few tensors of [T, E].

Shapes: T tokens of a micro-batch, H hidden, F inner size, E experts, K top-k.
"""

from megatron.config import RunConfig
from megatron.moe.kernels.support import supports
from megatron.moe.plan import expert_capacity
from megatron.moe.spec import LayerSpec
from megatron.parallel.groups import ExpertGroup, TensorGroup

FP32 = 4
SCORES = 4  # fp32 tensors of [T, E] that a router in plain torch keeps


def width(config: RunConfig) -> int:
    """Bytes of a number of the computation."""
    return FP32 if config.optimizer.precision == "fp32" else 2


def stream_bytes(config: RunConfig) -> float:
    """Bytes of a micro-batch's residual stream, all tokens."""
    return config.training.micro_batch_size * config.model.seq_length * config.model.hidden_size * width(config)


def own_stream_bytes(config: RunConfig) -> float:
    """The same of this process: with sequence parallelism its piece of it."""
    parallel = config.parallel
    return stream_bytes(config) / (parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1)


def kept_by_layer(config: RunConfig, layer: int, *, kernels: bool = True) -> float:
    """Bytes that layer number ``layer`` keeps for the backward pass of one micro-batch, without recomputation.

    Args:
        config: of a valid run.
        layer: from 0.
        kernels: whether the Triton kernels can be used, on GPUs from Ampere on.
    """
    model, moe, tensor, size = config.model, config.moe, config.parallel.tensor_model_parallel_size, width(config)
    tokens = config.training.micro_batch_size * model.seq_length
    stream, own = stream_bytes(config), own_stream_bytes(config)
    norms = 4 * own + 4 * FP32 * tokens  # inputs, outputs, statistics
    attention = 4 * stream / tensor + tokens * model.num_attention_heads / tensor * FP32
    if model.qk_layernorm:  # Q and K after their norms, statistics of each head
        attention += 2 * stream / tensor + 4 * tokens * model.num_attention_heads / tensor * FP32
    masks = 2 * own / size if model.hidden_dropout > 0 else 0.0  # one byte an element
    of_experts = inner_units_of_experts(config, layer)
    kept = norms + attention + masks + 2 * (inner_units(config, layer) - of_experts) * size
    experts = moe.experts_of_layer(layer)
    if experts == 1:
        return kept
    rows, choices = rows_of_experts(config, layer)
    kept += (rows * model.hidden_size + of_experts) * size
    residual = moe.mlp_type == "residual"
    if residual:
        kept += 2 * own
    if kernels and uses_kernel("top1_layer", config, layer):
        return kept + of_experts * size
    if kernels:
        kept += rows * model.hidden_size * size
    else:
        kept += (of_experts + choices * model.hidden_size * (1 if moe.topk == 1 else 2)) * size
    if not (kernels and uses_kernel("route", config, layer)):
        kept += SCORES * tokens * experts * FP32
        if size < FP32:
            kept += own / size * FP32
            # of those who read the norm's output none keeps it
            kept -= own if (kernels or moe.topk > 1) and not residual else 0.0
    return kept


def inner_units(config: RunConfig, layer: int) -> float:
    """Outputs of the first products of a layer's feed-forwards on one process."""
    moe = config.moe
    dense = config.training.micro_batch_size * config.model.seq_length * config.model.ffn_size
    has_dense = moe.experts_of_layer(layer) == 1 or moe.mlp_type == "residual"
    shared = dense / config.parallel.tensor_model_parallel_size if has_dense else 0.0
    return shared + inner_units_of_experts(config, layer)


def inner_units_of_experts(config: RunConfig, layer: int) -> float:
    """Those of its experts; 0 for a dense layer."""
    if config.moe.experts_of_layer(layer) == 1:
        return 0.0
    parallel = config.parallel
    cut = parallel.tensor_model_parallel_size if parallel.enable_expert_tensor_parallelism else 1
    return rows_of_experts(config, layer)[0] * config.model.ffn_size / cut


def rows_of_experts(config: RunConfig, layer: int) -> tuple[int, int]:
    """Rows of H numbers that a process's experts compute in an MoE layer, and its own tokens' choices.

    Of a layer with a capacity the first are slots, full or not. Dropless layers are counted as if every expert got
    equally many tokens.
    """
    moe, parallel = config.moe, config.parallel
    tokens = config.training.micro_batch_size * config.model.seq_length
    share = 1 if parallel.enable_expert_tensor_parallelism else parallel.tensor_model_parallel_size
    if not moe.moe_token_dropping:
        rows = -(-tokens * moe.topk // share)
        return rows, rows
    experts = moe.experts_of_layer(layer)
    capacity = expert_capacity(tokens, experts, moe.topk, moe.moe_train_capacity_factor, moe.moe_min_capacity)
    return experts * -(-capacity // share), tokens * moe.topk


def uses_kernel(kernel: str, config: RunConfig, layer: int) -> bool:
    """Whether an MoE layer in training uses a kernel of :mod:`megatron.moe.kernels.support`, where kernels can run."""
    parallel = config.parallel
    tensor_group = TensorGroup(
        parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        shard_experts=parallel.enable_expert_tensor_parallelism,
    )
    expert_group = ExpertGroup(config.expert_parallel_degree(layer), 0, None)
    experts = config.moe.experts_of_layer(layer)
    return supports(kernel, LayerSpec(config.model, config.moe, experts, expert_group, tensor_group, training=True))
