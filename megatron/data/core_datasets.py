"""Imports megatron.core.datasets.

Importing megatron.core warns that Transformer Engine and Apex, which nothing here uses, are not installed; those
warnings end here. The import takes seconds, so import this module late.
"""

import logging
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.datasets.blended_dataset import BlendedDataset
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

# Warns that the index of a blend is not cached, which core_order.py decides on purpose.
logging.getLogger("megatron.core.datasets.blended_dataset").setLevel(logging.ERROR)

__all__ = [
    "BlendedDataset",
    "BlendedMegatronDatasetBuilder",
    "GPTDataset",
    "GPTDatasetConfig",
]
