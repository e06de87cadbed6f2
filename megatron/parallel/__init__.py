"""Processes: who starts them, which groups they form, and what they exchange."""
