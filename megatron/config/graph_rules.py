"""What a micro-batch that is to be one CUDA graph needs of the rest of a configuration."""

from collections.abc import Iterator

from megatron.config.run import RunConfig


def graph_problems(config: RunConfig) -> Iterator[str]:
    """What cannot be recorded, or is not.

    A graph repeats kernels on the same memory: no shape may follow from the data, and the host may not look at it.
    """
    training, parallel, moe = config.training, config.parallel, config.moe
    if not training.cuda_graphs:
        return
    flag = "--cuda-graphs"
    if training.device == "cpu":
        yield f"{flag} must have a GPU, and --device is cpu; drop one of the two"
    if config.optimizer.precision != "bf16":
        yield f"{flag} must have --bf16, and the precision is {config.optimizer.precision}; drop it, or use --bf16"
    if config.optimizer.optimizer_cpu_offload:
        yield f"{flag} does not go with --optimizer-cpu-offload, which takes gradients one by one; drop one of the two"
    for option, size in (
        ("--tensor-model-parallel-size", parallel.tensor_model_parallel_size),
        ("--pipeline-model-parallel-size", parallel.pipeline_model_parallel_size),
    ):
        if size > 1:
            yield (
                f"{flag} must have neither tensor nor pipeline parallelism, and {option} is {size}; use {option} 1, or"
                f" drop {flag}"
            )
    if config.data.reset_attention_mask:
        yield (
            f"{flag} does not go with --reset-attention-mask: how many documents a micro-batch has follows from the"
            " data; drop one of the two"
        )
    if not moe.enabled:
        return
    if not moe.moe_token_dropping:
        yield (
            f"{flag} must have experts of fixed capacity, and --disable-moe-token-dropping gives them as many rows as"
            " there are tokens; drop one of the two"
        )
    elif moe.topk == 1 and moe.moe_rts and moe.moe_noise_policy is not None:
        yield (
            f"{flag}: with --moe-noise-policy {moe.moe_noise_policy} the random choice of the tokens that top-1 experts"
            " keep waits for the GPU; use --no-moe-rts, or drop the noise"
        )
