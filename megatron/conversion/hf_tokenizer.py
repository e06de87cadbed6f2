"""A tokenizer in the files that Hugging Face's AutoTokenizer reads.

The ids are the same for every text. So ``split_special_tokens`` is set for a tokenizer of ours: as in training, text
that happens to spell ``<|endoftext|>`` is text. A tokenizer that came from Hugging Face goes out as it came.
"""

import importlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.checkpoint.errors import CheckpointError
from megatron.config import DataConfig
from megatron.conversion.hf_extras import named_token, write_extras, write_json
from megatron.conversion.job import TOKENIZER_FILES
from megatron.data.tokenizer import GPT2BPETokenizer, HFTokenizer, SentencePieceTokenizer, Tokenizer

_SPACE = "\u2581"  # how SentencePiece writes a space
_PROBES = ("", " ", "  two  spaces ", "line\nline\r\n\ttab", "<0x41></s><unk>", "Zażółć 你好 🙂", "don't 3.14 re-do")
_ORIGINAL = "original_tokenizer.json"


def files_of(data: DataConfig) -> dict[str, str]:
    """The files of the tokenizer that ``data`` describes, by option."""
    fields = TOKENIZER_FILES[:2] if data.tokenizer_type == GPT2BPETokenizer.kind else TOKENIZER_FILES[2:]
    return {field: getattr(data, field) for field in fields if getattr(data, field) is not None}


def write_tokenizer(
    tokenizer: Tokenizer, files: Mapping[str, str], folder: Path, positions: int, extras: Mapping[str, Any]
) -> dict[str, str]:
    """Write a tokenizer into an exported model's folder.

    Args:
        tokenizer: the model's.
        files: its files, by option.
        folder: where to.
        positions: of the model.
        extras: what a model that came from Hugging Face brought (:mod:`megatron.conversion.hf_extras`).

    Returns:
        By option, the names of the tokenizer's own files in that folder, unchanged copies.

    Raises:
        CheckpointError: Hugging Face's form of it would give other ids.
    """
    from tokenizers import Tokenizer as Backend

    if tokenizer.kind == GPT2BPETokenizer.kind:
        backend = _gpt2(files, tokenizer.eod)
        copies = {"vocab_file": "vocab.json", "merge_file": "merges.txt"}
    elif tokenizer.kind == HFTokenizer.kind and "split_special_tokens" in extras:
        backend = Backend.from_file(files["tokenizer_model"])
        copies = {"tokenizer_model": "tokenizer.json"}
    elif tokenizer.kind == HFTokenizer.kind:
        backend = Backend.from_file(files["tokenizer_model"])
        copies = {"tokenizer_model": _ORIGINAL}
        if _adds_tokens(backend):
            backend.post_processor = None
        backend.no_truncation()
        backend.no_padding()
    elif tokenizer.kind == SentencePieceTokenizer.kind:
        backend = _sentencepiece(files["tokenizer_model"], tokenizer)
        copies = {"tokenizer_model": "tokenizer.model"}
    else:
        raise CheckpointError(
            f"--tokenizer-type {tokenizer.kind} cannot be exported: there is no form of it for AutoTokenizer here; "
            "models with a GPT2BPETokenizer, an HFTokenizer or a SentencePieceTokenizer can"
        )
    for field, name in copies.items():
        shutil.copyfile(files[field], folder / name)
    if "tokenizer.json" not in copies.values():
        (folder / "tokenizer.json").write_text(backend.to_str(pretty=True), encoding="utf-8")  # save() hides OSErrors
    begin = (extras.get("config") or {}).get("bos_token_id")
    end = backend.id_to_token(tokenizer.eod)
    usual = {
        "bos_token": named_token(extras, "bos_token") or (end if begin is None else backend.id_to_token(begin)),
        "eos_token": named_token(extras, "eos_token") or end,
        "clean_up_tokenization_spaces": False,
        # without this, transformers 4 makes token_type_ids too, and its GPT-2 adds their embeddings
        "model_input_names": ["input_ids", "attention_mask"],
    }
    before = json.loads(backend.to_str()).get("pre_tokenizer") or {}
    if "add_prefix_space" in before:  # transformers 4 would put false there
        usual["add_prefix_space"] = before["add_prefix_space"]
    split = extras.get("split_special_tokens", True)
    own = extras.get("tokenizer_config", {"split_special_tokens": split, "model_max_length": positions})
    # of this class, which takes tokenizer.json as it is; others make it anew of its vocabulary
    write_json(folder / "tokenizer_config.json", usual | own | {"tokenizer_class": "PreTrainedTokenizerFast"})
    write_extras(folder, extras)
    return copies


