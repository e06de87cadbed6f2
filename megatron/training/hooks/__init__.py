"""What happens beside the updates of a run, each concern in a class of its own.

``docs/architecture.md`` says how to write one.
"""

from megatron.training.hooks.hook import Hook, Outcome

__all__ = ["Hook", "Outcome"]
