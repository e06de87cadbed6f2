"""Which environment the scripts choose, with a pip that records instead of installing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = 'set -euo pipefail; source tools/setup_env.sh; setup_env "$@"; echo "PYTHON=$PYTHON"; echo "PATH=$PATH"'


@pytest.fixture
def checkout(tmp_path) -> Path:
    """What the set-up reads, in a folder of its own."""
    folder = tmp_path / "checkout"
    (folder / "tools").mkdir(parents=True)
    (folder / "megatron" / "package").mkdir(parents=True)
    (folder / "megatron" / "package" / "__init__.py").touch()
    for name in ("setup_env.sh", "check_requirements.py"):
        shutil.copy(ROOT / "tools" / name, folder / "tools" / name)
    (folder / "constraints.txt").write_text("torch==9.9\n")
    (folder / "setup.py").write_text('REQUIREMENTS = []\nEXTRAS = {"plot": ["not-there-at-all"], "none": []}\n')
    return folder


def run(checkout: Path, extras: str, **environment: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    return subprocess.run(
        ["bash", "-c", SCRIPT, "bash", extras],
        cwd=checkout,
        env=kept | {"TMPDIR": str(checkout)} | environment,
        capture_output=True,
        text=True,
    )


def fake_python(folder: Path, pip: str) -> Path:
    """An environment whose Python is this one, but for ``-m pip``, which runs a line of shell."""
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nif [ "$1 $2" = "-m pip" ]; then {pip}; exit; fi\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python


def test_an_active_environment_with_everything_is_used_as_it_is(checkout):
    python = fake_python(checkout / "mine", "echo pip was called >&2; exit 1")
    done = run(checkout, "none", VIRTUAL_ENV=str(checkout / "mine"))
    assert done.returncode == 0, done.stderr
    assert f"PYTHON={python}" in done.stdout
    assert f"PATH={python.parent}:" in done.stdout
    assert not (checkout / ".venv").exists()


def test_an_active_environment_keeps_its_torch(checkout):
    import torch

    record = checkout / "record"
    fake_python(
        checkout / "mine", f'echo "$@" >>{record}; for w; do case $w in *constraints*) cat $w >>{record};; esac; done'
    )
    done = run(checkout, "plot", VIRTUAL_ENV=str(checkout / "mine"))
    assert done.returncode == 0, done.stderr
    text = record.read_text()
    assert f"-e {checkout}[plot]" in text
    assert f"torch=={torch.__version__}" in text
    assert "torch==9.9" not in text


def test_a_failing_installation_says_so_and_shows_the_end_of_pip(checkout):
    fake_python(checkout / "mine", '[ "$3" = --version ] || { echo no network today; exit 1; }')
    done = run(checkout, "plot", VIRTUAL_ENV=str(checkout / "mine"))
    assert done.returncode == 1
    assert "no network today" in done.stderr
    assert "error: pip could not install the package" in done.stderr
    assert "Without a network?" in done.stderr


def test_without_an_active_environment_and_with_everything_there_python3_is_used(checkout):
    fake = fake_python(checkout / "system", "exit 1")
    fake.rename(fake.with_name("python3"))
    done = run(checkout, "none", PATH=f"{fake.parent}:/usr/bin:/bin")
    assert done.returncode == 0, done.stderr
    assert f"PYTHON={fake.with_name('python3')}" in done.stdout
    assert not (checkout / ".venv").exists()


def test_a_new_environment_is_made_once(checkout):
    record = checkout / "record"
    fake = fake_python(checkout / "system", "exit 1")
    fake.rename(fake.with_name("python3"))
    # `python3 -m venv --clear FOLDER` leaves another fake behind, whose pip "installs" what was missing.
    installed = f'echo "$@" >>{record}; : >{checkout}/installed'
    fake_python(checkout / "template", installed)
    script = fake.with_name("python3")
    script.write_text(
        "#!/bin/sh\n"
        f'if [ "$1 $2" = "-m venv" ]; then mkdir -p "$4" && cp -r {checkout}/template/bin "$4/"; exit; fi\n'
        f'exec {sys.executable} "$@"\n'
    )
    # The requirement counts as met once pip has run.
    check = checkout / "tools" / "check_requirements.py"
    check.write_text(f"import os, sys\nsys.exit(not os.path.exists({str(checkout / 'installed')!r}))\n")
    first = run(checkout, "plot", PATH=f"{script.parent}:/usr/bin:/bin")
    assert first.returncode == 0, first.stderr
    assert f"PYTHON={checkout}/.venv/bin/python" in first.stdout
    assert f"-c {checkout}/constraints.txt -e {checkout}[plot]" in record.read_text()

    calls = len(record.read_text().splitlines())
    second = run(checkout, "plot", PATH=f"{script.parent}:/usr/bin:/bin")
    assert second.returncode == 0, second.stderr
    assert len(record.read_text().splitlines()) == calls, "nothing changed, nothing is installed"

    (checkout / "constraints.txt").write_text("torch==9.10\n")
    third = run(checkout, "plot", PATH=f"{script.parent}:/usr/bin:/bin")
    assert third.returncode == 0, third.stderr
    assert len(record.read_text().splitlines()) > calls, "other versions are wanted"


def test_an_old_python_is_an_error_that_says_what_to_do(checkout):
    folder = checkout / "old" / "bin"
    folder.mkdir(parents=True)
    (folder / "python").write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.1 && exit\nexit 1\n')
    (folder / "python").chmod(0o755)
    done = run(checkout, "none", VIRTUAL_ENV=str(folder.parent))
    assert done.returncode == 1
    assert "Python 3.10 or newer is needed" in done.stderr
    assert "Python 3.8.1" in done.stderr
