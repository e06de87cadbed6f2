"""Scores of trained models: zero-shot tasks through lm-evaluation-harness, and perplexity of any text.

Only this package imports ``lm_eval`` (the extra ``[eval]``); perplexity needs nothing more than the model does.
"""
