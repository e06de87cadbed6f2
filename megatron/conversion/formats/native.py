"""This project's own checkpoints."""

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.conversion.formats.base import Format, Inspected
from megatron.conversion.job import Conversion

if TYPE_CHECKING:
    from megatron.conversion.contents import Contents


class Native(Format):
    """What training runs save and load, in any layout."""

    name = "native"
    title = "a training run"
    help = "this project's checkpoints: a run's --save folder, or one checkpoint in it"
    writable = True
    keeps_optimizer = True

    def read(self, folder: str, job: Conversion, held: contextlib.ExitStack) -> "Contents":
        """See :meth:`Format.read`. Until ``held`` is closed, a run that goes on does not delete the checkpoint."""
        from megatron.checkpoint import latest
        from megatron.checkpoint.folder import in_use
        from megatron.conversion.native import read_native
        from megatron.conversion.tokenizer import with_tokenizer

        found = latest(folder) if Path(folder).is_dir() else None
        if found is not None:
            held.enter_context(in_use(found))
        return with_tokenizer(read_native(found or folder), job.tokenizer_options)

    def write(self, contents: "Contents", job: Conversion) -> Generator[str, None, Path]:
        """See :meth:`Format.write`."""
        from megatron.conversion.native import write_native

        yield from ()
        return write_native(contents, job.save)

    def inspect(self, folder: str, verify: bool) -> Inspected:
        """See :meth:`Format.inspect`."""
        from megatron.checkpoint.folder import checkpoint_status
        from megatron.conversion.native import read_native

        contents = read_native(folder, verify)
        return Inspected(contents, verify, checkpoint_status(Path(contents.where)).value)
