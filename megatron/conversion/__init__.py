"""Checkpoints in other programs' formats, and what is done to a checkpoint between reading and writing it.

The formats are listed in :mod:`megatron.conversion.formats`. Every reader gives
:class:`megatron.conversion.contents.Contents`, every writer takes it: a run's configuration and its global tensors
under our names, each read only when it is written. So memory holds one tensor at a time (of stacked experts, one
expert), and no format knows another.
"""
