"""Hugging Face's folders."""

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.conversion.formats.base import Format, Inspected
from megatron.conversion.job import Conversion

if TYPE_CHECKING:
    from megatron.conversion.contents import Contents


class HuggingFace(Format):
    """config.json, model files and a tokenizer; a model that is not a stock GPT-2 brings its code along."""

    name = "hf"
    title = "Hugging Face"
    help = "a folder with config.json, for Hugging Face's libraries"
    writable = True
    write_options = frozenset({"max_shard_size"})

    def detect(self, folder: str) -> bool:
        """See :meth:`Format.detect`."""
        return (Path(folder) / "config.json").is_file()

    def read(self, folder: str, job: Conversion, held: contextlib.ExitStack) -> "Contents":
        """See :meth:`Format.read`."""
        from megatron.conversion.hf import read_hf

        return read_hf(folder, job.tokenizer_options)

    def for_layout(self, contents: "Contents", job: Conversion) -> "Contents":
        """See :meth:`Format.for_layout`; there are no layouts."""
        if job.layout is not None:
            raise ValueError("--tp, --pp and --ep have no meaning for --to hf, whose files know no layout; drop them")
        return contents

    def write(self, contents: "Contents", job: Conversion) -> Generator[str, None, Path]:
        """See :meth:`Format.write`."""
        from megatron.conversion.hf import write_hf
        from megatron.conversion.shards import parse_size
        from megatron.conversion.tokenizer import tokenizer_of

        yield from ()
        tokenizer, files = tokenizer_of(contents, job.tokenizer_options)
        return write_hf(contents, job.save, tokenizer, files, parse_size(job.max_shard_size or "5GB"))

    def inspect(self, folder: str, verify: bool) -> Inspected:
        """See :meth:`Format.inspect`. An export's checksums are always compared; folders of other origin have none."""
        from megatron.conversion.hf import has_checksums, read_hf

        return Inspected(read_hf(folder, {}), has_checksums(folder))
