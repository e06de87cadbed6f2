"""The formats of checkpoints. Each is a class in a file of its own, listed here.

The command lines read their choices and help from this list before anything heavy is imported, so the files import
torch and the rest only in their methods.
"""

from megatron.conversion.formats.base import Format, Inspected
from megatron.conversion.formats.hf import HuggingFace
from megatron.conversion.formats.megatron_deepspeed import MegatronDeepSpeed
from megatron.conversion.formats.megatron_lm import MegatronLM
from megatron.conversion.formats.native import Native

__all__ = ["FORMATS", "Format", "Inspected", "format_of", "readers", "writers"]

NATIVE = Native()
# In the order in which they are asked about a folder: one of Megatron-DeepSpeed's may look like Megatron-LM's too.
FORMATS: dict[str, Format] = {
    format_.name: format_ for format_ in (NATIVE, HuggingFace(), MegatronDeepSpeed(), MegatronLM())
}


def format_of(folder: str) -> Format:
    """The format of a folder: the first that recognizes it, else the native one, whose reader says what is missing."""
    return next((format_ for format_ in FORMATS.values() if format_.detect(folder)), NATIVE)


def readers(option: str | None = None) -> list[str]:
    """Names of the formats that are read; those for whose reader ``option`` has a meaning."""
    return [name for name, format_ in FORMATS.items() if option is None or option in format_.read_options]


def writers(option: str | None = None) -> list[str]:
    """Names of the formats that are written; those for whose writer ``option`` has a meaning."""
    return [
        name
        for name, format_ in FORMATS.items()
        if format_.writable and (option is None or option in format_.write_options)
    ]
