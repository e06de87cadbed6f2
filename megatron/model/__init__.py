"""The GPT model: embedding, attention, layers, head and loss."""
