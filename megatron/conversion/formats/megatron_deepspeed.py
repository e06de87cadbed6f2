"""Megatron-DeepSpeed's checkpoints."""

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.conversion.formats.base import Format
from megatron.conversion.job import Conversion

if TYPE_CHECKING:
    from megatron.conversion.contents import Contents


class MegatronDeepSpeed(Format):
    """One stage, cut for some tensor-parallel ranks; each expert is in a file of its own."""

    name = "megatron-deepspeed"
    title = "Megatron-DeepSpeed"
    help = "Megatron-DeepSpeed's mp_rank files, with or without a tag; --tp cuts what is written (default: 1)"
    writable = True
    read_options = frozenset({"gelu_as_tanh"})

    def detect(self, folder: str) -> bool:
        """See :meth:`Format.detect`."""
        from megatron.conversion.megatron_deepspeed import is_megatron_deepspeed

        return is_megatron_deepspeed(folder)

    def read(self, folder: str, job: Conversion, held: contextlib.ExitStack) -> "Contents":
        """See :meth:`Format.read`."""
        from megatron.conversion.megatron_deepspeed import read_megatron_deepspeed

        return read_megatron_deepspeed(folder, job.tokenizer_options, job.gelu_as_tanh)

    def for_layout(self, contents: "Contents", job: Conversion) -> "Contents":
        """See :meth:`Format.for_layout`. The layout of the run that saved the checkpoint is not that of the files."""
        from megatron.conversion.changes import for_layout

        if (job.pp, job.ep) != (None, None):
            raise ValueError(
                "--pp and --ep have no meaning for --to megatron-deepspeed: one stage is written, and files that any "
                "expert-parallel degree loads; drop them"
            )
        return for_layout(contents, *(job.layout or (1, 1, [1])))

    def write(self, contents: "Contents", job: Conversion) -> Generator[str, None, Path]:
        """See :meth:`Format.write`."""
        from megatron.conversion.hf_extras import KEY, names
        from megatron.conversion.megatron_deepspeed import unsupported_options, write_megatron_deepspeed

        if options := unsupported_options(contents.config.moe):
            yield f"left out, of training: {', '.join(options)}; Megatron-DeepSpeed has no such arguments"
        if extras := names(contents.meta.get(KEY) or {}):
            yield f"left out, of Hugging Face: {', '.join(extras)}; Megatron-DeepSpeed has no place for them"
        return write_megatron_deepspeed(contents, job.save)
