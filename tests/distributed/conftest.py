"""What several tests of whole runs share."""

from pathlib import Path

import pytest
import tiny_run
from distributed import trainers


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A tokenizer and a dataset for :func:`tiny_run.flags`."""
    folder = tmp_path_factory.mktemp("corpus")
    tiny_run.make_tokenizer(folder)
    tiny_run.make_dataset(folder)
    return folder


@pytest.fixture(scope="session")
def server():
    """Starts trainers in a moment, from a process that has imported all that they need."""
    with trainers.server() as running:
        yield running
