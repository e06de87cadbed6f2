"""Text out of a trained model: key-value cache, sampling, generation, loading a checkpoint for it."""

from megatron.inference.generate import generate, stream
from megatron.inference.kv_cache import KVCache
from megatron.inference.sampling import Sampling

__all__ = ["KVCache", "Sampling", "generate", "stream"]
