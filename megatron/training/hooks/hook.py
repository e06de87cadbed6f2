"""The interface between the training loop and whatever happens beside the updates."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from megatron.engine.base import StepResult
from megatron.training.clock import Step
from megatron.training.start import Checkpoint

if TYPE_CHECKING:
    from megatron.training.run import Run


@dataclasses.dataclass
class Outcome:
    """What an update did, read from the device.

    Attributes:
        loss: language-modelling loss of the weights before the update, the mean over the global batch.
        outlier: whether ``loss`` is far above those before it; :class:`megatron.training.hooks.spikes.SpikeRestarts`
            sets it, and hooks after that one see it.
    """

    step: Step
    result: StepResult
    loss: float
    outlier: bool = False

    @property
    def finite(self) -> bool:
        """Whether loss and gradient are finite, except for gradients that overflow at fp16's loss scale."""
        return math.isfinite(self.loss) and (self.result.scale_fell or not self.result.skipped)

    @property
    def good(self) -> bool:
        """Whether the weights before the update look healthy."""
        return self.finite and not self.outlier

    @property
    def only_lowers_loss_scale(self) -> bool:
        """Whether the update was skipped for fp16's loss scale at a usual loss, which says nothing of the weights."""
        return self.result.scale_fell and not self.outlier


class Hook:
    """Something that happens beside the updates of a run; a subclass overrides the methods that it needs.

    All ranks call the same methods at the same points, so a hook may use collectives, as long as all ranks do. The
    methods are listed here in the order in which :meth:`megatron.training.trainer.Trainer.train` calls them.

    Attributes:
        run: of this hook; set before any method is called.
        name: of the hook's state in checkpoints; empty for the name of the class.
    """

    run: "Run"
    name = ""

    @property
    def key(self) -> str:
        """The name of the hook's state in checkpoints."""
        return self.name or type(self).__name__

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned; an empty ``state`` is that of a new hook.

        Called when the run resumes, before :meth:`pre_train`, and when it goes back to an earlier checkpoint.
        """

    def pre_train(self) -> None:
        """Called once, before the first update."""

    def pre_step(self) -> None:
        """Called before the micro-batches of an update are read."""

    def needs_monitors(self, step: Step) -> bool:
        """Whether the update that comes next has to measure ``monitors`` of its :class:`StepResult`."""
        return False

    def post_step(self, step: Step) -> None:
        """Called when an update is queued. The clock is past it, but the device may still be computing it."""

    def needs_outcome(self, step: Step) -> bool:
        """Whether :meth:`on_outcome` has to come before :meth:`end_step` of the same update.

        It makes the host wait for the device. Otherwise :meth:`on_outcome` comes while the next update is computed.
        """
        return False

    def on_outcome(self, outcome: Outcome) -> None:
        """Called once for each update, in order, when its loss and gradient norm are known.

        Not called for an update that is undone before that, because the run goes back.
        """

    def rewind_to(self) -> Checkpoint | None:
        """The earlier checkpoint that the run has to go on from; None, as nearly always, to train on."""
        return None

    def post_rewind(self, source: Checkpoint) -> None:
        """Called when weights, clock and the states of all hooks are those of ``source`` again."""

    def end_step(self, step: Step) -> None:
        """Called at the end of an update, unless the run has gone back: the place for logs and validation."""

    def save(self, stop_reason: str | None) -> None:
        """Called after :meth:`end_step` of all hooks; a ``stop_reason`` says that this update was the last one."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the hook, JSON-able."""
        return {}

    def post_train(self, reason: str) -> None:
        """Called once, after the last update; ``reason`` says why it was the last one."""

    def close(self) -> None:
        """Called at the end of the run, also after an error."""
