"""A configuration in which nothing is wrong, and what is wrong with it after changes."""

from megatron.config.run import build
from megatron.config.validation import ConfigError, validate_numbers

GOOD = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 32, "train_tokens": 10**6}
GOOD |= {"micro_batch_size": 2, "global_batch_size": 16}
MOE = {"num_experts": (8,), "moe_expert_parallel_size": (2,)}


def problems(values: dict, world_size: int = 4) -> tuple[str, ...]:
    try:
        validate_numbers(build(GOOD | values), world_size)
    except ConfigError as error:
        return error.problems
    return ()
