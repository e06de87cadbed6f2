"""From a configuration to a finished run."""

import dataclasses
import socket
import sys

import torch

from megatron.checkpoint import CheckpointError, load
from megatron.config import RunConfig
from megatron.config.flags import to_dict
from megatron.config.validation import validate
from megatron.data.gpt_dataset import build_datasets
from megatron.data.tokenizer import Tokenizer, build_tokenizer
from megatron.engine import deepspeed_config
from megatron.engine.engine import MODEL
from megatron.engine.offload import threads_in_words
from megatron.engine.pipeline import build_engine
from megatron.parallel.determinism import make_deterministic
from megatron.parallel.initialize import NoDevice, Topology, choose_device, initialize, meet, shut_down
from megatron.parallel.launch import Launch
from megatron.parallel.lifeline import lifeline
from megatron.parallel.replicas import ReplicasDiffer
from megatron.planning.parameters import count_parameters
from megatron.planning.placement import place
from megatron.training.clock import Clock, total_samples
from megatron.training.outlook import outlook
from megatron.training.report import Report
from megatron.training.resume import check, clock_from, padded_as_before
from megatron.training.start import (
    check_graphs,
    check_optimizer,
    check_outputs,
    check_precision,
    find_checkpoint,
    how_to_go_on,
    only_run_in,
)
from megatron.training.trainer import Trainer, TrainingDiverged


def pretrain(config: RunConfig) -> int:
    """Train as ``config`` says. Returns the exit status; what the user can mend is printed, not raised.

    In a run of several processes an error is the end of this one: see :mod:`megatron.parallel.lifeline`.
    """
    local_rank = 0
    try:
        launch = Launch.from_environment()
        local_rank = launch.local_rank
        device = choose_device(config.training.device, local_rank)
        validate(config, launch.world_size)
        deepspeed_config.build(config, config.parallel.data_parallel_size(launch.world_size))
        check_outputs(config)
        check_precision(config, device)
        check_optimizer(config)
        check_graphs(config, device)
        if config.training.deterministic:
            make_deterministic()
        # expert parallelism means nothing to a dense model, so that --num-experts alone tells the two apart
        degrees = config.parallel.moe_expert_parallel_size if config.moe.enabled else (1,)
        parallel = dataclasses.replace(config.parallel, moe_expert_parallel_size=degrees)
    except NoDevice as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except (ValueError, OSError, CheckpointError) as error:
        if local_rank == 0:  # the same on all ranks of a node, which see the same flags and files
            print(f"error on {socket.gethostname()}: {error}", file=sys.stderr, flush=True)
        return 2
    try:
        launch, store = meet(launch, parallel.timeout)
        with lifeline(launch, store, parallel.timeout.total_seconds(), lambda: how_to_go_on(config)):
            topology = initialize(parallel, launch, device, store)
            with only_run_in(config.checkpoint.save, topology):
                _run(config, topology)
            shut_down()
    except (ValueError, OSError, TrainingDiverged, ReplicasDiffer, CheckpointError) as error:
        # the process groups are left as they are: other ranks may be inside a collective
        print(f"error on rank {launch.rank}: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def _run(config: RunConfig, topology: Topology) -> None:
    tokenizer = build_tokenizer(config.data)
    vocab_size = config.model.padded_vocab_size(tokenizer.vocab_size, topology.tensor_parallel_size)
    clock, warnings, source = Clock(config.model.seq_length), [], None
    found = find_checkpoint(config, topology)
    if found is not None:
        source, meta = found
        vocab_size = padded_as_before(meta, topology.tensor_parallel_size)
        warnings = check(meta, config, vocab_size, tokenizer)
        clock = clock_from(meta)
    samples = total_samples(config.training, config.model.seq_length, clock.samples)
    valid_samples = (
        config.training.eval_iters * config.training.global_batch_size if config.training.eval_interval else 0
    )
    train_data, valid_data, _ = build_datasets(config, tokenizer, (samples, valid_samples, 0))

    engine = build_engine(config, topology, vocab_size)
    if found is not None:
        with engine.loading() as tensors:
            if meta["optimizer"] is None:  # weights alone, of a conversion: Adam starts anew
                tensors = [tensor for tensor in tensors if tensor.name.startswith(MODEL)]
            load(source, tensors, group=topology.control_group)
        if meta["optimizer"] is not None:
            engine.load_scalar_state(meta["optimizer"])

    name = config.logging.run_name or "gpt"
    report = Report(config.logging, name, config.checkpoint.save, topology.is_first)
    try:
        train_tokens = samples * config.model.seq_length
        _announce(report, config, topology, tokenizer, clock, vocab_size, train_tokens, name, resumed=found is not None)
        if topology.is_first:
            print(outlook(config, topology, vocab_size), flush=True)
            if topology.pipeline_parallel_size > 1:
                print(place(config, vocab_size), flush=True)
            if config.optimizer.optimizer_cpu_offload:
                print(threads_in_words(), flush=True)
            for warning in warnings:
                print(f"warning: this run differs from the checkpoint's: {warning}", flush=True)
        data = (train_data, valid_data)
        Trainer(
            config, topology, engine, tokenizer, data, clock, report, vocab_size, resumed_from=found and source
        ).run()
    finally:
        report.close()


def _announce(
    report: Report,
    config: RunConfig,
    topology: Topology,
    tokenizer: Tokenizer,
    clock: Clock,
    vocab_size: int,
    train_tokens: int,
    name: str,
    resumed: bool,
) -> None:
    count = count_parameters(config.model, config.moe, vocab_size)
    report.write(
        "run",
        step=clock.steps,
        tokens=clock.tokens,
        train_tokens=train_tokens,
        name=name,
        parameters=count.total,
        active_parameters=count.active,
        vocab_size=tokenizer.vocab_size,
        world_size=topology.launch.world_size,
        pipeline_parallel=topology.pipeline_parallel_size,
        expert_parallel=sorted(set(topology.expert_parallel_sizes)),
        tensor_parallel=topology.tensor_parallel_size,
        device=torch.cuda.get_device_name(topology.device) if topology.device.type == "cuda" else "cpu",
        precision=config.optimizer.precision,
        resumed_at_tokens=clock.tokens if resumed else None,
        config=to_dict(config),
    )
