"""The only package that imports DeepSpeed: ZeRO-1, precision, optimizer, learning-rate schedule."""
