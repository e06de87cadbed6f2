"""The tokenizer of a Hugging Face folder, so that a text gets the ids that it gets there.

tokenizer.json is what transformers' tokenizers compute from, and is taken where it is there. GPT-2's vocab.json with
merges.txt, or a SentencePiece model, is taken where there is no tokenizer.json, or one that adds nothing to them.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron.checkpoint.errors import CheckpointError, some
from megatron.config import DataConfig
from megatron.conversion.hf_extras import end_of_document, named_token, special_names
from megatron.conversion.shards import read_json
from megatron.data.tokenizer import GPT2BPETokenizer, HFTokenizer, SentencePieceTokenizer, Tokenizer, build_tokenizer

NameOf = Callable[[int], str | None]
_GPT2_CLASSES = (None, "GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
_WRITE_IT = (
    "write one that holds everything: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER), or give the "
    "tokenizer by --tokenizer-type and its files"
)


def find_tokenizer(
    folder: Path, given: Mapping[str, str], extras: Mapping[str, Any]
) -> tuple[Tokenizer, dict[str, Any], NameOf, list[str]]:
    """The tokenizer of a folder, or the one that ``given`` describes (``tokenizer_type``, files, ``eod_token``).

    Args:
        folder: of the model.
        given: options of the tokenizer, by name.
        extras: what the folder says of special tokens (:mod:`megatron.conversion.hf_extras`).

    Returns:
        The tokenizer, the options that describe it, the name of each id (None where it has none), and messages
        for the user.

    Raises:
        ValueError: a file is wrong.
        CheckpointError: there is none, or it would give other ids than there.
    """
    options: dict[str, Any] = {"tokenizer_type": DataConfig().tokenizer_type} | dict(given)
    if not given.keys() - {"eod_token"}:
        try:
            options = _in_folder(folder, extras) | dict(given)
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{folder}: the tokenizer's files are not as transformers writes them: {error!r}; {_WRITE_IT}"
            ) from None
    name_of = _names(options)
    notes = []
    if "eod_token" not in options and (end := end_of_document(extras, name_of)) is not None:
        options["eod_token"] = end
        own = named_token(extras, "eos_token")
        if own not in (None, end):
            notes.append(f"a document ends with {end}, the model's eos_token_id; the tokenizer's eos_token is {own}")
    tokenizer = build_tokenizer(DataConfig(**options))
    if options["tokenizer_type"] == HFTokenizer.kind and (added := _added_around(options["tokenizer_model"])):
        notes.append(f"tokens that the tokenizer there adds around a text are not added here: {added}")
    return tokenizer, options, name_of, notes


def _in_folder(folder: Path, extras: Mapping[str, Any]) -> dict[str, Any]:
    vocab, merges, pieces = folder / "vocab.json", folder / "merges.txt", folder / "tokenizer.model"
    gpt2 = {"tokenizer_type": GPT2BPETokenizer.kind, "vocab_file": str(vocab), "merge_file": str(merges)}
    has_gpt2, model = vocab.is_file() and merges.is_file(), folder / "tokenizer.json"
    if model.is_file():
        content = read_json(model)
        _check_settings(folder, content, extras)
        if has_gpt2 and _is_plain_gpt2(content, vocab, merges):
            return gpt2
        if pieces.is_file() and _is_plain_sentencepiece(model, pieces):
            return {"tokenizer_type": SentencePieceTokenizer.kind, "tokenizer_model": str(pieces)}
        return {"tokenizer_type": HFTokenizer.kind, "tokenizer_model": str(model)}
    if has_gpt2:
        _check_nothing_added(folder, read_json(vocab), extras)
        return gpt2
    if pieces.is_file():
        _check_nothing_added(folder, _piece_ids(str(pieces)), extras, any_class=True)
        return {"tokenizer_type": SentencePieceTokenizer.kind, "tokenizer_model": str(pieces)}
    if (folder / "vocab.txt").is_file():
        raise CheckpointError(f"{folder} has its tokenizer in vocab.txt, and no tokenizer.json; {_WRITE_IT}")
    raise CheckpointError(
        f"{folder} holds no tokenizer: looked for tokenizer.json, vocab.json with merges.txt, and tokenizer.model; "
        "give one by --tokenizer-type and --vocab-file with --merge-file, or --tokenizer-model"
    )


def _check_settings(folder: Path, content: dict[str, Any], extras: Mapping[str, Any]) -> None:
    """Raises CheckpointError where transformers would change what tokenizer.json says by the folder's other files."""
    settings = extras.get("tokenizer_config", {})
    in_file = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
    problems = [
        f"{name} is {token} in {file}, {in_file.get(name, 'missing')} among the added tokens of tokenizer.json"
        for file, added in _added_elsewhere(folder, settings)
        for name, (token, _) in added.items()
        if in_file.get(name) != token
    ]
    problems += [
        f"{key} {name} is none of the added tokens of tokenizer.json"
        for name, key in special_names(extras).items()
        if name not in in_file
    ]
    before, normal = content.get("pre_tokenizer") or {}, content.get("normalizer") or {}
    compared = [(before, "add_prefix_space", "add_prefix_space")]
    if normal.get("type") == "BertNormalizer":
        names = {"do_lower_case": "lowercase", "strip_accents": "strip_accents"}
        names["tokenize_chinese_chars"] = "handle_chinese_chars"
        compared += [(normal, ours, theirs) for theirs, ours in names.items()]
    problems += [
        f"{theirs} is {settings[theirs]} in tokenizer_config.json, {part[ours]} in tokenizer.json"
        for part, ours, theirs in compared
        if ours in part and theirs in settings and part[ours] != settings[theirs]
    ]
    if problems:
        raise CheckpointError(f"{folder}: the tokenizer's files contradict each other: {some(problems)}; {_WRITE_IT}")


