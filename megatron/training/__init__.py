"""The training loop, validation, metrics, logs and signals."""
