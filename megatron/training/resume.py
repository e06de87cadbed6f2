"""Whether a run may start from a checkpoint, and how it does."""

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

from megatron.checkpoint import CheckpointError, load
from megatron.config import RunConfig
from megatron.config.run import OPTIONS, flatten, from_dict
from megatron.data.tokenizer import Tokenizer
from megatron.engine.base import Engine
from megatron.parallel.initialize import Topology
from megatron.training.clock import Clock
from megatron.training.start import Checkpoint


def describe_base(config: RunConfig, base: Checkpoint) -> dict[str, Any]:
    """What the checkpoints of a run with ``--finetune`` record of the checkpoint that its weights came from."""
    load = Path(str(config.checkpoint.load)).resolve()
    return {"load": str(load), "checkpoint": base.path.name, "tokens": clock_from(base.meta).tokens}


def _structure(config: RunConfig) -> dict[str, Any]:
    """What a model must agree in for the tensors of a checkpoint to fit, under the names of the flags.

    These are the options that are not resumable. Where shapes do not follow from an option's value alone, what they
    follow from takes its place.
    """
    model, moe = config.model, config.moe
    values = {name: value for name, value in flatten(config).items() if OPTIONS[name].resumable is False}
    values |= {
        "ffn_hidden_size": model.ffn_size,
        "max_position_embeddings": model.position_rows,
        "mlp_type": moe.mlp_type if moe.enabled else "standard",
    }
    del values["num_experts"], values["expert_interval"]
    return {OPTIONS[name].flag: value for name, value in values.items()} | {
        "--num-experts of each layer": moe.experts_per_layer(model.num_layers)
    }


def _describe(differences: dict[str, tuple[Any, Any]]) -> list[str]:
    return [f"{flag}: checkpoint {then!r}, this run {now!r}" for flag, (then, now) in differences.items()]


def check(meta: dict[str, Any], config: RunConfig, vocab_size: int, tokenizer: Tokenizer) -> list[str]:
    """Compare a checkpoint's metadata with the run that wants to continue from it.

    Returns:
        Differences that change how the run goes on; worth a warning.

    Raises:
        CheckpointError: the model or the tokenizer is another one.
    """
    changed = _check_model(meta, config, vocab_size, tokenizer)
    return _describe(changed | _changed_options(meta, config))


def check_base(meta: dict[str, Any], config: RunConfig, vocab_size: int, tokenizer: Tokenizer) -> list[str]:
    """Compare the metadata of a checkpoint with the run that ``--finetune`` starts from its weights.

    Only what the weights depend on has to be the same: the shapes of the model and its tokenizer.

    Returns:
        Differences in what the weights compute, such as ``--topk``; worth a warning.

    Raises:
        CheckpointError: the model or the tokenizer is another one, or ``--finetune-load-optim`` finds no such state.
    """
    changed = _check_model(meta, config, vocab_size, tokenizer, but={"--seq-length"})
    if config.checkpoint.finetune_load_optim and meta.get("optimizer") is None:
        raise CheckpointError(
            f"--finetune-load-optim: the checkpoint in --load {config.checkpoint.load} holds no optimizer state; leave "
            "the flag out to start the optimizer anew"
        )
    compared = {name for name, o in OPTIONS.items() if o.section in ("model", "moe") and not o.finetunable}
    return _describe(changed | _changed_options(meta, config, compared))


