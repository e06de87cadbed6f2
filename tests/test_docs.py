"""The commands that the documentation shows are ones that the programs accept, and its links lead somewhere."""

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest

from megatron.config.flags import parse_args

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: Path) -> list[list[str]]:
    """The shell commands of a page's code blocks, as words; comments and those with ``...`` are left out."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True)) and "..." not in words]


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_shows_the_two_commands_and_both_models():
    shown = commands(ROOT / "README.md")
    assert ["bash", "examples_moe/quickstart.sh"] in shown
    assert ["bash", "tests/run.sh"] in shown
    assert sum("pretrain_gpt_moe.py" in words for words in shown) >= 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_shown_commands_are_accepted(page):
    for words in commands(page):
        scripts = [word for word in words if word.endswith((".py", ".sh")) and "/" in word]
        assert all((ROOT / script).is_file() for script in scripts), words
        if "pretrain_gpt_moe.py" in words:
            parse_args(words[words.index("pretrain_gpt_moe.py") + 1 :])
        elif "-m" in words and words[words.index("-m") + 1].startswith("benchmarks."):
            at = words.index("-m") + 1
            importlib.import_module(words[at]).parse_args(words[at + 1 :])
        elif words[0] == "python" and hasattr(module := tool(words[1]), "parse_args"):
            module.parse_args(words[2:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_nothing_is_left_to_be_filled_in(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if re.fullmatch(r"[A-Z_]{3,}|.*\b(TODO|TBD|FIXME)\b.*", line.strip())]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        name, _, heading = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.is_file(), f"{page.name} links to {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in [title.lower().replace(" ", "-") for title in titles], f"{page.name} links to {target}"
