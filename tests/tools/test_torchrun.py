"""tools/torchrun.py: the last line of a run that fails is ours."""

import signal
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[2] / "tools" / "torchrun.py"


def start(folder: Path, body: str) -> subprocess.Popen:
    """Two processes that run ``body``, a line of Python that knows its ``rank``."""
    script = folder / "script.py"
    script.write_text(f"import os, sys, time; rank = int(os.environ['RANK']); {body}\n")
    command = [sys.executable, str(TOOL), "--standalone", "--nproc-per-node", "2", str(script)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_last_line_says_how_the_ranks_ended(tmp_path):
    process = start(tmp_path, "os.kill(os.getpid(), 9) if rank else sys.exit('error: no data')")
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert "Traceback" not in said
    assert "error: no data\n" in said
    last = said.splitlines()[-1]
    assert last.startswith("error: the run failed: rank ")
    assert "ended with status 1" in last or "was killed by SIGKILL" in last
    assert last.endswith("; the reason stands above, in a line that begins with 'error'")


def test_a_signal_is_no_traceback_either(tmp_path):
    process = start(tmp_path, "print('begun', flush=True); time.sleep(60)")
    for _ in range(2):  # both, for torchrun may hang if a signal comes while it starts a process
        assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in said
    assert said.splitlines()[-1] == "ended by SIGTERM"


def test_its_status_and_words_are_otherwise_torchruns(tmp_path):
    process = start(tmp_path, "print('well', rank)")
    said = process.communicate(timeout=60)[0]
    assert sorted(said.split()) == ["0", "1", "well", "well"]
    assert process.returncode == 0
