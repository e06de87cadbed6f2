"""Everything that can be wrong with a run's configuration, found before the first step.

Three layers: values by themselves (types and ranges, from tables), numbers that must fit each other and the number of
processes (the rules), and files that must exist. A rule runs only if the values it reads are right by themselves, and
all problems are reported at once. Each names what was got, the rule with its numbers, and the nearest valid choice.
"""

import math
from collections.abc import Callable, Iterable, Iterator

from megatron.config.batch_rules import batch_problems, count_replicas, rampup_problems, train_tokens_problems
from megatron.config.checkpoint_rules import change_blend_problems, finetune_problems, save_problems
from megatron.config.corpora import data_problems
from megatron.config.errors import ConfigError, around, divisors, multiples, remainder
from megatron.config.exchange_rules import exchange_problems
from megatron.config.expert_rules import expert_layer_problems, expert_parallel_problems
from megatron.config.files import file_problems
from megatron.config.graph_rules import graph_problems
from megatron.config.guard_rules import skip_problems, spike_problems
from megatron.config.optimizer_rules import (
    gradient_reduction_problems,
    loss_scale_problems,
    optimizer_state_problems,
    rates_problems,
    warmup_problems,
)
from megatron.config.options import OPTIONS, Option, flatten
from megatron.config.pipeline_rules import pipeline_problems
from megatron.config.run import RunConfig

__all__ = ["ConfigError", "validate", "validate_files", "validate_numbers"]

Rule = Callable[[RunConfig, int], Iterator[str]]

# (the rule in words, its test, the fix, the fields it holds for; of a tuple, for each element)
_RANGES: tuple[tuple[str, Callable[[float], bool], str, str], ...] = (
    ("at least 1", lambda x: x >= 1, "use 1 or more", """
        num_layers hidden_size num_attention_heads ffn_hidden_size seq_length max_position_embeddings
        make_vocab_size_divisible_by num_experts expert_interval topk moe_expert_parallel_size lr_decay_tokens
        moe_overlap_chunks tensor_model_parallel_size pipeline_model_parallel_size
        loss_scale_window hysteresis train_tokens micro_batch_size global_batch_size rampup_batch_size eval_iters
        max_skipped_updates exit_tokens log_interval profile_step spike_updates spike_restarts"""),
    ("at least 0", lambda x: x >= 0, "use 0 or more", """
        min_lr lr_warmup_tokens weight_decay clip_grad loss_scale initial_loss_scale_power moe_loss_coeff
        moe_z_loss_coeff moe_min_capacity check_replicas num_workers eval_interval save_interval keep_last"""),
    ("above 0", lambda x: x > 0, "use a positive number", """
        lr adam_eps init_method_std layernorm_epsilon min_loss_scale moe_train_capacity_factor
        moe_eval_capacity_factor distributed_timeout_minutes exit_duration_in_mins peak_tflops watchdog_min_seconds
        spike_sigmas"""),
    ("above 1", lambda x: x > 1, "use 10 or more", "watchdog_factor"),
    ("at least 4", lambda x: x >= 4, "use 4 or more", "spike_window"),
    ("at least 0 and below 1", lambda x: 0 <= x < 1, "use a fraction", """
        hidden_dropout attention_dropout adam_beta1 adam_beta2"""),
    ("from 0 to 4294967295", lambda x: 0 <= x < 2**32, "use a seed of 32 bits", "seed"),
)  # fmt: skip

_RULES: list[tuple[frozenset[str], Rule]] = []


def validate(config: RunConfig, world_size: int) -> None:
    """Check a configuration for a run of ``world_size`` processes.

    Raises:
        ConfigError: at least one problem; all of them are listed, one line each.
    """
    # a --data-path that cannot be parsed is a problem of both
    _raise(dict.fromkeys([*_number_problems(config, world_size), *file_problems(config)]))


def validate_numbers(config: RunConfig, world_size: int) -> None:
    """Like :func:`validate`, without looking at files."""
    _raise(_number_problems(config, world_size))


def validate_files(config: RunConfig) -> None:
    """Check that the files which the configuration names exist and that it names those which a run needs."""
    _raise(file_problems(config))


def _raise(problems: Iterable[str]) -> None:
    problems = list(problems)
    if problems:
        raise ConfigError(*problems)


def _number_problems(config: RunConfig, world_size: int) -> Iterator[str]:
    if world_size < 1:
        yield f"got {world_size} processes; a run needs at least 1"
        return
    wrong = set()
    for name, value in flatten(config).items():
        for problem in _value_problems(OPTIONS[name], value):
            wrong.add(name)
            yield problem
    for fields, rule in _RULES:
        if not fields & wrong:
            yield from rule(config, world_size)


