"""From a configuration to a finished run."""

import dataclasses
import os
import sys
from pathlib import Path

import torch

from megatron.checkpoint import CheckpointError, latest, load, read_meta
from megatron.config import RunConfig
from megatron.config.errors import ConfigError
from megatron.config.flags import to_dict
from megatron.config.validation import validate
from megatron.data.gpt_dataset import build_datasets
from megatron.data.tokenizer import Tokenizer, build_tokenizer
from megatron.engine import deepspeed_config
from megatron.engine.pipeline import build_engine
from megatron.parallel.initialize import Topology, choose_device, initialize, shut_down
from megatron.parallel.launch import Launch
from megatron.planning.parameters import count_parameters
from megatron.planning.placement import place
from megatron.training.clock import Clock, total_samples
from megatron.training.report import Report
from megatron.training.resume import check, clock_from
from megatron.training.trainer import Trainer, TrainingDiverged


def pretrain(config: RunConfig) -> int:
    """Train as ``config`` says. Returns the exit status; what the user can mend is printed, not raised."""
    launch = Launch.from_environment()
    try:
        validate(config, launch.world_size)
        deepspeed_config.build(config, config.parallel.data_parallel_size(launch.world_size))
        _protect_checkpoints(config)
        device = choose_device(config.training.device, launch.local_rank)
        # expert parallelism means nothing to a dense model, so that --num-experts alone tells the two apart
        degree = config.parallel.moe_expert_parallel_size if config.moe.enabled else 1
        parallel = dataclasses.replace(config.parallel, moe_expert_parallel_size=degree)
    except (ValueError, OSError, CheckpointError) as error:  # the same on every rank
        if launch.rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    try:
        _run(config, initialize(parallel, launch, device))
    except (ValueError, OSError, TrainingDiverged, CheckpointError) as error:
        # The process groups are left as they are: other ranks may be inside a collective, and the starter ends them.
        print(f"error on rank {launch.rank}: {error}", file=sys.stderr, flush=True)
        return 1
    shut_down()
    return 0


def _protect_checkpoints(config: RunConfig) -> None:
    """Refuse to write into the folder of another run, and find out now that a folder cannot be written to."""
    save, load = config.checkpoint.save, config.checkpoint.load
    if save is None:
        return
    folder = Path(save)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"--save {save}: no permission to write there; choose another folder")
    resumed = None if load is None else Path(load).resolve()
    found = latest(folder)
    if found is not None and folder.resolve() not in (resumed, resumed and resumed.parent):
        raise ConfigError(
            f"--save {save} holds the checkpoints of a run already ({found.name}); "
            f"add --load {save} to continue it, or choose another folder"
        )


def _run(config: RunConfig, topology: Topology) -> None:
    tokenizer = build_tokenizer(config.data)
    samples = total_samples(config.training, config.model.seq_length)
    valid_samples = config.training.eval_iters * config.training.global_batch_size
    if config.training.eval_interval == 0:
        valid_samples = 0
    train_data, valid_data, _ = build_datasets(config, tokenizer, (samples, valid_samples, 0))

    source = None if config.checkpoint.load is None else latest(config.checkpoint.load)
    meta = None if source is None else read_meta(source)
    vocab_size = config.model.padded_vocab_size(tokenizer.vocab_size, topology.tensor_parallel_size)
    if meta is not None and meta["vocab_size"] % topology.tensor_parallel_size == 0:
        vocab_size = meta["vocab_size"]  # padded for the layout that the run began with
    warnings = [] if meta is None else check(meta, config, vocab_size, tokenizer)

    engine = build_engine(config, topology, vocab_size)
    clock = Clock(config.model.seq_length)
    if meta is not None:
        with engine.loading() as tensors:
            load(source, tensors, group=topology.control_group)
        engine.load_scalar_state(meta["optimizer"])
        clock = clock_from(meta)

    name = config.logging.run_name or "gpt"
    report = Report(config.logging, name, config.checkpoint.save, topology.is_first)
    try:
        _announce(report, config, topology, tokenizer, clock, vocab_size, name, resumed=meta is not None)
        if topology.is_first:
            if topology.pipeline_parallel_size > 1:
                print(place(config, vocab_size), flush=True)
            for warning in warnings:
                print(f"warning: this run differs from the checkpoint's: {warning}", flush=True)
        Trainer(config, topology, engine, tokenizer, (train_data, valid_data), clock, report, vocab_size).run()
    finally:
        report.close()


def _announce(
    report: Report,
    config: RunConfig,
    topology: Topology,
    tokenizer: Tokenizer,
    clock: Clock,
    vocab_size: int,
    name: str,
    resumed: bool,
) -> None:
    count = count_parameters(config.model, config.moe, vocab_size)
    report.write(
        "run",
        step=clock.steps,
        tokens=clock.tokens,
        train_tokens=total_samples(config.training, config.model.seq_length) * config.model.seq_length,
        name=name,
        parameters=count.total,
        active_parameters=count.active,
        vocab_size=tokenizer.vocab_size,
        world_size=topology.launch.world_size,
        pipeline_parallel=topology.pipeline_parallel_size,
        expert_parallel=topology.expert_parallel_size,
        tensor_parallel=topology.tensor_parallel_size,
        device=torch.cuda.get_device_name(topology.device) if topology.device.type == "cuda" else "cpu",
        precision=config.optimizer.precision,
        resumed_at_tokens=clock.tokens if resumed else None,
        config=to_dict(config),
    )
