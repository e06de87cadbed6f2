"""What the exchange of tokens between experts' processes needs of the rest of a configuration."""

from collections.abc import Iterator

from megatron.config.run import RunConfig


def exchange_problems(config: RunConfig) -> Iterator[str]:
    """Options of the exchange that would have no effect."""
    parallel, moe = config.parallel, config.moe
    if not moe.enabled:
        return
    if parallel.enable_expert_tensor_parallelism and parallel.tensor_model_parallel_size == 1:
        yield (
            "--enable-expert-tensor-parallelism must have tensor-parallel processes to share experts over; use"
            " --tensor-model-parallel-size 2 or more, or drop it"
        )
    chunks = f"--moe-overlap-chunks {parallel.moe_overlap_chunks}"
    for flag, given in (
        ("--moe-hierarchical-all-to-all", parallel.moe_hierarchical_all_to_all),
        (chunks, parallel.moe_overlap_chunks > 1),
    ):
        if given and max(parallel.moe_expert_parallel_size) == 1:
            yield (
                f"{flag} must have processes that exchange tokens; use --moe-expert-parallel-size 2 or more, or drop it"
            )
    if parallel.moe_overlap_chunks > 1 and not moe.moe_token_dropping:
        yield (
            f"{chunks} must have buffers of fixed capacity to cut, and --disable-moe-token-dropping has none; use"
            " --moe-overlap-chunks 1, or let tokens be dropped"
        )
