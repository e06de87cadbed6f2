"""Hooks as a user writes them; trainer_server.py makes them by name."""

from typing import Any

from megatron.training.hooks import Hook, Outcome


class LossHistory(Hook):
    """Keeps the loss of every update that the weights have seen."""

    def __init__(self) -> None:
        self.losses: dict[str, float] = {}

    def on_outcome(self, outcome: Outcome) -> None:
        self.losses[str(outcome.step.number)] = outcome.loss

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses = dict(state.get("losses", {}))