def _value_problems(option: Option, value: object) -> Iterator[str]:
    """A value by itself: its type, choices and range."""
    try:
        if option.from_value(value) != value:
            raise ConfigError(f"got {value!r}; expected {'a tuple' if option.many else option.kind.__name__}")
    except ConfigError as error:
        yield f"{option.flag}: {error}"
        return
    if value is None:
        return
    for words, test, fix, fields in _RANGES:
        if option.name in fields.split() and not all(test(x) for x in (value if option.many else (value,))):
            unset = " or leave it out" if option.optional else ""
            default = f", such as the default {_words(option.default)}" if option.default is not None else ""
            yield f"{option.flag} {_words(value)} must be {words}; {fix}{default}{unset}"


def _rule(*fields: str) -> Callable[[Rule], Rule]:
    """Adds a rule over these fields."""

    def add(rule: Rule) -> Rule:
        _RULES.append((frozenset(fields), rule))
        return rule

    return add


def _words(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


@_rule("hidden_size", "num_attention_heads")
def _heads(config: RunConfig, world_size: int) -> Iterator[str]:
    hidden, heads = config.model.hidden_size, config.model.num_attention_heads
    if hidden % heads:
        yield (
            f"--num-attention-heads {heads} must divide --hidden-size {hidden} ({hidden} = {hidden // heads} x {heads}"
            f" + {hidden % heads}); use {around(heads, divisors(hidden))} heads"
        )


@_rule("tensor_model_parallel_size", "pipeline_model_parallel_size", "num_attention_heads", "num_layers")
def _model_parallel(config: RunConfig, world_size: int) -> Iterator[str]:
    tensor, stages = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    if world_size % (tensor * stages) == 0:
        return
    start = " or ".join(str(x) for x in multiples(world_size, tensor * stages))
    if world_size % stages == 0:
        sizes = divisors(math.gcd(config.model.num_attention_heads, world_size // stages))
        fix = f"--tensor-model-parallel-size {around(tensor, sizes)}"
    else:
        rest = world_size // tensor if world_size % tensor == 0 else world_size
        sizes = [x for x in divisors(rest) if x <= config.model.num_layers]
        fix = f"--pipeline-model-parallel-size {around(stages, sizes)}"
        fix += "" if world_size % tensor == 0 else " and --tensor-model-parallel-size 1"
    yield (
        f"--tensor-model-parallel-size {tensor} x --pipeline-model-parallel-size {stages} = {tensor * stages} must"
        f" divide the number of processes, {world_size} ({remainder(world_size, tensor * stages)}); start {start}"
        f" processes, or use {fix}"
    )


@_rule("tensor_model_parallel_size", "num_attention_heads", "hidden_size", "ffn_hidden_size")
def _tensor_parallel(config: RunConfig, world_size: int) -> Iterator[str]:
    size = config.parallel.tensor_model_parallel_size
    for flag, number in (
        ("--num-attention-heads", config.model.num_attention_heads),
        ("--ffn-hidden-size", config.model.ffn_size),
    ):
        if number % size:
            yield (
                f"--tensor-model-parallel-size {size} must divide {flag} {number} ({remainder(number, size)}); use"
                f" {around(size, divisors(number))}"
            )


@_rule("tensor_model_parallel_size", "sequence_parallel", "seq_length")
def _sequence_parallel(config: RunConfig, world_size: int) -> Iterator[str]:
    size, length = config.parallel.tensor_model_parallel_size, config.model.seq_length
    if not config.parallel.sequence_parallel:
        return
    if size == 1:
        yield (
            "--sequence-parallel must have tensor-parallel processes to split the sequence over; use"
            " --tensor-model-parallel-size 2 or more, or drop it"
        )
    elif length % size:
        yield (
            f"--sequence-parallel: --tensor-model-parallel-size {size} must divide --seq-length {length}"
            f" ({remainder(length, size)}); use --seq-length {around(length, multiples(length, size))}"
        )


@_rule(
    *("tensor_model_parallel_size", "enable_expert_tensor_parallelism", "num_experts", "moe_expert_parallel_size"),
    *("moe_hierarchical_all_to_all", "moe_overlap_chunks", "moe_token_dropping"),
)
def _exchange(config: RunConfig, world_size: int) -> Iterator[str]:
    yield from exchange_problems(config)


@_rule("seq_length", "max_position_embeddings")
def _positions(config: RunConfig, world_size: int) -> Iterator[str]:
    length, rows = config.model.seq_length, config.model.position_rows
    if length > rows:
        yield (
            f"--seq-length {length} must not exceed --max-position-embeddings {rows}; use --seq-length {rows}"
            f" or --max-position-embeddings {length}"
        )


@_rule("num_layers", "num_experts", "expert_interval", "moe_expert_parallel_size")
def _moe_layers(config: RunConfig, world_size: int) -> Iterator[str]:
    yield from expert_layer_problems(config)


@_rule("num_experts", "topk")
def _topk(config: RunConfig, world_size: int) -> Iterator[str]:
    topk = config.moe.topk
    fewest = min((count for count in config.moe.num_experts if count > 1), default=topk)
    if topk > fewest:
        yield f"--topk {topk} must not exceed the {fewest} experts of a layer; use --topk {fewest}"


@_rule("num_layers", "pipeline_model_parallel_size", "pipeline_layer_split")
def _pipeline(config: RunConfig, world_size: int) -> Iterator[str]:
    yield from pipeline_problems(config)


@_rule(
    *("num_layers", "num_experts", "expert_interval", "moe_expert_parallel_size"),
    *("tensor_model_parallel_size", "pipeline_model_parallel_size"),
)
def _expert_parallel(config: RunConfig, world_size: int) -> Iterator[str]:
    yield from expert_parallel_problems(config, world_size, *count_replicas(config, world_size))


@_rule("micro_batch_size", "global_batch_size", "tensor_model_parallel_size", "pipeline_model_parallel_size")
def _batch(config: RunConfig, world_size: int) -> Iterator[str]:
    yield from batch_problems(config, world_size)


@_rule(
    *("micro_batch_size", "global_batch_size", "rampup_batch_size"),
    *("tensor_model_parallel_size", "pipeline_model_parallel_size"),
)
def _rampup(config: RunConfig, world_size: int) -> Iterator[str]:
    yield from rampup_problems(config, world_size)


@_rule("train_tokens", "global_batch_size", "seq_length")
def _train_tokens(config: RunConfig, world_size: int) -> Iterator[str]:
    yield from train_tokens_problems(config)


@_rule("lr", "min_lr")
def _rates(config: RunConfig, world_size: int) -> Iterator[str]:
    yield from rates_problems(config)


@_rule("lr_warmup_tokens", "lr_decay_tokens", "train_tokens")
def _warmup(config: RunConfig, world_size: int) -> Iterator[str]:
    yield from warmup_problems(config)


@_rule("precision", "min_loss_scale", "initial_loss_scale_power", "loss_scale")
def _loss_scale(config: RunConfig, world_size: int) -> Iterator[str]:
    yield from loss_scale_problems(config)


@_rule("precision", "grad_reduce_in_bf16")
def _gradient_reduction(config: RunConfig, world_size: int) -> Iterator[str]:
    yield from gradient_reduction_problems(config)


@_rule("precision", "optimizer_name", "optimizer_cpu_offload", "exp_avg_dtype", "exp_avg_sq_dtype")
def _optimizer_state(config: RunConfig, world_size: int) -> Iterator[str]:
    yield from optimizer_state_problems(config)


@_rule("device", "distributed_backend")
def _backend(config: RunConfig, world_size: int) -> Iterator[str]:
    if config.training.device == "cpu" and config.parallel.distributed_backend == "nccl":
        yield "--distributed-backend nccl must have GPUs, and --device is cpu; use --distributed-backend gloo"


@_rule(
    *("cuda_graphs", "device", "precision", "num_experts", "topk", "moe_rts", "moe_noise_policy", "moe_token_dropping"),
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "optimizer_cpu_offload", "reset_attention_mask"),
)
def _graphs(config: RunConfig, world_size: int) -> Iterator[str]:
    yield from graph_problems(config)


@_rule("reset_attention_mask", "attention_dropout", "precision", "device")
def _document_attention(config: RunConfig, world_size: int) -> Iterator[str]:
    dropout, on_cpu = config.model.attention_dropout, config.training.device == "cpu"
    if config.data.reset_attention_mask and dropout > 0 and config.optimizer.precision != "fp32" and not on_cpu:
        yield (
            f"--reset-attention-mask requires --attention-dropout 0 on GPUs in {config.optimizer.precision}, where"
            f" torch's variable-length attention has no dropout; got {dropout:g}. Use --attention-dropout 0, or drop"
            " --reset-attention-mask"
        )


@_rule("data_path", "split", "train_data_path", "valid_data_path", "test_data_path", "eval_interval")
def _data(config: RunConfig, world_size: int) -> Iterator[str]:
    yield from data_problems(config.data, config.training.eval_interval)


@_rule("spike_sigmas", "save", "save_interval", "keep_last")
def _spikes(config: RunConfig, world_size: int) -> Iterator[str]:
    yield from spike_problems(config)


@_rule("skip_samples")
def _skip_samples(config: RunConfig, world_size: int) -> Iterator[str]:
    yield from skip_problems(config)


@_rule("save", "async_save", "keep_last")
def _save(config: RunConfig, world_size: int) -> Iterator[str]:
    yield from save_problems(config)


@_rule("finetune", "finetune_load_optim", "load", "save")
def _finetune(config: RunConfig, world_size: int) -> Iterator[str]:
    yield from finetune_problems(config)


@_rule("change_blend", "load")
def _change_blend(config: RunConfig, world_size: int) -> Iterator[str]:
    yield from change_blend_problems(config)
