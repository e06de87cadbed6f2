"""Mixture of Experts: router -> dispatch -> experts -> combine. Plain torch, the reference for faster kernels."""
