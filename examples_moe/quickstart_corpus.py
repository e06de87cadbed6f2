"""Collect the English prose that comes with a Python installation into a JSON-lines corpus.

Every Python machine carries megabytes of edited English: the docstrings of the standard library and of the installed
packages, their reStructuredText and Markdown files, and the descriptions in their metadata. This writes one document
a module or file, ``{"text": ..., "source": ...}`` a line, for ``tools/preprocess_data.py``.

What is kept are paragraphs of prose: code, doctests, tables, signatures and separators are left out, and a paragraph
that was seen before (licences, inherited docstrings) is left out everywhere. The documents come in an order that
depends on their names only, and mixed, so that the last few per cent are a fair validation set.
"""

import argparse
import ast
import gc
import hashlib
import json
import multiprocessing
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

DOCUMENT_SUFFIXES = {".rst", ".md", ".txt"}
SKIPPED_FOLDERS = frozenset(
    ["__pycache__", "node_modules", "licenses", "lib2to3", "idlelib", "ensurepip", "test", "tests", "testing"]
)
SKIPPED_NAMES = re.compile(r"licen[cs]e|copying|notice|requirements|record|top_level|sources|cmakelists", re.IGNORECASE)
LARGEST_FILE = 4_000_000

_MARKUP = re.compile(r":[a-z:+-]+:`[~!.]*([^`<]+?)(?:\s*<[^`>]*>)?`|``([^`]+)``|`\.?([^`<]+)(?:\s*<[^`>]*>)?`_{0,2}")
_MARKDOWN_LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
_ASIDE = re.compile(r"^\s*(?:\.\. |>>> |\.\.\. |\||\+[-=]|@|\$ |% )")
_PARAMETER = re.compile(r"^\s*[\w*.]+(?:, [\w*.]+)* : ")
_FIELD = re.compile(r":(?:param|type|returns?|rtype|raises?|arg|keyword|var|ivar|cvar)\b[^:\n]*:")
_UNDERLINE = re.compile(r"^\s*([-=~^*#\"'`+])\1{2,}\s*$")
_WORD = re.compile(r"[A-Za-z][a-z'’-]*")
_CODE = re.compile(r"[{}<>\\=|]|\w\(|_\w|://")
_JOINTS = re.compile(
    r"\b(?:the|an?|of|to|and|is|in|that|for|it|as|be|this|with|by|or|are|from|if|not|on|which)\b", re.IGNORECASE
)


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph of one line reads as English sentences rather than as code, a table or a list of names."""
    words = _WORD.findall(paragraph)
    if len(words) < 8 or len(paragraph) > 5000:
        return False
    if len(_CODE.findall(paragraph)) * 25 >= len(words) or len(_JOINTS.findall(paragraph)) <= 0.2 * len(words):
        return False
    return sum(len(word) for word in words) + paragraph.count(" ") > 0.88 * len(paragraph)


def paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of prose of a docstring or document, markup taken off, each on one line."""
    for block in re.split(r"\n\s*\n", text):
        lines = block.splitlines()
        if any(line.lstrip().startswith((">>> ", "$ ", "```")) for line in lines):
            continue
        kept: list[str] = []
        for line in lines:
            if _UNDERLINE.match(line):
                kept = kept[:-1]  # the line above is a heading
            elif line.strip() and not _ASIDE.match(line) and not _PARAMETER.match(line):
                kept.append(_FIELD.sub("", line).strip())
        line = " ".join(kept)
        line = _MARKDOWN_LINK.sub(r"\1", line)
        line = _MARKUP.sub(lambda match: next(group for group in match.groups() if group is not None), line)
        line = " ".join(line.replace("**", "").lstrip("#*-• ").split())
        if is_prose(line):
            yield line


