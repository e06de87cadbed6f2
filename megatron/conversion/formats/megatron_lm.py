"""Megatron-LM's and megatron.core's checkpoints."""

import contextlib
from typing import TYPE_CHECKING

from megatron.conversion.formats.base import Format
from megatron.conversion.job import Conversion

if TYPE_CHECKING:
    from megatron.conversion.contents import Contents


class MegatronLM(Format):
    """Files by rank, or distributed (``torch_dist``); they are read only."""

    name = "megatron-lm"
    title = "Megatron-LM"
    help = "Megatron-LM's mp_rank files, or megatron.core's distributed checkpoints (torch_dist)"
    read_options = frozenset({"gelu_as_tanh"})

    def detect(self, folder: str) -> bool:
        """See :meth:`Format.detect`."""
        from megatron.conversion.megatron_deepspeed import is_megatron_lm

        return is_megatron_lm(folder)

    def read(self, folder: str, job: Conversion, held: contextlib.ExitStack) -> "Contents":
        """See :meth:`Format.read`."""
        from megatron.conversion.megatron_deepspeed import read_megatron_lm

        return read_megatron_lm(folder, job.tokenizer_options, job.gelu_as_tanh)