def _gpt2(files: Mapping[str, str], end: int) -> Any:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    backend = Backend(models.BPE.from_file(files["vocab_file"], files["merge_file"]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([backend.id_to_token(end)])
    return backend


def _sentencepiece(file: str, tokenizer: Tokenizer) -> Any:
    """A unigram model that keeps text as it is, as tools/train_tokenizer.py makes them, in the tokenizers library."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    protobuf = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    model = protobuf.ModelProto.FromString(Path(file).read_bytes())
    trained, normal = model.trainer_spec, model.normalizer_spec
    fits = {
        "a unigram model": trained.model_type == trained.UNIGRAM,
        "with bytes for unknown letters": trained.byte_fallback,
        "without normalisation": normal.name == "identity" and not normal.precompiled_charsmap,
        "without a space before the text": not normal.add_dummy_prefix,
        "that keeps all spaces": not normal.remove_extra_whitespaces and normal.escape_whitespaces,
        "without pieces of the user's own": not trained.user_defined_symbols,
    }
    if lacking := [what for what, is_so in fits.items() if not is_so]:
        raise CheckpointError(
            f"--tokenizer-model {file} cannot be exported with the same ids: it would have to be {', '.join(lacking)}; "
            "models of tools/train_tokenizer.py with --model-type unigram can"
        )
    vocabulary = [(piece.piece, piece.score) for piece in model.pieces]
    backend = Backend(models.Unigram(vocabulary, unk_id=trained.unk_id, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", _SPACE)
    special = [piece.piece for piece in model.pieces if piece.type in (piece.CONTROL, piece.UNKNOWN)]
    normal = [piece.piece for piece in model.pieces if piece.type == piece.NORMAL]
    beginnings = [(text, "") for text in special] + [("<0x", "[0-9A-F]{2}>")]
    found = [_never_whole(text, rest, normal) for text, rest in beginnings]
    splits = [split for split in found if split is not None]
    if len(splits) < len(found):
        raise CheckpointError(
            f"--tokenizer-model {file} cannot be exported: its pieces overlap the names of special ones"
        )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(split), "merged_with_previous") for split in splits]
    )
    backend.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([vocabulary[tokenizer.eod][0]])
    for text in (*_PROBES, *(piece.replace(_SPACE, " ") for piece, _ in vocabulary)):
        backend.encode_special_tokens = True
        if backend.encode(text, add_special_tokens=False).ids != tokenizer.encode(text):
            raise CheckpointError(f"--tokenizer-model {file} cannot be exported: {text!r} would get other ids")
    return backend


def _never_whole(start: str, rest: str, normal: list[str]) -> str | None:
    """A pattern after whose matches text is cut, so that the name of a special piece is not taken for the piece.

    SentencePiece never does that; the tokenizers library would. The cut is between two letters that no normal piece
    has in a row, so that it changes nothing else. None where there are no such letters.
    """
    for at in range(1, len(start)):
        if not any(start[at - 1 : at + 1] in piece for piece in normal):
            return f"{re.escape(start[:at])}(?={re.escape(start[at:])}{rest})"
    return None


def _adds_tokens(backend: Any) -> bool:
    """Whether its post-processor adds tokens to a text, as training does not."""
    return backend.num_special_tokens_to_add(is_pair=False) > 0
