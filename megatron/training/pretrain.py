"""From a configuration to a finished run."""

import contextlib
import dataclasses
import socket
import sys
from collections.abc import Sequence

import torch

from megatron.checkpoint import CheckpointError
from megatron.config import RunConfig
from megatron.config.validation import validate
from megatron.data.documents import check_documents
from megatron.data.gpt_dataset import build_datasets
from megatron.data.tokenizer import build_tokenizer
from megatron.engine import deepspeed_config
from megatron.engine.pipeline import build_engine
from megatron.parallel.determinism import make_deterministic
from megatron.parallel.failure_monitor import FailureMonitor, monitor_failures
from megatron.parallel.initialize import NoDevice, Topology, choose_device, initialize, rendezvous, shut_down
from megatron.parallel.launch import Launch
from megatron.parallel.replicas import ReplicasDiffer
from megatron.parallel.watchdog import Watchdog
from megatron.preflight import gather_problems, preflight
from megatron.training.announce import announce
from megatron.training.clock import Clock, total_samples
from megatron.training.exit_record import write_exit_record
from megatron.training.hooks.guards import TrainingDiverged
from megatron.training.hooks.hook import Hook
from megatron.training.hooks.standard import standard_hooks
from megatron.training.report import Report
from megatron.training.run import Run
from megatron.training.signals import StopRequest, StopSignals
from megatron.training.start import (
    check_graphs,
    check_optimizer,
    check_outputs,
    check_precision,
    how_to_go_on,
    log_folder,
    only_run_in,
)
from megatron.training.starting_point import find_start
from megatron.training.trainer import Trainer


def pretrain(config: RunConfig, signals: StopSignals, hooks: Sequence[Hook] = ()) -> int:
    """Train as ``config`` says. Returns the exit status; what the user can mend is printed, not raised.

    A signal stops the run at any point: before the first update, or after a save.

    In a run of several processes an error is the end of this one: see :mod:`megatron.parallel.failure_monitor`.

    Args:
        config: of the run.
        signals: that have come since this process began.
        hooks: what else is to happen beside the updates (:class:`megatron.training.hooks.Hook`), the same on all ranks.
    """
    local_rank, problem = 0, None
    runs_preflight = config.guard.preflight or config.guard.preflight_only
    try:
        launch = Launch.from_environment()
        local_rank = launch.local_rank
        try:
            device = _prepare(config, launch)
        except (ValueError, OSError, CheckpointError) as error:
            if not runs_preflight:
                raise
            device, problem = torch.device("cpu"), str(error)  # reported with those of the other ranks
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
        launch, store = rendezvous(launch, parallel.timeout)
        seconds = parallel.timeout.total_seconds()
        with monitor_failures(
            launch, store, seconds, lambda: how_to_go_on(config), lambda: signals.interrupted_rendezvous
        ) as monitor:
            if runs_preflight and (problems := gather_problems(launch, store, problem)):
                if launch.rank == 0:
                    print("\n".join(f"error on {each}" for each in problems), file=sys.stderr, flush=True)
                return 1 if config.guard.preflight_only else 2
            topology = initialize(parallel, launch, device, store)
            signals.rendezvous_done()
            ready = not runs_preflight or _passes_preflight(config, topology, monitor)
            if ready and not config.guard.preflight_only:
                with only_run_in(config.checkpoint.save, topology):
                    stop = StopRequest(signals, topology, config.checkpoint.exit_duration_in_mins)
                    _train(config, topology, stop, monitor, hooks)
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


def _passes_preflight(config: RunConfig, topology: Topology, monitor: FailureMonitor | None) -> bool:
    """Check all nodes and print what was found. What is only slow keeps back nobody but ``--preflight-only``."""
    verdict = preflight(config, topology, monitor)
    if topology.is_first:
        print(verdict.words, flush=True)
    return not verdict.broken and not (config.guard.preflight_only and verdict.slow)


def _train(
    config: RunConfig, topology: Topology, stop: StopRequest, monitor: FailureMonitor | None, added: Sequence[Hook]
) -> None:
    """Build a run, from its tokenizer to its hooks, and train."""
    tokenizer = build_tokenizer(config.data)
    start = find_start(config, topology, tokenizer)
    if _stops_early(stop, config, topology, start.clock):
        return
    skipped = start.skipped_data(config)
    data = build_datasets(config, tokenizer, _wanted_samples(config, start.clock), start.resumed_data(skipped))
    check_documents(config.data, tokenizer)
    if _stops_early(stop, config, topology, start.clock):
        return
    engine = build_engine(config, topology, start.vocab_size)
    start.load(engine, config, topology)

    guard = config.guard
    report = Report(config.logging, _name(config), config.checkpoint.save, topology.is_first)
    watchdog = Watchdog(guard.watchdog_factor, guard.watchdog_min_seconds, log_folder(config), topology, monitor)
    run = Run(config, topology, tokenizer, start, skipped, data, engine, report, stop, watchdog)
    with contextlib.closing(run):
        run.hooks = standard_hooks(run, added)
        announce(run, _name(config))
        reason = Trainer(run).train()
    if topology.is_first:
        write_exit_record(config, run.clock, reason)


def _wanted_samples(config: RunConfig, clock: Clock) -> tuple[int, int, int]:
    """Samples of the training, validation and test data that the run reads."""
    training = config.training
    total = total_samples(training, config.model.seq_length, clock.samples)
    return total, training.eval_samples if training.eval_interval else 0, training.eval_samples


def _name(config: RunConfig) -> str:
    return config.logging.run_name or "gpt"


def _stops_early(stop: StopRequest, config: RunConfig, topology: Topology, clock: Clock) -> bool:
    """Whether the run is asked to stop before its first update; if so, this is logged."""
    reason = stop.agreed()
    if reason is not None and topology.is_first:
        tokens = total_samples(config.training, config.model.seq_length, clock.samples) * config.model.seq_length
        report = Report(config.logging, _name(config), config.checkpoint.save, is_first=True)
        report.write("stop", step=clock.steps, tokens=clock.tokens, train_tokens=tokens, reason=reason)
        report.close()
        write_exit_record(config, clock, reason)
    return reason is not None
