"""Text out of a trained model: key-value cache, sampling, generation, loading a checkpoint for it."""
