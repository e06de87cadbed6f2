from megatron.config.run import OPTIONS
from megatron.engine.optim import OPTIMIZERS


def test_the_command_line_offers_the_optimizers_that_there_are():
    assert OPTIONS["optimizer_name"].choices == tuple(OPTIMIZERS)
