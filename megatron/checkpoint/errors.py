"""The one exception of this room."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, found or trusted. Raised on every rank of the group, with the same message."""
