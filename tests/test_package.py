"""megatron.* imports beside megatron-core's megatron.core: from the checkout, installed, and installed editable."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
REQUIREMENT_OF_IMPORT = {"lm_eval": "lm-eval", "tiktoken_ext": "tiktoken", "yaml": "pyyaml"}
BOTH = """
import megatron.config
import megatron.core.parallel_state
from megatron.config import RunConfig
print(megatron.config.__file__)
print(megatron.core.__file__)
"""


def ask(python: Path | str, folder: Path) -> tuple[Path, Path]:
    """Where a Python started in ``folder``, without PYTHONPATH, finds megatron.config and megatron.core."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(python), "-W", "ignore", "-c", BOTH], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    ours, core = done.stdout.splitlines()[-2:]
    return Path(ours), Path(core)


def copy_of_the_package(folder: Path) -> Path:
    """What a build needs, away from the checkout so that the build leaves nothing in it."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "megatron", folder / "megatron", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def fresh_environment(folder: Path) -> Path:
    """A virtual environment's Python that also sees the packages that the tests run with, but not this project."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    # A plain path line: the .pth files of the outer environment, an editable install of this project say, are not run.
    (Path(site) / "outer.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python


def install(python: Path, *what: str) -> None:
    """pip install of a folder without network: no dependencies, no build environment."""
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*command, *what], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_from_the_checkout():
    ours, core = ask(sys.executable, ROOT)
    assert ours == ROOT / "megatron" / "config" / "__init__.py"
    assert ROOT / "megatron" not in core.parents


@pytest.mark.slow
@pytest.mark.parametrize(
    "editable", [False, pytest.param(True, marks=pytest.mark.exhaustive)], ids=["installed", "editable"]
)
def test_installed(tmp_path, editable):
    source = tmp_path / "source"
    source.mkdir()
    copy_of_the_package(source)
    python = fresh_environment(tmp_path / "environment")
    install(python, *(["--editable"] if editable else []), str(source))
    ours, core = ask(python, tmp_path)
    assert ours.is_relative_to(source if editable else tmp_path / "environment")
    assert core.parts[-3:] == ("megatron", "core", "__init__.py")
    assert not core.is_relative_to(tmp_path)


def test_megatron_is_a_namespace_of_packages():
    assert not (ROOT / "megatron" / "__init__.py").exists(), "it would hide megatron.core"
    with_code = {path.parent for path in (ROOT / "megatron").rglob("*.py")}
    lacking = [str(folder) for folder in with_code if not (folder / "__init__.py").exists()]
    assert not lacking, f"folders of code without __init__.py: {lacking}"


def names_in_setup() -> set[str]:
    """Normalised names of every requirement that setup.py states, extras included."""
    text = (ROOT / "setup.py").read_text()
    literals = [ast.literal_eval(node.value) for node in ast.parse(text).body if isinstance(node, ast.Assign)]
    requirements, extras = literals
    everything = requirements + [requirement for extra in extras.values() for requirement in extra]
    return {re.match(r"[\w-]+", requirement).group().lower().replace("_", "-") for requirement in everything}


def test_every_import_is_declared():
    imported = {}
    for folder in ("megatron", "tools", "examples_moe"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    names = [node.module]
                for name in names:
                    if (path.parent / f"{name}.py").exists():  # of the script's own folder
                        continue
                    if folder == "examples_moe" and name.startswith("tools."):  # examples run from the checkout
                        continue
                    top = "megatron-core" if name.startswith("megatron.core") else name.split(".")[0]
                    imported.setdefault(top, path.relative_to(ROOT))
    known = set(sys.stdlib_module_names) | {"megatron", "packaging", "pip"}
    declared = names_in_setup()
    missing = {
        name: str(path)
        for name, path in imported.items()
        if name not in known and REQUIREMENT_OF_IMPORT.get(name, name).lower() not in declared
    }
    assert not missing, f"imported but not in setup.py: {missing}"
    assert {"torch", "megatron-core"} <= imported.keys(), "the search finds nothing any more"


def test_constraints_pin_every_requirement():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {match.group(1).lower().replace("_", "-") for line in lines if (match := re.match(r"([\w-]+)==", line))}
    assert names_in_setup() - pinned == {"wandb"}, "wandb needs an account and a network: it is in no test"
