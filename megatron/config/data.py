"""Where the tokens come from."""

import dataclasses

from megatron.config.fields import option

TOKENIZERS = ("GPT2BPETokenizer", "SentencePieceTokenizer", "HFTokenizer", "TiktokenTokenizer", "ByteTokenizer")


@dataclasses.dataclass
class DataConfig:
    """Preprocessed .bin/.idx datasets and the tokenizer that made them."""

    data_path: tuple[str, ...] = option(
        (), "Dataset prefix (of PREFIX.bin and PREFIX.idx), or a blend: WEIGHT PREFIX WEIGHT PREFIX ..., or PREFIX "
        "PREFIX ... in proportion to their tokens. --split divides it into training, validation and test data.",
        nargs="+", metavar="PREFIX",
    )  # fmt: skip
    split: str = option("98,2,0", "Shares of the documents of --data-path for training, validation and test.")
    train_data_path: tuple[str, ...] = option(
        (), "Training data in place of --data-path, in the same forms; all of it is trained on. Without "
        "--valid-data-path there is no validation.", nargs="+", metavar="PREFIX",
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
        nargs="+", metavar="FIRST-END",
    )  # fmt: skip
    change_blend: bool = option(
        False, "Resume with training data that differ from the checkpoint's; each corpus continues where the run left "
        "it.",
    )  # fmt: skip
    reset_position_ids: bool = option(False, "Restart position ids after each end-of-document token.")
    reset_attention_mask: bool = option(
        False, "Let tokens attend only to their own document. On GPUs in bf16 and fp16, requires --attention-dropout 0."
    )
    eod_mask_loss: bool = option(False, "Leave out the loss of predicting what follows an end-of-document token.")
    data_cache_path: str | None = option(
        None, "Folder of the sample-index cache (default: a folder beside the dataset).", metavar="DIR"
    )
    tokenizer_type: str = option("GPT2BPETokenizer", "Kind of tokenizer.", choices=TOKENIZERS)
    vocab_file: str | None = option(None, "GPT2BPETokenizer: vocab.json.", metavar="FILE")
    merge_file: str | None = option(None, "GPT2BPETokenizer: merges.txt.", metavar="FILE")
    tokenizer_model: str | None = option(
        None, "SentencePieceTokenizer: the .model file. HFTokenizer: the tokenizer.json file. TiktokenTokenizer: the "
        "file of ranks under its name, such as cl100k_base.tiktoken.", metavar="FILE",
    )  # fmt: skip
    eod_token: str | None = option(
        None, "Token that ends a document (default: the first of <|endoftext|>, </s>, <|end_of_text|>, <eos> in the "
        "vocabulary; of a SentencePiece model, its own).", metavar="TOKEN",
    )  # fmt: skip
    allow_tokenizer_mismatch: bool = option(
        False, "Read data, and go on from a checkpoint, of another tokenizer by its fingerprint; tokens must still fit "
        "into the vocabulary.",
    )  # fmt: skip
    num_workers: int = option(2, "Processes that load data for each rank; 0 loads in the rank itself.")