def _check_model(
    meta: dict[str, Any], config: RunConfig, vocab_size: int, tokenizer: Tokenizer, but: Collection[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """Raise unless model and tokenizer are the checkpoint's; another tokenizer that is allowed is returned.

    The flags in ``but`` are not compared.
    """
    then, now = _structure(from_dict(meta["config"])), _structure(config)
    problems = _describe({flag: (then[flag], now[flag]) for flag in now if flag not in but and then[flag] != now[flag]})
    if meta["vocab_size"] != vocab_size:
        problems.append(f"padded vocabulary: checkpoint {meta['vocab_size']}, this run {vocab_size}")
    changed = {}
    if meta["tokenizer"]["fingerprint"] != tokenizer.fingerprint:
        fingerprints = (meta["tokenizer"]["fingerprint"][:12], tokenizer.fingerprint[:12])
        if config.data.allow_tokenizer_mismatch:
            changed["tokenizer fingerprint"] = fingerprints
        else:
            ends = [each.data.eod_token for each in (from_dict(meta["config"]), config)]
            named = "" if ends[0] == ends[1] else f", --eod-token {ends[0]!r} and {ends[1]!r}"
            problems.append(
                f"tokenizer fingerprint: checkpoint {fingerprints[0]}, this run {fingerprints[1]}{named} "
                "(--allow-tokenizer-mismatch goes on all the same)"
            )
    balancing = from_dict(meta["config"]).moe.balancing
    if from_dict(meta["config"]).moe.has_expert_bias and balancing != config.moe.balancing:
        problems.append(
            f"balancing of experts: checkpoint {balancing!r}, this run {config.moe.balancing!r}; the weights depend on "
            "the biases that were learned"
        )
    recipes = [each.training.recipe for each in (from_dict(meta["config"]), config)]
    if problems and recipes[0] != recipes[1]:
        problems.append(f"--recipe (launch scripts: RECIPE): checkpoint {recipes[0]!r}, this run {recipes[1]!r}")
    if problems:
        raise CheckpointError(
            "the checkpoint belongs to another model; start with the flags it was trained with, "
            "or give another --load:\n  " + "\n  ".join(problems)
        )
    return changed


def _changed_options(
    meta: dict[str, Any], config: RunConfig, compared: Collection[str] = OPTIONS.keys()
) -> dict[str, tuple[Any, Any]]:
    """Of the options ``compared``, those whose change is worth a warning and that differ from the checkpoint, by flag.

    :func:`_check_model` compares those that are not resumable.
    """
    before, now = (
        flatten(each) | {"moe_loss_coeff": each.moe.aux_loss_coeff} for each in (from_dict(meta["config"]), config)
    )
    changed = {}
    for name, option in OPTIONS.items():
        if name in compared and option.resumable is None and before[name] != now[name]:
            flag = f"--{name.replace('_', '-')}" if option.opposite else option.flag
            changed[flag] = (before[name], now[name])
    return changed


def padded_as_before(meta: dict[str, Any], tensor_parallel_size: int) -> int:
    """The padded vocabulary of the checkpoint, which a run keeps in whatever layout it goes on.

    Raises:
        CheckpointError: these tensor-parallel processes cannot share it.
    """
    rows = meta["vocab_size"]
    if rows % tensor_parallel_size:
        possible = ", ".join(str(size) for size in range(1, 65) if rows % size == 0)
        raise CheckpointError(
            f"the checkpoint's padded vocabulary of {rows} cannot be shared evenly by --tensor-model-parallel-size"
            f" {tensor_parallel_size}; resume it with one of {possible}"
        )
    return rows


def clock_from(meta: dict[str, Any]) -> Clock:
    """The clock as it stood when the checkpoint was saved."""
    return Clock(**{field.name: meta["clock"][field.name] for field in dataclasses.fields(Clock)})


def restore(
    engine: Engine, source: Checkpoint, config: RunConfig, topology: Topology, optimizer_state: bool = True
) -> None:
    """Load a checkpoint into the engine of a run.

    Without ``optimizer_state``, or where the checkpoint holds none, Adam starts anew; and so do balancers, where the
    run balances its experts by another method.

    Raises:
        CheckpointError: it is damaged or does not fit.
    """
    state = source.meta.get("optimizer") if optimizer_state else None
    same = from_dict(source.meta["config"]).moe.balancing == config.moe.balancing
    with engine.loading(moments=state is not None) as tensors:
        wanted = [tensor for tensor in tensors if same or ".balancer." not in tensor.name]
        load(source.path, wanted, group=topology.control_group, strict=optimizer_state and same)
    engine.load_scalar_state(state)
