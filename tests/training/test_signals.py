import os
import time

import pytest

from megatron.training.signals import process_age


def test_the_age_of_a_process_counts_from_its_start():
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        time.sleep(0.3)
        os.write(writer, str(process_age()).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert float(os.read(reader, 100)) == pytest.approx(0.3, abs=0.25)
    assert process_age() > 0.3
