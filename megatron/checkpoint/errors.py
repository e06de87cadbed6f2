"""The exceptions of this package."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, found or trusted. Raised on every rank of the group, with the same message."""


class ContactLost(CheckpointError):
    """Another rank does not answer, so there is nothing that the ranks can still do together."""
