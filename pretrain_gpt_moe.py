#!/usr/bin/env python3
"""Pretrain a GPT, dense or with Mixture of Experts. ``python pretrain_gpt_moe.py --help`` lists the flags."""

import sys

from megatron.config.flags import parse_args

if __name__ == "__main__":
    config = parse_args()  # before the heavy imports: --help and a wrong flag answer at once
    from megatron.training.pretrain import pretrain

    sys.exit(pretrain(config))
