"""The command line of tools/merge_datasets.py."""

from test_docs import tool as load


def tool(name: str):
    return load(f"tools/{name}.py")


def test_merge_and_split(folder, capsys):
    merge_datasets = tool("merge_datasets")
    assert merge_datasets.main(["--input", "?_text_document", "--output-prefix", "all"]) == 0
    assert capsys.readouterr().out.startswith("all: 40 documents")
    assert merge_datasets.main(["--input", "all.bin", "--output-prefix", "cut", "--split", "3,1"]) == 0
    assert [line.split(" documents")[0] for line in capsys.readouterr().out.splitlines()] == [
        "cut_train: 30",
        "cut_valid: 10",
    ]


def test_names_with_glob_characters(folder, capsys):
    merge_datasets = tool("merge_datasets")
    words = ["--input", "a_text_document", "b_text_document", "--output-prefix", "new/[a]*"]
    assert merge_datasets.main(words) == 0
    assert merge_datasets.main(["--input", "new/[a]*", "--output-prefix", "cut", "--split", "1,1"]) == 0
    assert "cut_train: 20" in capsys.readouterr().out


def test_errors(folder, capsys):
    merge_datasets = tool("merge_datasets")
    for words, said in (
        (["--input", "no*", "--output-prefix", "all"], "no dataset fits this pattern"),
        (
            ["--input", "a_text_document", "b_text_document", "--output-prefix", "all", "--split", "1"],
            "one dataset, got 2",
        ),
        (["--input", "a_text_document", "b_text_document", "--output-prefix", "a_text_document"], "--overwrite"),
    ):
        assert merge_datasets.main(words) == 1
        assert said in capsys.readouterr().err
