"""The help of other tests, where it matters that it helps."""

import re
import subprocess

import pytest
from distributed.started import output_until_the_end


def test_what_does_not_end_is_killed_and_tells_how_its_processes_were():
    command = ["bash", "-c", "echo begun; sleep 100 & echo $!; kill -STOP $!; wait"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with pytest.raises(AssertionError) as told:
        output_until_the_end(process, 0.5)
    said = str(told.value)
    child = int(re.search(r"begun\n(\d+)\n", said)[1])
    assert re.search(rf"process {process.pid}: bash -c .*\nState:\tS", said), said
    assert re.search(rf"process {child}: .*\nState:\tT", said), said
    assert f"  thread {child} " in said
    assert process.returncode == -9
