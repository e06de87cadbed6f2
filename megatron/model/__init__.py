"""The GPT model: embedding, attention, layers, head and loss."""

from megatron.model.gpt import GPTModel, ModelLoss

__all__ = ["GPTModel", "ModelLoss"]
