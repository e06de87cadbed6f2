"""What a Hugging Face folder holds beside weights and vocabulary: ids of special tokens, settings of generation and
tokenizer, a chat template.

Only the ids mean something here. All of it is carried in meta.json under ``huggingface``, and goes into exports::

    config                the ids of config.json
    generation_config     the content of generation_config.json
    tokenizer_config      the content of tokenizer_config.json
    special_tokens_map    the content of special_tokens_map.json
    chat_template         the text of chat_template.jinja
    split_special_tokens  whether special tokens' names in a text are text; where the tokenizer is the folder's own
"""

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron.conversion.shards import read_json
from megatron.data.tokenizer import Tokenizer

KEY = "huggingface"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_GPT2_DEFAULT = 50256  # bos_token_id and eos_token_id of transformers' GPT2Config
_OF_TOKENIZER = ("tokenizer_config", "special_tokens_map")
_TEMPLATE = "chat_template.jinja"
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MORE_NAMES = ("additional_special_tokens", "extra_special_tokens")
_NOT_CARRIED = ("additional_chat_templates", "chat_template.json", "processor_config.json")


def read_extras(folder: Path, about: Mapping[str, Any], *, with_tokenizer: bool) -> tuple[dict[str, Any], list[str]]:
    """What is carried, and what is not, in words.

    Args:
        folder: of the model.
        about: the content of its config.json.
        with_tokenizer: whether the tokenizer in the folder is the one that is used.
    """
    extras: dict[str, Any] = {"config": {key: about[key] for key in IDS if key in about}}
    for key in ("bos_token_id", "eos_token_id"):
        extras["config"].setdefault(key, _GPT2_DEFAULT)
    notes = [f"left out: {name}" for name in _NOT_CARRIED if (folder / name).exists()]
    for name in ("generation_config", *_OF_TOKENIZER):
        if (folder / f"{name}.json").is_file():
            extras[name] = read_json(folder / f"{name}.json")
    if (folder / _TEMPLATE).is_file():
        extras["chat_template"] = (folder / _TEMPLATE).read_text(encoding="utf-8")
    if not with_tokenizer:
        gone = [name for name in (*_OF_TOKENIZER, "chat_template") if extras.pop(name, None) is not None]
        notes += [f"left out, as the tokenizer is another one: {', '.join(gone)}"] if gone else []
        return extras, notes
    settings = extras.get("tokenizer_config", {})
    extras["split_special_tokens"] = bool(settings.get("split_special_tokens"))
    if settings.pop("auto_map", None) is not None:
        notes.append("left out: auto_map of tokenizer_config.json; the tokenizer's own code is not run")
    return extras, notes


def end_of_document(extras: Mapping[str, Any], name_of: Callable[[int], str | None]) -> str | None:
    """The token that ends a document: the first eos_token_id of the model that the tokenizer has, or else the eos_token
    of the tokenizer's settings; None where there is neither."""
    for part in ("config", "generation_config"):
        for token in _ids(extras.get(part, {}).get("eos_token_id")):
            if (name := name_of(token)) is not None:
                return name
    return named_token(extras, "eos_token")


def special_names(extras: Mapping[str, Any]) -> dict[str, str]:
    """Each special token that the tokenizer's settings name, and as what."""
    found = {name: key for key in _NAMES if (name := named_token(extras, key)) is not None}
    for part, key in itertools.product(_OF_TOKENIZER, _MORE_NAMES):
        tokens = extras.get(part, {}).get(key) or ()
        for token in tokens.values() if isinstance(tokens, Mapping) else tokens:
            found.setdefault(token["content"] if isinstance(token, Mapping) else token, key)
    return found


def named_token(extras: Mapping[str, Any], key: str) -> str | None:
    """A special token's name in the tokenizer's settings."""
    for part in _OF_TOKENIZER:
        token = extras.get(part, {}).get(key)
        if isinstance(token, Mapping):
            token = token.get("content")
        if isinstance(token, str):
            return token
    return None


def replace_unknown_ids(
    extras: dict[str, Any], tokenizer: Tokenizer, name_of: Callable[[int], str | None]
) -> list[str]:
    """Replace ids that are none of the tokenizer's, in place: they would never occur. Returns what was done."""
    notes = []
    for part in ("config", "generation_config"):
        for key in IDS:
            given = extras.get(part, {}).get(key)
            known = [token for token in _ids(given) if name_of(token) is not None]
            if given in (None, []) or (known and len(known) == (len(given) if isinstance(given, list) else 1)):
                continue
            instead = known or (None if key == "pad_token_id" else tokenizer.eod)
            extras[part][key] = instead
            notes.append(f"{part}.json: {key} {given} is none of the tokenizer's; {instead} is taken")
    return notes


def _ids(value: Any) -> list[int]:
    return [token for token in (value if isinstance(value, list) else [value]) if type(token) is int]


def write_extras(folder: Path, extras: Mapping[str, Any]) -> None:
    """The files of an export that are as they came; the others need what only the caller knows."""
    if "special_tokens_map" in extras:
        write_json(folder / "special_tokens_map.json", extras["special_tokens_map"])
    if "chat_template" in extras:
        (folder / _TEMPLATE).write_text(extras["chat_template"], encoding="utf-8")


def names(extras: Mapping[str, Any]) -> list[str]:
    """What is carried, for people."""
    return [name for name in ("generation_config", *_OF_TOKENIZER, "chat_template") if name in extras]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON file as Hugging Face's libraries write them: letters of any alphabet as they are."""
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
