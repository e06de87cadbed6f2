"""The files that go with an exported model with experts; Hugging Face's libraries run them, this package does not."""
