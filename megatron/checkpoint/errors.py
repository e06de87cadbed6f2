"""The exceptions of this package, and lists in their messages."""

from collections.abc import Sequence


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, found or trusted. Raised on every rank of the group, with the same message."""


class CommunicationError(CheckpointError):
    """Another rank does not answer, so no further collective is possible."""


def some(items: Sequence[str], most: int = 5) -> str:
    """The first few of many things, for a message."""
    return "; ".join(items[:most]) + (f"; and {len(items) - most} more" if len(items) > most else "")
