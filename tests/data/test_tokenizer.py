"""Tokenizers: equal to the reference implementations, and text comes back as it was."""

import json

import corpus
import pytest

from megatron.config import DataConfig
from megatron.data.errors import DataError
from megatron.data.tokenizer import build_tokenizer

MAKERS = [corpus.gpt2, corpus.sentencepiece, corpus.hugging_face, corpus.tiktoken, corpus.byte_level]


@pytest.mark.parametrize("make", MAKERS)
def test_every_text_comes_back(make, tmp_path):
    tokenizer = build_tokenizer(make(tmp_path))
    for text in [*corpus.NASTY, *corpus.MARKERS, *corpus.english(20), *corpus.random_texts(200, seed=1)]:
        if make is corpus.sentencepiece:
            text = text.replace("\u2581", "")  # its way to write a space
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("make", MAKERS)
def test_batches_equal_single_texts_and_ids_are_in_range(make, tmp_path):
    tokenizer = build_tokenizer(make(tmp_path))
    texts = [*corpus.NASTY, *corpus.MARKERS, *corpus.random_texts(50, seed=2)]
    batch = tokenizer.encode_batch(texts)
    assert batch == [tokenizer.encode(text) for text in texts]
    assert [ids.tolist() for ids in tokenizer.encode_arrays(texts)] == batch
    assert all(0 <= id < tokenizer.vocab_size for ids in batch for id in ids)
    assert 0 <= tokenizer.eod < tokenizer.vocab_size


@pytest.mark.parametrize("make", MAKERS)
def test_markers_in_the_text_stay_text(make, tmp_path):
    tokenizer = build_tokenizer(make(tmp_path))
    for text in corpus.MARKERS:
        assert tokenizer.eod not in tokenizer.encode(text)


def test_bpe_of_sentencepiece_round_trips_too(tmp_path):
    tokenizer = build_tokenizer(corpus.sentencepiece(tmp_path, "bpe"))
    for text in [*corpus.NASTY, *corpus.english(20)]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def assert_equal_to_transformers(data: DataConfig, texts: list[str]) -> None:
    from transformers import GPT2TokenizerFast

    theirs = GPT2TokenizerFast(vocab=data.vocab_file, merges=data.merge_file)
    ours = build_tokenizer(data)
    assert ours.vocab_size == len(theirs)
    assert ours.eod == theirs.eos_token_id
    for text, ids in zip(texts, ours.encode_batch(texts), strict=True):
        assert ids == theirs(text)["input_ids"], repr(text)
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)


def test_gpt2_equals_transformers(tmp_path):
    texts = [*corpus.NASTY, *corpus.english(20), *corpus.random_texts(200, seed=3)]
    assert_equal_to_transformers(corpus.gpt2(tmp_path), texts)


def test_real_gpt2_equals_transformers():
    folder = corpus.shared_data()
    if folder is None:
        pytest.skip("the real vocabulary is not on this machine")
    files = folder / "tokenizer"
    data = DataConfig(vocab_file=str(files / "gpt2-vocab.json"), merge_file=str(files / "gpt2-merges.txt"))
    tokenizer = build_tokenizer(data)
    assert (tokenizer.vocab_size, tokenizer.eod) == (50257, 50256)
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert_equal_to_transformers(data, [*corpus.NASTY, *corpus.english(20), *corpus.random_texts(200, seed=4)])


def test_both_libraries_make_the_same_gpt2_tokens(tmp_path):
    """tiktoken is only faster; a run of white space that it cannot get through goes to the other one."""
    pytest.importorskip("tiktoken")
    texts = [
        *corpus.NASTY,
        *corpus.MARKERS,
        *corpus.random_texts(300, seed=6),
        "a" + " \n" * 600_000 + "b",
        "x" * 10**6,
    ]
    made = [corpus.gpt2(tmp_path)]
    if folder := corpus.shared_data():
        names = [str(folder / "tokenizer" / name) for name in ("gpt2-vocab.json", "gpt2-merges.txt")]
        made.append(DataConfig(vocab_file=names[0], merge_file=names[1]))
    for data in made:
        tokenizer = build_tokenizer(data)
        assert tokenizer._fast is not None
        for text, ids in zip(texts, tokenizer.encode_arrays(texts), strict=True):
            assert ids.tolist() == tokenizer.encode(text)


def test_tiktoken_is_left_alone_where_it_would_make_other_tokens(tmp_path):
    pytest.importorskip("tiktoken")
    data = corpus.gpt2(tmp_path)
    vocab, merges = (
        json.loads((tmp_path / "vocab.json").read_text()),
        (tmp_path / "merges.txt").read_text().splitlines(),
    )
    (tmp_path / "merges.txt").write_text("\n".join([merges[0], merges[2], merges[1], *merges[3:]]) + "\n")
    swapped = build_tokenizer(data)
    assert swapped._fast is None
    assert [ids.tolist() for ids in swapped.encode_arrays(["ab cd"])] == swapped.encode_batch(["ab cd"])
    (tmp_path / "merges.txt").write_text("\n".join(merges) + "\n")
    (tmp_path / "vocab.json").write_text(json.dumps(vocab | {"added": len(vocab)}))
    assert build_tokenizer(data)._fast is None


