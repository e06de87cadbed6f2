"""The figures of training, every ``--log-interval`` updates."""

from megatron.config import RunConfig
from megatron.moe.plan import dropped_by_chance, expert_capacity
from megatron.parallel.initialize import device_name
from megatron.planning.flops import model_flops_per_token, peak_tflops
from megatron.training.clock import Step
from megatron.training.hooks.hook import Hook, Outcome
from megatron.training.metrics import StepWindow
from megatron.training.run import Run
from megatron.training.start import Checkpoint


class TrainingLog(Hook):
    """Writes the ``train`` and ``stop`` records of a run."""

    def __init__(self, run: Run) -> None:
        config = run.config
        self._window = StepWindow(
            model_flops_per_token(config.model, config.moe, run.vocab_size),
            config.logging.peak_tflops or peak_tflops(device_name(run.topology.device), config.optimizer.precision),
            run.topology.launch.world_size,
            run.timer,
        )
        self._by_chance = _dropped_by_chance(config)

    def needs_monitors(self, step: Step) -> bool:
        """Whether this update ends with a log line."""
        return step.end >= self.run.end_samples or step.number % self.run.config.logging.log_interval == 0

    def needs_outcome(self, step: Step) -> bool:
        """Whether this update ends with a log line."""
        return self.needs_monitors(step)

    def on_outcome(self, outcome: Outcome) -> None:
        """Add an update to the figures of the next line."""
        samples = outcome.step.end - outcome.step.start
        self._window.add(outcome.result, samples * self.run.config.model.seq_length)

    def post_rewind(self, source: Checkpoint) -> None:
        """Forget the updates that are undone."""
        self._window.clear()

    def end_step(self, step: Step) -> None:
        """Log the updates since the last line."""
        if self.needs_outcome(step) and (figures := self._window.take()) is not None:
            if "experts" in figures:
                figures["experts"]["dropped_by_chance"] = self._by_chance
            self.run.log("train", **figures)

    def post_train(self, reason: str) -> None:
        """Log the end of the run."""
        self.run.log("stop", reason=reason)


def _dropped_by_chance(config: RunConfig) -> list[float]:
    """What share of assignments each MoE layer would drop if each went to any expert with equal chance."""
    moe, tokens = config.moe, config.training.micro_batch_size * config.model.seq_length
    shares = []
    for experts in moe.experts_per_layer(config.model.num_layers):
        if experts > 1:
            factor = moe.moe_train_capacity_factor
            capacity = expert_capacity(tokens, experts, moe.topk, factor, moe.moe_min_capacity)
            dropping = moe.moe_token_dropping
            shares.append(dropped_by_chance(tokens, experts, moe.topk, capacity) if dropping else 0.0)
    return shares
