"""Where the tokens come from."""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron.config.option import option, rule

if TYPE_CHECKING:
    from megatron.config.run import RunConfig

TOKENIZERS = ("GPT2BPETokenizer", "SentencePieceTokenizer", "HFTokenizer", "TiktokenTokenizer", "ByteTokenizer")


@dataclasses.dataclass
class DataConfig:
    """Preprocessed .bin/.idx datasets and the tokenizer that made them."""

    data_path: tuple[str, ...] = option(
        (), "Dataset prefix (of PREFIX.bin and PREFIX.idx), or a blend: WEIGHT PREFIX WEIGHT PREFIX ..., or PREFIX "
        "PREFIX ... in proportion to their tokens. --split divides it into training, validation and test data.",
        nargs="+", metavar="PREFIX", resumable=True,
    )  # fmt: skip
    split: str = option(
        "98,2,0", "Shares of the documents of --data-path for training, validation and test.", resumable=True
    )
    train_data_path: tuple[str, ...] = option(
        (), "Training data in place of --data-path, in the same forms; all of it is trained on. Without "
        "--valid-data-path there is no validation.", nargs="+", metavar="PREFIX", resumable=True,
    )  # fmt: skip
    valid_data_path: tuple[str, ...] = option(
        (), "With --train-data-path: validation sets, each with its own loss. A set is called NAME, or like its file "
        "without _text_document. WEIGHT PREFIX WEIGHT PREFIX ... is one set.", nargs="+", metavar="[NAME=]PREFIX",
    )  # fmt: skip
    test_data_path: tuple[str, ...] = option(
        (), "With --train-data-path: test sets, evaluated once at the end of training; forms as for --valid-data-path.",
        nargs="+", metavar="[NAME=]PREFIX",
    )  # fmt: skip
    skip_samples: tuple[str, ...] = option(
        (), "Spans FIRST-END of training samples to leave out, numbered from 0 in the order in which a run reads them.",
        nargs="+", metavar="FIRST-END", resumable=True,
    )  # fmt: skip
    change_blend: bool = option(
        False, "Resume with training data that differ from the checkpoint's; each corpus continues where the run left "
        "it.", resumable=True,
    )  # fmt: skip
    reset_position_ids: bool = option(False, "Restart position ids after each end-of-document token.")
    reset_attention_mask: bool = option(
        False, "Let tokens attend only to their own document. On GPUs in bf16 and fp16, requires --attention-dropout 0."
    )
    eod_mask_loss: bool = option(False, "Leave out the loss of predicting what follows an end-of-document token.")
    data_cache_path: str | None = option(
        None, "Folder of the sample-index cache (default: a folder beside the dataset).", metavar="DIR", resumable=True
    )
    tokenizer_type: str = option("GPT2BPETokenizer", "Kind of tokenizer.", choices=TOKENIZERS, resumable=True)
    vocab_file: str | None = option(None, "GPT2BPETokenizer: vocab.json.", metavar="FILE", resumable=True)
    merge_file: str | None = option(None, "GPT2BPETokenizer: merges.txt.", metavar="FILE", resumable=True)
    tokenizer_model: str | None = option(
        None, "SentencePieceTokenizer: the .model file. HFTokenizer: the tokenizer.json file. TiktokenTokenizer: the "
        "file of ranks under its name, such as cl100k_base.tiktoken.", metavar="FILE", resumable=True,
    )  # fmt: skip
    eod_token: str | None = option(
        None, "Token that ends a document (default: the first of <|endoftext|>, </s>, <|end_of_text|>, <eos> in the "
        "vocabulary; of a SentencePiece model, its own).", metavar="TOKEN", resumable=True,
    )  # fmt: skip
    allow_tokenizer_mismatch: bool = option(
        False, "Read data, and go on from a checkpoint, of another tokenizer by its fingerprint; tokens must still fit "
        "into the vocabulary.", resumable=True,
    )  # fmt: skip
    num_workers: int = option(
        2, "Processes that load data for each rank; 0 loads in the rank itself.", min=0, resumable=True
    )


# What the words of these options mean is defined in megatron.data, which imports this file.


@rule("data_path", "split", "train_data_path", "valid_data_path", "test_data_path", "eval_interval")
def data_options(config: "RunConfig", world_size: int) -> Iterator[str]:
    """Paths, blends and shares of ``--split`` define datasets, all of which are read."""
    from megatron.data.corpora import word_problems

    yield from word_problems(config.data, config.training.eval_interval)


@rule("data_path", "split", "train_data_path", "valid_data_path", "test_data_path", files=True)
def data_files(config: "RunConfig", world_size: int) -> Iterator[str]:
    """A run has data, and their files are there."""
    from megatron.data.corpora import file_problems

    yield from file_problems(config.data)


@rule("tokenizer_type", "vocab_file", "merge_file", "tokenizer_model", "eod_token", files=True)
def tokenizer(config: "RunConfig", world_size: int) -> Iterator[str]:
    """The tokenizer has the files that it is made from."""
    from megatron.data.tokenizer import tokenizer_problems

    yield from tokenizer_problems(config.data)


@rule("skip_samples")
def skip_samples(config: "RunConfig", world_size: int) -> Iterator[str]:
    """Samples to leave out are given as spans."""
    from megatron.data.spans import parse_span

    for word in config.data.skip_samples:
        try:
            parse_span(word)
        except ValueError as error:
            yield f"--skip-samples: {error}"


@rule("reset_attention_mask", "attention_dropout", "precision", "device")
def document_attention(config: "RunConfig", world_size: int) -> Iterator[str]:
    """Attention within documents has no dropout where torch's has none."""
    dropout, on_cpu = config.model.attention_dropout, config.training.device == "cpu"
    if config.data.reset_attention_mask and dropout > 0 and config.optimizer.precision != "fp32" and not on_cpu:
        yield (
            f"--reset-attention-mask requires --attention-dropout 0 on GPUs in {config.optimizer.precision}, where"
            f" torch's variable-length attention has no dropout; got {dropout:g}. Use --attention-dropout 0, or drop"
            " --reset-attention-mask"
        )


@rule("change_blend", "load")
def change_blend(config: "RunConfig", world_size: int) -> Iterator[str]:
    """``--change-blend`` has a run to resume."""
    if config.data.change_blend and config.checkpoint.load is None:
        yield "--change-blend requires --load, the run to resume; add --load DIR, or drop --change-blend"
