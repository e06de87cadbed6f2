"""What a run says of itself at its start."""

from megatron.checkpoint import CheckpointStatus
from megatron.checkpoint.folder import checkpoint_status
from megatron.config.recipes import recipe_in_words
from megatron.config.run import to_dict
from megatron.data.data_table import data_table
from megatron.engine.offload import threads_in_words
from megatron.parallel.initialize import device_name
from megatron.planning.parameters import count_parameters
from megatron.planning.placement import place_layers
from megatron.training.estimate import estimate
from megatron.training.metadata import hook_states
from megatron.training.run import Run


def announce(run: Run, name: str) -> None:
    """Write the ``run`` record of a run called ``name``, and print recipe, data, needs and warnings."""
    _write_record(run, name)
    if not run.topology.is_first:
        return
    config = run.config
    print(f"recipe: {recipe_in_words(config)}", flush=True)
    print(data_table(config, run.total_samples, run.data.state), flush=True)
    print(estimate(config, run.topology, run.vocab_size), flush=True)
    if run.topology.pipeline_parallel_size > 1:
        print(place_layers(config, run.vocab_size), flush=True)
    if config.optimizer.optimizer_cpu_offload:
        print(threads_in_words(), flush=True)
    for warning in warnings_of(run):
        print(f"warning: {warning}", flush=True)
    for note in run.data.notes:
        print(f"data: {note}", flush=True)


def warnings_of(run: Run) -> list[str]:
    """What the user should know of the checkpoint that the run starts from."""
    found, start = [], run.start
    if start.source is not None and checkpoint_status(start.source.path) is CheckpointStatus.DOUBTED:
        found.append(f"{start.source.path.name} is in doubt: updates that were not good have followed it")
    found += [f"this run differs from the checkpoint's: {difference}" for difference in start.differences]
    if start.resumed is not None:
        lost = hook_states(start.resumed.meta).keys() - {hook.key for hook in run.hooks}
        found += [f"the checkpoint has the state of a hook {name}, which this run lacks" for name in sorted(lost)]
    return found


def _write_record(run: Run, name: str) -> None:
    config, topology, start = run.config, run.topology, run.start
    count = count_parameters(config.model, config.moe, run.vocab_size)
    run.log(
        "run",
        name=name,
        parameters=count.total,
        active_parameters=count.active,
        vocab_size=run.tokenizer.vocab_size,
        world_size=topology.launch.world_size,
        pipeline_parallel=topology.pipeline_parallel_size,
        expert_parallel=sorted(set(topology.expert_parallel_sizes)),
        tensor_parallel=topology.tensor_parallel_size,
        device=device_name(topology.device),
        precision=config.optimizer.precision,
        resumed_at_tokens=None if start.resumed is None else run.clock.tokens,
        started_from=None if start.base is None else str(start.base.path),
        config=to_dict(config),
    )