def test_tiktoken_files(tmp_path):
    data = corpus.tiktoken(tmp_path)
    tokenizer, gpt2 = build_tokenizer(data), build_tokenizer(corpus.gpt2(tmp_path))
    assert tokenizer.eod == 50256
    assert tokenizer.encode("Hello\n world") == gpt2.encode("Hello\n world")
    with pytest.raises(DataError, match="run of more than 200000 white spaces"):
        tokenizer.encode(" " * 300_000)
    path = tmp_path / "other.tiktoken"
    path.write_bytes((tmp_path / "r50k_base.tiktoken").read_bytes())
    with pytest.raises(DataError, match=r"no encoding 'other'.*cl100k_base\.tiktoken"):
        build_tokenizer(DataConfig(tokenizer_type="TiktokenTokenizer", tokenizer_model=str(path)))
    (tmp_path / "cl100k_base.tiktoken").write_text("nothing of the kind\n")
    with pytest.raises(DataError, match=r"is no \.tiktoken file of ranks"):
        build_tokenizer(
            DataConfig(tokenizer_type="TiktokenTokenizer", tokenizer_model=str(tmp_path / "cl100k_base.tiktoken"))
        )


@pytest.mark.parametrize("eod", ["<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>"])
def test_hugging_face_end_of_document(eod, tmp_path):
    tokenizer = build_tokenizer(corpus.hugging_face(tmp_path, eod))
    assert tokenizer.decode([tokenizer.eod]) == eod


def test_hugging_face_adds_cuts_and_pads_nothing(tmp_path):
    ours = build_tokenizer(corpus.hugging_face(tmp_path))  # asks for a leading token, truncation and padding
    plain = build_tokenizer(corpus.gpt2(tmp_path))
    for text in corpus.NASTY:
        assert ours.encode(text) == plain.encode(text)


def test_fingerprint_tells_tokenizers_apart(tmp_path):
    data = corpus.gpt2(tmp_path)
    first = build_tokenizer(data).fingerprint
    assert build_tokenizer(data).fingerprint == first
    assert build_tokenizer(corpus.hugging_face(tmp_path)).fingerprint != first
    merges = (tmp_path / "merges.txt").read_text().splitlines()
    (tmp_path / "merges.txt").write_text("\n".join([merges[0], merges[2], merges[1], *merges[3:]]) + "\n")
    assert build_tokenizer(data).fingerprint != first


@pytest.mark.parametrize("make", MAKERS)
def test_an_id_outside_of_the_vocabulary_is_an_error(make, tmp_path):
    tokenizer = build_tokenizer(make(tmp_path))
    for wrong in (-1, tokenizer.vocab_size):
        with pytest.raises(DataError, match=f"token id {wrong} is outside"):
            tokenizer.decode([0, wrong])


def test_errors_name_the_flag_and_the_file(tmp_path):
    def check(data: DataConfig, *words: str) -> None:
        with pytest.raises(DataError) as error:
            build_tokenizer(data)
        assert all(word in str(error.value) for word in words), error.value

    good = corpus.gpt2(tmp_path)
    check(DataConfig(), "GPT2BPETokenizer", "--vocab-file")
    check(DataConfig(vocab_file=good.vocab_file, merge_file="/no/file"), "--merge-file /no/file", "no such file")
    check(DataConfig(tokenizer_type="HFTokenizer"), "--tokenizer-model")
    check(DataConfig(tokenizer_type="Other"), "Other", "SentencePieceTokenizer")
    broken = tmp_path / "broken"
    broken.write_text("{")
    for kind in ("HFTokenizer", "SentencePieceTokenizer"):
        check(DataConfig(tokenizer_type=kind, tokenizer_model=str(broken)), "--tokenizer-model", str(broken))
    check(DataConfig(vocab_file=str(broken), merge_file=good.merge_file), "--vocab-file", str(broken))


@pytest.mark.parametrize(("missing", "word"), [("<|endoftext|>", "end-of-document"), ("Ġ", "byte tokens")])
def test_a_vocabulary_that_lacks_something_is_refused(missing, word, tmp_path):
    data = corpus.gpt2(tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    vocab["replaced"] = vocab.pop(missing)
    merges = [line for line in (tmp_path / "merges.txt").read_text().splitlines() if "Ġ" not in line]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("\n".join(merges) + "\n")
    with pytest.raises(DataError, match=word):
        build_tokenizer(data)


def test_sentencepiece_without_end_of_sentence(tmp_path):
    import io

    import sentencepiece

    def model(**changes: object) -> DataConfig:
        writer = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus.english(100)), model_writer=writer, vocab_size=100, eos_id=-1, minloglevel=3,
            hard_vocab_limit=False, **changes,
        )  # fmt: skip
        (tmp_path / "m.model").write_bytes(writer.getvalue())
        return DataConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(tmp_path / "m.model"))

    with pytest.raises(DataError, match="no end-of-document token"):
        build_tokenizer(model())
    tokenizer = build_tokenizer(model(control_symbols="<|endoftext|>"))
    assert tokenizer._backend.id_to_piece(tokenizer.eod) == "<|endoftext|>"
