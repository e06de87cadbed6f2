import io

import pytest
import sentencepiece
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron.config import DataConfig, ModelConfig, MoEConfig
from megatron.data.tokenizer import build_tokenizer
from megatron.inference.generate import generate
from megatron.inference.sampling import Sampling
from megatron.inference.text import TextStream, stream_text
from megatron.model.gpt import GPTModel

CORPUS = ["the quick brown fox jumps over the lazy dog", "naïve café, 100 €", "日本語のテキスト 🙂 emoji"] * 5


@pytest.fixture(scope="module", params=["byte-level BPE", "SentencePiece"])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "SentencePiece":
        proto = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS), model_writer=proto, vocab_size=340, model_type="bpe", byte_fallback=True,
            character_coverage=0.98, minloglevel=2,
        )  # fmt: skip
        (folder / "sp.model").write_bytes(proto.getvalue())
        return build_tokenizer(
            DataConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(folder / "sp.model"))
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    bpe.train_from_iterator(CORPUS, trainer)
    bpe.save(str(folder / "tokenizer.json"))
    return build_tokenizer(DataConfig(tokenizer_type="HFTokenizer", tokenizer_model=str(folder / "tokenizer.json")))


@pytest.mark.parametrize("text", [" jumps over the lazy dog", " é 🙂 € 語!", "\n\n two  spaces ", "s, the fox"])
def test_pieces_join_to_the_text(tokenizer, text):
    prompt = tokenizer.encode("the quick brown fox")
    whole = tokenizer.encode("the quick brown fox" + text)
    tokens = whole[len(prompt) :] if whole[: len(prompt)] == prompt else tokenizer.encode(text)
    stream = TextStream(tokenizer, prompt)
    pieces = [stream.add(token) for token in tokens]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    expected = tokenizer.decode(prompt + tokens).removeprefix(tokenizer.decode(prompt))
    assert "".join([*pieces, stream.finish()]) == expected


def test_a_part_of_a_character_waits_and_is_shown_at_the_end(tokenizer):
    smile = tokenizer.encode("a🙃")[-4:]  # not in the corpus: four bytes, four tokens
    stream = TextStream(tokenizer, tokenizer.encode("the"))
    assert [stream.add(token) for token in smile] == ["", "", "", "🙃"]
    stream = TextStream(tokenizer, tokenizer.encode("the"))
    assert [stream.add(token) for token in smile[:2]] == ["", ""]
    assert "\N{REPLACEMENT CHARACTER}" in stream.finish()


def test_what_streams_is_what_generate_returns(tokenizer):
    shape = ModelConfig(num_layers=1, hidden_size=32, num_attention_heads=2, seq_length=64)
    model = GPTModel(shape, MoEConfig(), 384)
    with torch.no_grad():  # make the end of document likely, so that some sequences end by it and some do not
        model.final_layernorm.bias.copy_(model.embedding.word_embeddings.weight[tokenizer.eod] * 150)
    prompts = [tokenizer.encode(text) for text in ("the quick", "fox", "naïve", "lazy dog", "jumps", "over")]
    sampling, seeds = Sampling(), [1, 2, 3, 4, 5, 6]
    pieces = list(stream_text(model, tokenizer, prompts, 24, sampling, seeds))
    expected = generate(model, prompts, 24, sampling, seeds=seeds, eod=tokenizer.eod, vocab_size=tokenizer.vocab_size)
    ends = {piece.number: piece.ended for piece in pieces if piece.ended}
    assert len(ends) == len(prompts) == sum(piece.ended is not None for piece in pieces)
    for number, tokens in enumerate(expected):
        mine = [piece for piece in pieces if piece.number == number]
        assert [token for piece in mine for token in piece.tokens] == tokens
        whole = tokenizer.decode(prompts[number] + tokens)
        assert "".join(piece.text for piece in mine) == whole[len(tokenizer.decode(prompts[number])) :]
        assert mine[-1].ended == ends[number] == ("length" if len(tokens) == 24 else "eod")
    assert set(ends.values()) == {"length", "eod"}
