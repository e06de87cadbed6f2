#!/usr/bin/env python3
"""Pretrain a GPT, dense or with Mixture of Experts. ``python pretrain_gpt_moe.py --help`` lists the flags."""

import sys

from megatron.training.signals import StopSignals

if __name__ == "__main__":
    with StopSignals() as signals:  # before all other imports: a signal may come at any time
        try:
            from megatron.config.flags import parse_args

            config = parse_args()  # before the heavy imports: --help and a wrong flag answer at once
            from megatron.training.pretrain import pretrain

            sys.exit(pretrain(config, signals))
        except KeyboardInterrupt:
            sys.exit("error: interrupted, without a save; SIGTERM and SIGUSR1 have a run save before it ends")
