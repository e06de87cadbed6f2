"""Scores of trained models: zero-shot tasks through lm-evaluation-harness.

Only this package imports ``lm_eval`` (the extra ``[eval]``).
"""
