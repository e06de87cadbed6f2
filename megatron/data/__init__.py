"""Tokenizers, Megatron's .bin/.idx files, blended GPT datasets and the order in which a run reads them.

``core_datasets`` and ``core_order`` are the only modules that import megatron.core, and nothing imports them before
they are needed: tokenizing and sampling stay light.
"""
