"""The one exception of this room."""


class DataError(ValueError):
    """Input, output or a flag of the data room is wrong; the message says what, where and how to mend it."""
