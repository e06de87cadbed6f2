"""What data a run reads when it goes on: its own list, whatever was changed, or another one on purpose."""

import collections
import shutil

import pytest
import tiny_run
from corpus import split_sizes

pytestmark = pytest.mark.distributed
BATCH_TOKENS = 16 * tiny_run.SEQ


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """The tokenizer of ``corpus`` and a larger dataset."""
    folder = tmp_path_factory.mktemp("grown")
    tiny_run.make_tokenizer(folder)
    tiny_run.make_dataset(folder, documents=300)
    return folder


def train(server, folder, save, **changes) -> str:
    """One process, to its end; what it printed."""
    job = server.start(1, tiny_run.flags(folder, save=save, load=save, **changes), faults={0: ["noted_sequences"]})
    assert job.wait() == [0], job.output()
    return job.output()


def sequences_read(output: str) -> list[str]:
    """Digests of the sequences that were trained on, in their order."""
    return [line.split()[1] for line in output.splitlines() if line.startswith("sequence ")]


def test_longer_and_with_other_batches_a_run_reads_each_sequence_once(server, corpus, tmp_path):
    """Just under an epoch, resumed with another batch and more tokens, over the end of the epoch."""
    output = train(server, corpus, tmp_path, train_tokens=12 * BATCH_TOKENS, global_batch_size=20, lr_decay_tokens=9999)
    read = sequences_read(output)
    assert len(read) == 200
    output = train(server, corpus, tmp_path, train_tokens=24 * BATCH_TOKENS, lr_decay_tokens=9999)
    read += sequences_read(output)
    assert len(read) == 392
    epoch = (split_sizes(str(corpus / "text"), "90,10,0")[0][1] - 1) // tiny_run.SEQ
    assert 200 < epoch < 392
    assert max(collections.Counter(read[:epoch]).values()) == 1


def test_a_corpus_that_grew_is_refused_and_read_on_purpose(server, corpus, grown, tmp_path):
    train(server, corpus, tmp_path, train_tokens=16 * BATCH_TOKENS, exit_tokens=4 * BATCH_TOKENS)
    flags = tiny_run.flags(grown, save=tmp_path, load=tmp_path, train_tokens=16 * BATCH_TOKENS)
    job = server.start(1, flags)
    assert job.wait() == [1], job.output()
    assert "the training data are not those of the checkpoint" in job.output()
    assert f"not in the checkpoint: {grown / 'text'}" in job.output()
    output = train(
        server, grown, tmp_path, train_tokens=16 * BATCH_TOKENS, exit_tokens=8 * BATCH_TOKENS, change_blend=True
    )
    assert f"data: {grown / 'text'} begins with its first sequence" in output
    # at the next restart it is what the checkpoint has
    assert "data:" not in train(server, grown, tmp_path, train_tokens=16 * BATCH_TOKENS)


def test_a_corpus_may_move(server, corpus, tmp_path):
    moved = tmp_path / "moved"
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    train(server, corpus, straight, train_tokens=8 * BATCH_TOKENS)
    train(server, corpus, resumed, train_tokens=8 * BATCH_TOKENS, exit_tokens=4 * BATCH_TOKENS)
    shutil.copytree(corpus, moved)
    train(server, moved, resumed, train_tokens=8 * BATCH_TOKENS, seed=1234)
    assert tiny_run.curve(resumed) == tiny_run.curve(straight)
