"""Triton kernels of the dense part of the model. Each file has the plain-torch reference that it must equal."""
