import pytest
import torch

from megatron.config import ModelConfig, MoEConfig
from megatron.inference.generate import generate, stream
from megatron.inference.sampling import Sampling
from megatron.model.gpt import GPTModel

SHAPE = ModelConfig(num_layers=4, hidden_size=32, num_attention_heads=4, seq_length=48, init_method_std=0.3)
KINDS = pytest.mark.parametrize("moe", [MoEConfig(), MoEConfig(num_experts=(4,))], ids=["dense", "moe"])
REAL, PADDED = 50, 128
PROMPTS = [[3, 14, 15, 9, 2, 6], [7], [31, 41, 5, 9, 26, 5, 35, 8, 9, 7, 9], [3, 14]]
GREEDY = Sampling(temperature=0.0)


def built(moe: MoEConfig | None = None) -> GPTModel:
    model = GPTModel(SHAPE, moe or MoEConfig(), PADDED, seed=1)
    with torch.no_grad():  # or else, tables being tied, each token would predict itself
        model.final_layernorm.weight.normal_(generator=torch.Generator().manual_seed(0))
    return model


@torch.no_grad()
def greedy_without_cache(model: GPTModel, prompt: list[int], count: int) -> list[int]:
    model.eval()
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1, :REAL].argmax()))
    return tokens[len(prompt) :]


@KINDS
def test_greedy_takes_the_likeliest_token_each_time(moe):
    model = built(moe)
    expected = [greedy_without_cache(model, prompt, 12) for prompt in PROMPTS]
    assert generate(model, PROMPTS, 12, GREEDY, vocab_size=REAL) == expected
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)


@KINDS
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), Sampling(temperature=0.7, top_k=20, top_p=0.9)], ids=str)
def test_a_batch_equals_its_prompts_one_at_a_time(moe, sampling):
    model, seeds = built(moe), [5, 6, 7, 8]
    together = generate(model, PROMPTS, 20, sampling, seeds=seeds, vocab_size=REAL)
    alone = [
        generate(model, [prompt], 20, sampling, seeds=[seed], vocab_size=REAL)[0]
        for prompt, seed in zip(PROMPTS, seeds, strict=True)
    ]
    assert together == alone


def test_seeds_decide():
    model, prompts = built(), [[3, 14]] * 3
    first = generate(model, prompts, 16, seeds=[1, 2, 1])
    assert first[0] == first[2] != first[1]
    torch.manual_seed(9)
    assert generate(model, prompts, 16, seeds=[1, 2, 1]) == first
    assert [tokens[:5] for tokens in first] == generate(model, prompts, 5, seeds=[1, 2, 1])


def test_padding_of_the_vocabulary_is_never_chosen():
    model = built()
    with torch.no_grad():
        model.embedding.word_embeddings.weight[REAL:] *= 20
    drawn = generate(model, PROMPTS, 30, Sampling(temperature=5.0))
    assert max(max(tokens) for tokens in drawn) >= REAL  # without the limit they would be
    drawn = generate(model, PROMPTS, 30, Sampling(temperature=5.0), vocab_size=REAL)
    assert max(max(tokens) for tokens in drawn) < REAL


def test_the_end_of_document_ends_a_sequence_alone():
    model = built()
    whole = generate(model, PROMPTS, 16, GREEDY, vocab_size=REAL)
    eod = next(token for token in whole[2][2:] if token not in whole[0])
    expected = [tokens[: tokens.index(eod)] if eod in tokens else tokens for tokens in whole]
    assert generate(model, PROMPTS, 16, GREEDY, vocab_size=REAL, eod=eod) == expected
    assert len(expected[2]) < len(expected[0]) == 16


def test_nothing_comes_after_the_last_end():
    model = built()
    eod = greedy_without_cache(model, PROMPTS[0], 1)[0]
    assert list(stream(model, PROMPTS[:1], 16, GREEDY, vocab_size=REAL, eod=eod)) == []


def test_tokens_come_one_by_one_and_the_mode_comes_back():
    model = built().train()
    steps = stream(model, PROMPTS, 8, GREEDY, vocab_size=REAL)
    first = next(steps)
    assert first == [tokens[0] for tokens in generate(built(), PROMPTS, 1, GREEDY, vocab_size=REAL)]
    assert not model.training
    steps.close()
    assert model.training


def test_the_whole_position_table_can_be_used():
    model = built()
    assert len(generate(model, [[1, 2]], 46, GREEDY)[0]) == 46
    with pytest.raises(ValueError, match="49 tokens do not fit the position table of 48 rows"):
        generate(model, [[1, 2]], 47, GREEDY)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "at least one"),
        ({"prompts": [[1], []]}, "at least one"),
        ({"prompts": [[1, 50]], "vocab_size": 50}, "token 50 in a prompt is outside the vocabulary of 50"),
        ({"prompts": [[-1]]}, "token -1"),
        ({"prompts": [[1]], "max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"prompts": [[1]], "seeds": [1, 2]}, "2 seeds for 1 prompts"),
        ({"prompts": [[1]], "vocab_size": 129}, "vocab_size is 129, .* 128 rows"),
    ],
    ids=str,
)
def test_unusable_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(built(), **{"max_new_tokens": 4, **arguments})


def test_a_diverged_model_is_reported():
    model = built()
    with torch.no_grad():
        model.final_layernorm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        generate(model, [[1]], 4)
