"""One rank of a job of one or two processes that saves megatron.core's models. argv: a folder with tokens.pt."""

import sys
from pathlib import Path

if __name__ == "__main__":  # megatron.core starts processes that read this file again
    import core_model

    core_model.main(Path(sys.argv[1]))