def docstrings(source: str) -> str:
    """The docstrings of a module and of its classes and functions, in the order of the source."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(source)
    found = []
    nodes: list[ast.AST] = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                found.append((getattr(node, "lineno", 0), text))
        # Statements only: expressions hold no docstrings and are most of the tree.
        nodes += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt | ast.ExceptHandler)]
    return "\n\n".join(text for _, text in sorted(found))


def read_document(path: Path) -> list[str]:
    """The paragraphs of prose of one file; none for a file that is broken, too large or not text."""
    try:
        if path.stat().st_size > LARGEST_FILE:
            return []
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".py":
            text = docstrings(text)
        elif path.name == "METADATA":
            text = text.partition("\n\n")[2]
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    return list(paragraphs(text))


def candidates(roots: Iterable[Path]) -> list[tuple[str, Path]]:
    """(name, path) of every file that may hold prose, in an order that depends on the names only."""
    found: dict[str, Path] = {}
    for root in roots:
        for path in root.rglob("*"):
            inside = path.relative_to(root)
            if SKIPPED_FOLDERS.intersection(inside.parts) or "site-packages" in inside.parts:
                continue
            named = path.suffix in DOCUMENT_SUFFIXES and not SKIPPED_NAMES.search(path.name)
            if (path.suffix == ".py" or named or path.name == "METADATA") and path.is_file():
                found.setdefault(inside.as_posix(), path)
    return sorted(found.items(), key=lambda item: hashlib.sha256(item[0].encode()).digest())


def installed_roots() -> list[Path]:
    """The folders of the running Python's standard library and of its packages."""
    paths = sysconfig.get_paths()
    roots = [paths[key] for key in ("stdlib", "purelib", "platlib")]
    roots += [folder for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages")]
    return [Path(folder) for folder in dict.fromkeys(roots) if Path(folder).is_dir()]


def collect(roots: Iterable[Path], most_bytes: int, processes: int = 2) -> Iterator[dict[str, str]]:
    """Documents ``{"text", "source"}`` until ``most_bytes`` of text; no paragraph twice."""
    files = candidates(roots)
    seen: set[bytes] = set()
    size = 0
    # Syntax trees hold no cycles; without the collector the workers are nearly twice as fast.
    with multiprocessing.get_context("fork").Pool(processes, initializer=gc.disable) as pool:
        for (name, _), found in zip(files, pool.imap(read_document, [path for _, path in files], 32), strict=True):
            fresh = []
            for paragraph in found:
                key = hashlib.sha256(re.sub(r"\W+", " ", paragraph).lower().encode()).digest()[:16]
                if key not in seen:
                    seen.add(key)
                    fresh.append(paragraph)
            text = "\n\n".join(fresh)
            if len(text) < 200:
                continue
            yield {"text": text, "source": name}
            size += len(text.encode())
            if size >= most_bytes:
                return


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="The .jsonl file to write.")
    parser.add_argument("--least-megabytes", type=float, default=5.0, help="Fail when there is less text than this.")
    parser.add_argument("--most-megabytes", type=float, default=12.0, help="Stop when there is this much text.")
    parser.add_argument(
        "--root", type=Path, action="append", metavar="DIR",
        help="Collect from this folder instead of the Python installation; may be given several times.",
    )  # fmt: skip
    arguments = parser.parse_args(argv)

    partial = arguments.output.with_name(arguments.output.name + ".partial")
    documents = size = 0
    with partial.open("w", encoding="utf-8") as file:
        for document in collect(arguments.root or installed_roots(), int(arguments.most_megabytes * 1e6)):
            file.write(json.dumps(document, ensure_ascii=False) + "\n")
            documents += 1
            size += len(document["text"].encode())
    if size < arguments.least_megabytes * 1e6:
        partial.unlink()
        print(
            f"error: found {size / 1e6:.1f} MB of English prose in this Python installation, "
            f"{arguments.least_megabytes:g} MB are needed; bring your own text (quickstart.sh --corpus FILE.jsonl)",
            file=sys.stderr,
        )
        return 1
    partial.replace(arguments.output)
    print(f"{documents} documents, {size / 1e6:.1f} MB of English prose in {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
