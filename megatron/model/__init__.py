"""The GPT model: embedding, attention, layers, head and loss."""

from megatron.model.gpt import GPTModel
from megatron.model.loss import LossSums

__all__ = ["GPTModel", "LossSums"]
