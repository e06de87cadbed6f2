"""What a format is to a conversion and to the command lines."""

import contextlib
import dataclasses
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from megatron.conversion.job import Conversion

if TYPE_CHECKING:
    from megatron.conversion.contents import Contents


@dataclasses.dataclass(frozen=True)
class Inspected:
    """What an inspection finds: the checkpoint, whether its files were compared with checksums, and its status."""

    contents: "Contents"
    verified: bool
    status: str | None = None


class Format:
    """A format of checkpoints.

    Attributes:
        name: of ``--from`` and ``--to``.
        title: whose it is, in messages.
        help: what ``--help`` says of it.
        writable: whether :meth:`write` is there.
        keeps_optimizer: whether it holds an optimizer's state; else that is left out before :meth:`write`.
        read_options: flags that have a meaning only for some formats, and have one for :meth:`read`.
        write_options: the same for :meth:`write`.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    help: ClassVar[str]
    writable: ClassVar[bool] = False
    keeps_optimizer: ClassVar[bool] = False
    read_options: ClassVar[frozenset[str]] = frozenset()
    write_options: ClassVar[frozenset[str]] = frozenset()

    def detect(self, folder: str) -> bool:
        """Whether the folder looks like one of this format."""
        return False

    def read(self, folder: str, job: Conversion, held: contextlib.ExitStack) -> "Contents":
        """What the folder holds; tensors are read later.

        Args:
            folder: the checkpoint.
            job: its tokenizer options, and those that ``read_options`` names.
            held: closed at the end of the conversion.

        Raises:
            CheckpointError: something is missing, damaged or unknown; it is named.
            ValueError: of the tokenizer.
        """
        raise NotImplementedError

    def for_layout(self, contents: "Contents", job: Conversion) -> "Contents":
        """The checkpoint for the layout that ``job`` names, which is recorded in it if it can resume it.

        Raises:
            ValueError: this format has no such layout, or the layout does not fit the model.
        """
        from megatron.conversion.changes import for_layout

        return contents if job.layout is None else for_layout(contents, *job.layout)

    def write(self, contents: "Contents", job: Conversion) -> Generator[str, None, Path]:
        """Write a checkpoint to ``job.save``; yields what the user should know, and returns the folder.

        Raises:
            CheckpointError: the folder is taken, the disk is too small, or reading failed; nothing is left behind.
        """
        raise NotImplementedError

    def inspect(self, folder: str, verify: bool) -> Inspected:
        """Read what describes a checkpoint.

        Args:
            folder: the checkpoint.
            verify: compare every file with its checksum.

        Raises:
            CheckpointError: it is damaged, or this format is not inspected.
        """
        from megatron.checkpoint import CheckpointError

        raise CheckpointError(f"{folder} is {self.title}'s; inspect what convert_checkpoint --to native makes of it")
