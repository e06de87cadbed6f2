"""From a configuration to a finished run."""

import dataclasses
import socket
import sys
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint import CheckpointError, CheckpointStatus
from megatron.checkpoint.folder import checkpoint_status
from megatron.config import RunConfig
from megatron.config.flags import from_dict, to_dict
from megatron.config.spans import nth_outside
from megatron.config.validation import validate
from megatron.data.data_state import DataState
from megatron.data.documents import check_documents
from megatron.data.gpt_dataset import ResumedData, build_datasets
from megatron.data.statement import statement
from megatron.data.tokenizer import Tokenizer, build_tokenizer
from megatron.engine import deepspeed_config
from megatron.engine.offload import threads_in_words
from megatron.engine.pipeline import build_engine
from megatron.parallel.determinism import make_deterministic
from megatron.parallel.initialize import NoDevice, Topology, choose_device, initialize, meet, shut_down
from megatron.parallel.launch import Launch
from megatron.parallel.lifeline import Line, lifeline
from megatron.parallel.replicas import ReplicasDiffer
from megatron.parallel.watchdog import Watchdog
from megatron.planning.parameters import count_parameters
from megatron.planning.placement import place
from megatron.preflight import gather_problems, preflight
from megatron.training.clock import Clock, total_samples
from megatron.training.ending import record_end
from megatron.training.outlook import outlook
from megatron.training.report import Report
from megatron.training.resume import carried, check, check_base, clock_from, describe_base, padded_as_before, restore
from megatron.training.signals import StopRequest, StopSignals
from megatron.training.spikes import Detours
from megatron.training.start import (
    check_graphs,
    check_optimizer,
    check_outputs,
    check_precision,
    find_base,
    find_checkpoint,
    how_to_go_on,
    log_folder,
    only_run_in,
)
from megatron.training.trainer import Trainer, TrainingDiverged


def pretrain(config: RunConfig, signals: StopSignals) -> int:
    """Train as ``config`` says. Returns the exit status; what the user can mend is printed, not raised.

    A signal stops the run wherever it stands: before the first update, or after a save.

    In a run of several processes an error is the end of this one: see :mod:`megatron.parallel.lifeline`.
    """
    local_rank, problem = 0, None
    looks_first = config.guard.preflight or config.guard.preflight_only
    try:
        launch = Launch.from_environment()
        local_rank = launch.local_rank
        try:
            device = _prepare(config, launch)
        except (ValueError, OSError, CheckpointError) as error:
            if not looks_first:
                raise
            device, problem = torch.device("cpu"), str(error)  # told with those of the other ranks
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
        seconds = parallel.timeout.total_seconds()
        with lifeline(launch, store, seconds, lambda: how_to_go_on(config), lambda: signals.ends_start) as line:
            if looks_first and (problems := gather_problems(launch, store, problem)):
                if launch.rank == 0:
                    print("\n".join(f"error on {each}" for each in problems), file=sys.stderr, flush=True)
                return 1 if config.guard.preflight_only else 2
            topology = initialize(parallel, launch, device, store)
            signals.all_met()
            ready = not looks_first or _looks_ready(config, topology, line)
            if ready and not config.guard.preflight_only:
                with only_run_in(config.checkpoint.save, topology):
                    stop = StopRequest(signals, topology, config.checkpoint.exit_duration_in_mins)
                    _run(config, topology, stop, line)
            shut_down()
    except (ValueError, OSError, TrainingDiverged, ReplicasDiffer, CheckpointError) as error:
        # the process groups are left as they are: other ranks may be inside a collective
        print(f"error on rank {launch.rank}: {error}", file=sys.stderr, flush=True)
        return 1
    return 0 if ready else 1


def _prepare(config: RunConfig, launch: Launch) -> torch.device:
    """Whatever can be found out without the other ranks; the device of this one.

    Raises:
        ValueError, OSError, CheckpointError: the run cannot start here.
    """
    device = choose_device(config.training.device, launch.local_rank)
    validate(config, launch.world_size)
    deepspeed_config.build(config, config.parallel.data_parallel_size(launch.world_size))
    check_outputs(config)
    check_precision(config, device)
    check_optimizer(config)
    check_graphs(config, device)
    if config.training.deterministic:
        make_deterministic()
    return device


def _looks_ready(config: RunConfig, topology: Topology, line: Line | None) -> bool:
    """Check all nodes and print what was found. What is only slow keeps back nobody but ``--preflight-only``."""
    outcome = preflight(config, topology, line)
    if topology.is_first:
        print(outcome.words, flush=True)
    return not outcome.broken and not (config.guard.preflight_only and outcome.slow)


