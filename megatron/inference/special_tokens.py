"""Which tokens begin and end a generated text, and whether they are recognised in one."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron.conversion.hf_extras import KEY as HUGGINGFACE
from megatron.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Token ids; for a model that was trained here, both are the end-of-document token."""

    begin: int
    """The first token of a text without a prompt."""
    ends: frozenset[int]
    """Each of these ends a text."""


def special_tokens(meta: Mapping[str, Any], tokenizer: Tokenizer) -> SpecialTokens:
    """Those of a checkpoint: a model that came from Hugging Face has its own, maybe several that end a text.

    Args:
        meta: the checkpoint's metadata.
        tokenizer: the checkpoint's.
    """
    carried = meta.get(HUGGINGFACE) or {}
    parts = [carried.get(name) or {} for name in ("generation_config", "config")]

    def first(key: str) -> Any:
        return next((part[key] for part in parts if part.get(key) not in (None, [])), tokenizer.eod)

    ends = first("eos_token_id")
    return SpecialTokens(first("bos_token_id"), frozenset(ends if isinstance(ends, list) else [ends]))


def splits_special_tokens(meta: Mapping[str, Any]) -> bool:
    """Whether a special token's name in a prompt is text, as it is in training. For a model that came from Hugging Face
    its tokenizer's setting decides, and by default the name is the token."""
    return (meta.get(HUGGINGFACE) or {}).get("split_special_tokens", True)
