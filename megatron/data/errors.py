"""The one exception of this package."""


class DataError(ValueError):
    """Input, output or a flag of this package is wrong; the message says what, where and how to mend it."""
