"""Mixture of experts: router -> dispatcher -> experts, in plain torch or in kernels."""