def _run(config: RunConfig, topology: Topology, stop: StopRequest, line: Line | None) -> None:
    tokenizer = build_tokenizer(config.data)
    vocab_size = config.model.padded_vocab_size(tokenizer.vocab_size, topology.tensor_parallel_size)
    clock, warnings, meta = Clock(config.model.seq_length), [], None
    kept: dict[str, Any] = {}  # of the metadata, for the next checkpoints
    found = find_checkpoint(config, topology)
    base = find_base(config, topology) if config.checkpoint.finetune and found is None else None
    if found is not None:
        _, meta = found
        vocab_size = padded_as_before(meta, topology.tensor_parallel_size)
        warnings = check(meta, config, vocab_size, tokenizer)
        clock, kept = clock_from(meta), carried(meta, tokenizer)
    elif base is not None:
        vocab_size = padded_as_before(base[1], topology.tensor_parallel_size)
        warnings = check_base(base[1], config, vocab_size, tokenizer)
        kept = carried(base[1], tokenizer) | {"finetuned_from": describe_base(config, *base)}
    if _stops_early(stop, config, topology, clock):
        return
    detours = Detours.of(config, meta, clock.samples)
    samples = total_samples(config.training, config.model.seq_length, clock.samples)
    wanted = (
        samples,
        config.training.eval_samples if config.training.eval_interval else 0,
        config.training.eval_samples,
    )
    data = build_datasets(config, tokenizer, wanted, _resumed_data(meta, clock, detours))
    check_documents(config.data, tokenizer)
    if _stops_early(stop, config, topology, clock):
        return

    engine = build_engine(config, topology, vocab_size)
    if found is not None:
        restore(engine, *found, topology)
    elif base is not None:
        restore(engine, *base, topology, optimizer_state=config.checkpoint.finetune_load_optim)

    name = _name(config)
    report = Report(config.logging, name, config.checkpoint.save, topology.is_first)
    guard = config.guard
    watchdog = Watchdog(guard.watchdog_factor, guard.watchdog_min_seconds, log_folder(config), topology, line)
    try:
        train_tokens = samples * config.model.seq_length
        _announce(report, config, topology, tokenizer, clock, vocab_size, train_tokens, name, found is not None, base)
        if topology.is_first:
            print(statement(config, samples, data.state), flush=True)
            print(outlook(config, topology, vocab_size), flush=True)
            if topology.pipeline_parallel_size > 1:
                print(place(config, vocab_size), flush=True)
            if config.optimizer.optimizer_cpu_offload:
                print(threads_in_words(), flush=True)
            begun = found or base
            if begun is not None and checkpoint_status(begun[0]) is CheckpointStatus.DOUBTED:
                print(f"warning: {begun[0].name} is in doubt: updates that were not good have followed it", flush=True)
            for warning in warnings:
                print(f"warning: this run differs from the checkpoint's: {warning}", flush=True)
            for note in data.notes:
                print(f"data: {note}", flush=True)
        Trainer(
            config, topology, engine, tokenizer, data, clock, report, stop, watchdog, vocab_size, detours,
            resumed_from=found, carried=kept,
        ).run()  # fmt: skip
    finally:
        watchdog.close()
        report.close()


def _resumed_data(meta: dict[str, Any] | None, clock: Clock, detours: Detours) -> ResumedData | None:
    """What the checkpoint says of the training data; None for a run that has read none yet."""
    if meta is None or clock.samples == 0:
        return None
    state = DataState.load(meta["data"]) if "data" in meta else None
    return ResumedData(state, nth_outside(detours.skipped, clock.samples), from_dict(meta["config"]).data)


def _name(config: RunConfig) -> str:
    return config.logging.run_name or "gpt"


def _stops_early(stop: StopRequest, config: RunConfig, topology: Topology, clock: Clock) -> bool:
    """Whether the run is asked to stop; if so, this is told."""
    reason = stop.agreed()
    if reason is not None and topology.is_first:
        tokens = total_samples(config.training, config.model.seq_length, clock.samples) * config.model.seq_length
        report = Report(config.logging, _name(config), config.checkpoint.save, is_first=True)
        report.write("stop", step=clock.steps, tokens=clock.tokens, train_tokens=tokens, reason=reason)
        report.close()
        record_end(config, clock, reason)
    return reason is not None


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
    base: tuple[Path, dict[str, Any]] | None,
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
        started_from=None if base is None else str(base[0]),
        config=to_dict(config),
    )
