"""Performance of parts of the code base: each checks its results before it times, and writes JSON."""
