"""The corpus is prose, each paragraph once, the same every time, and never too small."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("quickstart_corpus", ROOT / "examples_moe" / "quickstart_corpus.py")
quickstart_corpus = importlib.util.module_from_spec(spec)
sys.modules["quickstart_corpus"] = quickstart_corpus  # its workers find their function by this name
spec.loader.exec_module(quickstart_corpus)

MODULE = '''
"""A module that reads the measurements of a station and turns them into a table of hourly means.

See :func:`~station.read` for the format  that is expected, and ``write`` or `.Table` for the one that is made of it.

>>> read("the example of a doctest that is not prose, and so is left out of the text")
"""
TEXT = """This string is assigned to a name, so it is not a docstring and is not to be collected at all."""

class Station:
    """The place where the measurements of this table were taken, with its name and its height."""

    def read(self, path, hours):
        """Read the file of one station and return the measurements in the order of the file.

        Parameters
        ----------
        path : str
            The file that the station wrote, as it came over the network in the night.
        :param hours: the number of hours of which the mean is to be taken by the function.
        """
        if path:
            def inner():
                """A function that is defined in a branch has a docstring that counts as well as others do."""
'''
PROVERB = (
    "the reader of this text is to be found in a part of the world that is not as far from the sea as it was in "
    "the days of the old maps"
)


def sentence(number: int) -> str:
    """A sentence that no other number gives."""
    words = PROVERB.split()
    turned = words[number % len(words) :] + words[: number % len(words)]
    spelled = "".join("abcdefghij"[int(digit)] for digit in str(number))
    return f"It is said that {spelled} {' '.join(turned)} and that this is the end of it."


def test_docstrings_in_the_order_of_the_source():
    found = quickstart_corpus.docstrings(MODULE)
    starts = ["A module that reads", "The place where", "Read the file of one", "A function that is defined"]
    places = [found.index(start) for start in starts]
    assert places == sorted(places)
    assert "This string is assigned" not in found


def test_paragraphs_are_prose_without_markup():
    assert list(quickstart_corpus.paragraphs(quickstart_corpus.docstrings(MODULE))) == [
        "A module that reads the measurements of a station and turns them into a table of hourly means.",
        "See station.read for the format that is expected, and write or Table for the one that is made of it.",
        "The place where the measurements of this table were taken, with its name and its height.",
        "Read the file of one station and return the measurements in the order of the file.",
        "The file that the station wrote, as it came over the network in the night. "
        "the number of hours of which the mean is to be taken by the function.",
        "A function that is defined in a branch has a docstring that counts as well as others do.",
    ]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("The value of this option is read from the file that is named in the first line of it.", True),
        ("Too short to be of use.", False),
        ("if (x == 3) { return the_value[i] + of_the(list) } else { for the and in that_one = 5 }", False),
        ("numpy scipy pandas torch jax flax haiku optax chex dm-haiku equinox diffrax lineax", False),
        ("| 12.3 | 45.6 | the | 78.9 | of | 10.1 | and | 12.3 | in | 55.6 | to | 99.9 | that |", False),
    ],
)
def test_is_prose(text, kept):
    assert quickstart_corpus.is_prose(text) is kept


@pytest.fixture
def installation(tmp_path) -> Path:
    """A small package tree: modules, a document, and what is to be passed over."""
    root = tmp_path / "site"
    for number in range(40):
        folder = root / f"package{number % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        paragraphs = "\n\n".join(sentence(10 * number + part) for part in range(3))
        licence = "This is the licence that is in every file of it, and by which you may use it as you like to."
        (folder / f"module{number}.py").write_text(f'"""{paragraphs}\n\n{licence}\n"""\n')
    (root / "package0" / "guide.rst").write_text("\n\n".join(sentence(1000 + part) for part in range(3)))
    (root / "package0" / "LICENSE.txt").write_text(sentence(2000) * 3)
    (root / "package0" / "tests").mkdir()
    (root / "package0" / "tests" / "test_it.py").write_text(f'"""{sentence(3000)}\n\n{sentence(3001)}"""')
    (root / "package0" / "broken.py").write_text("def (:")
    (root / "package0" / "latin.py").write_bytes(b'"""\xe9\xe8"""')
    return root


def collected(root: Path, most: int = 10**9) -> list[dict]:
    return list(quickstart_corpus.collect([root], most))


def test_each_paragraph_once_and_the_same_every_time(installation):
    documents = collected(installation)
    assert len(documents) == 41
    paragraphs = [paragraph for document in documents for paragraph in document["text"].split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs)) == 41 * 3 + 1  # one of them is the licence
    sources = [document["source"] for document in documents]
    assert "package0/guide.rst" in sources
    assert not [source for source in sources if "LICENSE" in source or "tests" in source]
    assert sources != sorted(sources), "packages are mixed, so that the end is a fair validation set"
    assert collected(installation) == documents


def test_stops_at_the_size_asked_for(installation):
    documents = collected(installation, most=3000)
    sizes = [len(document["text"].encode()) for document in documents]
    assert sum(sizes) >= 3000 > sum(sizes[:-1])


def test_command_line_writes_json_lines(installation, tmp_path, capsys):
    output = tmp_path / "corpus.jsonl"
    arguments = ["--root", str(installation), "--output", str(output), "--least-megabytes", "0.01"]
    assert quickstart_corpus.main(arguments) == 0
    assert [json.loads(line) for line in output.read_text().splitlines()] == collected(installation)
    assert "41 documents" in capsys.readouterr().out


def test_too_little_text_is_an_error_that_says_what_to_do(installation, tmp_path, capsys):
    output = tmp_path / "corpus.jsonl"
    assert quickstart_corpus.main(["--root", str(installation), "--output", str(output)]) == 1
    assert "5 MB are needed" in capsys.readouterr().err
    assert list(tmp_path.glob("corpus*")) == []
