"""The order of things in the training loop, with an engine that computes nothing."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron.config import ModelConfig, RunConfig, TrainingConfig
from megatron.engine.base import StepResult
from megatron.model.loss import LossSums
from megatron.training import run as run_module
from megatron.training import trainer as trainer_module
from megatron.training.clock import Clock, Step
from megatron.training.hooks import Hook, Outcome
from megatron.training.run import Run
from megatron.training.skipped_data import SkippedData
from megatron.training.start import Checkpoint
from megatron.training.starting_point import StartingPoint
from megatron.training.trainer import Trainer

BATCH, SEQ, UPDATES = 8, 16, 4


class Engine:
    """Has losses 1.0, 2.0 ..., one an update."""

    def __init__(self) -> None:
        self.tokens_after: list[int] = []
        self.monitored: list[bool] = []

    def train_step(self, micro_batches: list[Any], tokens_after: int, monitored: bool = False) -> StepResult:
        self.tokens_after.append(tokens_after)
        self.monitored.append(monitored)
        losses = torch.tensor([float(len(self.tokens_after)), 0.0, 0.0, 1.0])
        return StepResult(LossSums(losses, [], torch.zeros(0)), lr=1e-3, norm=1.0)


class Recorder(Hook):
    """Notes what it is called for, and counts outcomes."""

    def __init__(self, needs: tuple[int, ...] = (), goes_back_after: int | None = None) -> None:
        self.calls: list[str] = []
        self.outcomes = 0
        self._needs, self._goes_back_after = needs, goes_back_after

    def pre_train(self) -> None:
        self.calls.append("pre_train")

    def pre_step(self) -> None:
        self.calls.append("pre_step")

    def post_step(self, step: Step) -> None:
        self.calls.append(f"post_step {step.number}")

    def needs_outcome(self, step: Step) -> bool:
        return step.number in self._needs

    def on_outcome(self, outcome: Outcome) -> None:
        self.outcomes += 1
        self.calls.append(f"on_outcome {outcome.step.number}, loss {outcome.loss:g}")

    def rewind_to(self) -> Checkpoint | None:
        if self._goes_back_after != self.run.clock.steps:
            return None
        self._goes_back_after = None
        clock = Clock(SEQ, samples=BATCH, steps=1)
        return Checkpoint(Path("step_00000001"), {"clock": clock.state(), "hooks": {"Recorder": {"outcomes": 1}}})

    def post_rewind(self, source: Checkpoint) -> None:
        self.calls.append(f"post_rewind {self.run.clock.steps}, outcomes {self.outcomes}")

    def end_step(self, step: Step) -> None:
        self.calls.append(f"end_step {step.number}")

    def save(self, stop_reason: str | None) -> None:
        self.calls.append(f"save {stop_reason}")

    def state_dict(self) -> dict[str, Any]:
        return {"outcomes": self.outcomes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.outcomes = state.get("outcomes", 0)

    def post_train(self, reason: str) -> None:
        self.calls.append(f"post_train {reason}")

    def close(self) -> None:
        self.calls.append("close")


@pytest.fixture
def make_run(monkeypatch):
    """Makes a run of UPDATES updates with the hooks given."""

    def batches(run: Run) -> Iterator[int]:
        return iter(range(run.clock.samples, run.total_samples))

    def make(*hooks: Hook, stops_after: int = UPDATES) -> Run:
        monkeypatch.setattr(trainer_module, "training_batches", batches)
        monkeypatch.setattr(run_module, "restore", lambda *_: None)
        training = TrainingConfig(micro_batch_size=1, global_batch_size=BATCH, train_tokens=UPDATES * BATCH * SEQ)
        anything: Any = SimpleNamespace
        run = Run(
            config=RunConfig(model=ModelConfig(seq_length=SEQ), training=training),
            topology=anything(data_parallel_size=1),
            tokenizer=anything(),
            start=StartingPoint(vocab_size=32, clock=Clock(SEQ)),
            skipped=SkippedData(),
            data=anything(),
            engine=anything(),
            report=anything(),
            stop=anything(agreed=lambda: "SIGTERM" if run.clock.steps >= stops_after else None),
            watchdog=anything(paused=run_module.contextlib.nullcontext),
            hooks=list(hooks),
        )
        engine: Any = Engine()
        run.engine = engine
        return run

    return make


def update(number: int, outcome_before: str = "") -> list[str]:
    """What happens in an update, with the outcome of the one before."""
    first = ["pre_step", *([outcome_before] if outcome_before else []), f"post_step {number}"]
    return [*first, f"end_step {number}", "save None"]


def test_an_outcome_is_read_while_the_next_update_is_computed(make_run):
    hook = Recorder()
    run = make_run(hook, stops_after=3)
    assert Trainer(run).train() == "SIGTERM"
    assert hook.calls == [
        "pre_train",
        *update(1),
        *update(2, "on_outcome 1, loss 1"),
        *update(3, "on_outcome 2, loss 2")[:-1],
        "on_outcome 3, loss 3",
        "save SIGTERM",
        "post_train SIGTERM",
        "close",
    ]


def test_the_clock_ends_the_run(make_run):
    run = make_run(Recorder())
    assert Trainer(run).train() == "all tokens are trained on"
    assert run.engine.tokens_after == [number * BATCH * SEQ for number in range(1, UPDATES + 1)]
    assert (run.clock.steps, run.clock.samples) == (UPDATES, UPDATES * BATCH)


def test_one_hook_that_needs_an_outcome_makes_all_get_it(make_run):
    hook = Recorder()
    Trainer(make_run(Recorder2(needs=(2,)), hook, stops_after=3)).train()
    at = hook.calls.index("post_step 2")
    assert hook.calls[at : at + 2] == ["post_step 2", "on_outcome 2, loss 2"]
    assert sum(call.startswith("on_outcome") for call in hook.calls) == 3, "each once"


def test_an_update_is_monitored_if_a_hook_needs_it(make_run):
    class Monitoring(Hook):
        def needs_monitors(self, step: Step) -> bool:
            assert self.run.clock.steps == step.number - 1, "the update comes next"
            return step.end == self.run.end_samples

    run = make_run(Recorder(), Monitoring())
    Trainer(run).train()
    assert run.engine.monitored == [False] * (UPDATES - 1) + [True]


class Recorder2(Recorder):
    """Another one."""


@pytest.mark.parametrize("needs", [(), (3,)])
def test_a_run_that_goes_back_does_the_updates_anew(make_run, needs):
    hook = Recorder(needs=needs, goes_back_after=3)
    run = make_run(hook)
    Trainer(run).train()
    undone = hook.calls.index("post_step 3")
    rest = hook.calls[undone + 1 :]
    read = ["on_outcome 3, loss 3"] if needs else []  # else what is not read yet never is
    expected = [*read, "post_rewind 1, outcomes 1", "pre_step", "post_step 2", "end_step 2"]
    assert rest[: len(expected)] == expected
    assert (run.clock.steps, hook.outcomes) == (UPDATES, UPDATES)
    assert run.engine.tokens_after == [number * BATCH * SEQ for number in (1, 2, 3, 2, 3, 4)]


def test_a_run_that_goes_back_when_it_is_stopped_ends_there(make_run):
    hook = Recorder(goes_back_after=3)
    hook.rewind_to = rewind_after_end_step(hook)  # type: ignore[method-assign]
    run = make_run(hook, stops_after=3)
    assert Trainer(run).train() == "SIGTERM"
    assert hook.calls[-4:] == ["on_outcome 3, loss 3", "post_rewind 1, outcomes 1", "post_train SIGTERM", "close"]
    assert run.clock.steps == 1


def rewind_after_end_step(hook: Recorder):
    whole = hook.rewind_to
    return lambda: whole() if "end_step 3" in hook.calls else None


def test_a_resumed_run_has_the_states_of_its_hooks(make_run):
    hook, other = Recorder(), Recorder2()
    run = make_run(hook, other)
    meta = {"hooks": {"Recorder": {"outcomes": 7}}}
    run.start = StartingPoint(vocab_size=32, clock=Clock(SEQ), resumed=Checkpoint(Path("step"), meta))
    Trainer(run).train()
    assert (hook.outcomes, other.outcomes) == (7 + UPDATES, UPDATES)


def test_names_are_unique(make_run):
    with pytest.raises(ValueError, match="2 hooks with the name 'Recorder'; set the attribute name of each"):
        Trainer(make_run(Recorder(), Recorder()))


def test_hooks_are_closed_after_an_error(make_run):
    class Fails(Hook):
        def post_step(self, step: Step) -> None:
            raise RuntimeError("broken")

    hook = Recorder()
    with pytest.raises(RuntimeError, match="broken"):
        Trainer(make_run(hook, Fails())).train()
    assert hook.calls[-1] == "close"
