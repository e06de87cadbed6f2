"""Mixture of experts: router -> dispatch -> experts -> combine, in plain torch or in kernels."""

from megatron.moe.layer import MoELayer, MoEStats
from megatron.moe.plan import RoutingPlan

__all__ = ["MoELayer", "MoEStats", "RoutingPlan"]