def _added_elsewhere(folder: Path, settings: Mapping[str, Any]) -> list[tuple[str, dict[str, tuple[int, bool | None]]]]:
    """Added tokens by file: id, and whether special where the file says so."""
    found: list[tuple[str, dict[str, tuple[int, bool | None]]]] = []
    if (folder / "added_tokens.json").is_file():
        added = read_json(folder / "added_tokens.json")
        found.append(("added_tokens.json", {name: (token, None) for name, token in added.items()}))
    decoder = settings.get("added_tokens_decoder") or {}
    told: dict[str, tuple[int, bool | None]] = {
        token["content"]: (int(number), bool(token.get("special"))) for number, token in decoder.items()
    }
    return [*found, ("tokenizer_config.json", told)]


def _check_nothing_added(
    folder: Path, vocab: Mapping[str, int], extras: Mapping[str, Any], *, any_class: bool = False
) -> None:
    """Raises CheckpointError where the folder's other files add to a vocabulary that has no tokenizer.json."""
    settings = extras.get("tokenizer_config", {})
    problems = [
        f"{name} is token {token} in {file}"
        for file, added in _added_elsewhere(folder, settings)
        for name, (token, special) in added.items()
        if vocab.get(name) != token or special is False
    ]
    if settings.get("add_prefix_space") and not any_class:
        problems.append("add_prefix_space is true in tokenizer_config.json")
    if not any_class and (made_by := settings.get("tokenizer_class")) not in _GPT2_CLASSES:
        problems.append(f"tokenizer_class is {made_by} in tokenizer_config.json")
    problems += [
        f"{key} {name} is not in the vocabulary" for name, key in special_names(extras).items() if name not in vocab
    ]
    if problems:
        raise CheckpointError(
            f"{folder} has no tokenizer.json, and its other files change what its vocabulary says: {some(problems)}; "
            f"{_WRITE_IT}"
        )


def _is_plain_gpt2(content: dict[str, Any], vocab: Path, merges: Path) -> bool:
    """Whether tokenizer.json is what GPT-2's two files say, and no more."""
    model, before = content.get("model") or {}, content.get("pre_tokenizer") or {}
    ids = read_json(vocab)
    lines = merges.read_text(encoding="utf-8").split("\n")
    listed = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges") or []]
    usual = {"dropout": None, "continuing_subword_prefix": "", "end_of_word_suffix": ""}
    return (
        content.get("normalizer") is None
        and before.get("type") == "ByteLevel"
        and before.get("add_prefix_space") is False
        and before.get("use_regex", True)
        and model.get("type", "BPE") == "BPE"
        and all((model.get(key) or value) == value for key, value in usual.items())
        and not (model.get("byte_fallback") or model.get("ignore_merges"))
        and model.get("vocab") == ids
        and pairs == listed
        and all(ids.get(t["content"]) == t["id"] and t["special"] for t in content.get("added_tokens") or [])
    )


def _is_plain_sentencepiece(model: Path, pieces: Path) -> bool:
    """Whether tokenizer.json has the pieces of the SentencePiece model, and no more."""
    return _backend(str(model)).get_vocab(with_added_tokens=True) == _piece_ids(str(pieces))


def _piece_ids(file: str) -> dict[str, int]:
    import sentencepiece

    backend = sentencepiece.SentencePieceProcessor(model_proto=Path(file).read_bytes())
    return {backend.id_to_piece(token): token for token in range(backend.vocab_size())}


def _names(options: Mapping[str, Any]) -> NameOf:
    """The name of each id of a tokenizer that is not built yet."""
    kind = options["tokenizer_type"]
    if kind == HFTokenizer.kind and Path(options.get("tokenizer_model", "")).is_file():
        backend = _backend(options["tokenizer_model"])
        return lambda token: backend.id_to_token(token) if 0 <= token < 2**32 else None
    ids: Mapping[str, int] = {}
    if kind == GPT2BPETokenizer.kind and Path(options.get("vocab_file", "")).is_file():
        ids = read_json(Path(options["vocab_file"]))
    elif kind == SentencePieceTokenizer.kind and Path(options.get("tokenizer_model", "")).is_file():
        ids = _piece_ids(options["tokenizer_model"])
    return {token: name for name, token in ids.items()}.get


def _backend(file: str) -> Any:
    from tokenizers import Tokenizer as Backend

    try:
        return Backend.from_file(file)
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{file} is no Hugging Face tokenizer.json: {error}") from None


def _added_around(file: str) -> str:
    """The tokens that the tokenizer puts around a text, with ... for it."""
    backend = _backend(file)
    if backend.num_special_tokens_to_add(is_pair=False) == 0:
        return ""
    encoding = backend.encode("a", add_special_tokens=True)
    marked = zip(encoding.tokens, encoding.special_tokens_mask, strict=True)
    return " ".join(token if special else "..." for token, special in marked)
