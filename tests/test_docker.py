"""The Dockerfile names what is there, and a linter has nothing to say of it. Building it takes Docker."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILE = ROOT / "docker" / "Dockerfile"


def instructions() -> list[str]:
    """Instructions without comments, continued lines joined."""
    lines = [line for line in FILE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return [line for line in "\n".join(lines).replace("\\\n", " ").splitlines() if line.strip()]


def test_what_is_copied_and_run_is_there():
    for line in instructions():
        word, *rest = line.split()
        if word == "COPY":
            assert all((ROOT / name).exists() for name in rest[:-1]), line
        for script in re.findall(r"python3 (\S+\.py)", line):
            assert (ROOT / script).is_file(), line
        if word == "RUN":
            assert subprocess.run(["bash", "-n", "-c", line.removeprefix("RUN")]).returncode == 0, line


def test_its_extras_are_declared():
    (extras,) = (line.removeprefix("ARG EXTRAS=") for line in instructions() if line.startswith("ARG EXTRAS="))
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "check_requirements.py", "--extras", extras], capture_output=True, text=True
    )
    assert "setup.py declares" not in done.stderr


def test_hadolint_finds_nothing():
    program = shutil.which("hadolint")
    if program is None:
        pytest.skip("no hadolint")
    done = subprocess.run([program, str(FILE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
