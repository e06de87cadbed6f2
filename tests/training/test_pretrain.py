"""The exit status of a run, which scripts and schedulers decide by."""

import contextlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from megatron.checkpoint import CheckpointError
from megatron.config import RunConfig
from megatron.config.errors import ConfigError
from megatron.parallel.initialize import NoDevice
from megatron.parallel.replicas import ReplicasDiffer
from megatron.training import pretrain as module
from megatron.training.hooks.guards import TrainingDiverged


@pytest.fixture
def exit_status(monkeypatch):
    """Gives the exit status of a run of one process in which the function ``where``, if any, raises ``error``."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def run(
        where: str | None = None,
        error: BaseException | None = None,
        *,
        ready: bool = True,
        problems: Sequence[str] = (),
        **guard: bool,
    ) -> int:
        def fail(*_: Any) -> None:
            raise error if error is not None else AssertionError

        stubs: dict[str, Any] = {
            "_prepare": lambda config, launch: "cpu",
            "rendezvous": lambda launch, timeout: (launch, None),
            "monitor_failures": lambda *_: contextlib.nullcontext(),
            "gather_problems": lambda launch, store, problem: list(problems),
            "initialize": lambda *_: SimpleNamespace(is_first=True),
            "_passes_preflight": lambda *_: ready,
            "only_run_in": lambda save, topology: contextlib.nullcontext(),
            "StopRequest": lambda *_: None,
            "_train": lambda *_: None,
            "shut_down": lambda: None,
        }
        for name, stub in (stubs | ({where: fail} if where else {})).items():
            monkeypatch.setattr(module, name, stub)
        config = RunConfig()
        for name, value in guard.items():
            setattr(config.guard, name, value)
        signals: Any = SimpleNamespace(interrupted_rendezvous=False, rendezvous_done=lambda: None)
        return module.pretrain(config, signals)

    return run


def test_a_run_that_ends_in_order_has_status_0(exit_status):
    assert exit_status() == 0


@pytest.mark.parametrize("error", [NoDevice("none"), ConfigError("--lr"), OSError("disk"), CheckpointError("other")])
def test_what_is_wrong_before_ranks_meet_has_status_2(exit_status, error, capsys):
    assert exit_status("_prepare", error) == 2
    assert str(error) in capsys.readouterr().err


@pytest.mark.parametrize("where", ["rendezvous", "initialize", "_train"])
@pytest.mark.parametrize(
    "error",
    [ValueError("data"), OSError("disk"), TrainingDiverged("nan"), ReplicasDiffer("weight"), CheckpointError("save")],
    ids=lambda error: type(error).__name__,
)
def test_what_goes_wrong_later_has_status_1(exit_status, where, error, capsys):
    assert exit_status(where, error) == 1
    assert capsys.readouterr().err == f"error on rank 0: {error}\n"


def test_a_preflight_that_finds_something_broken_has_status_1(exit_status):
    assert exit_status(ready=False, preflight=True) == 1
    assert exit_status(ready=False, preflight_only=True) == 1
    assert exit_status("_train", AssertionError("it trains nothing"), preflight_only=True) == 0


def test_a_rank_that_cannot_start_has_status_2_unless_nothing_else_was_asked(exit_status, capsys):
    assert exit_status(problems=["rank 1: no GPU"], preflight=True) == 2
    assert exit_status(problems=["rank 1: no GPU"], preflight_only=True) == 1
    assert capsys.readouterr().err == "error on rank 1: no GPU\n" * 2
