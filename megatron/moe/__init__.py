"""Mixture of experts: router -> dispatcher -> experts, in plain torch or in kernels."""

from megatron.moe.layer import MoELayer, MoEStats
from megatron.moe.plan import RoutingPlan

__all__ = ["MoELayer", "MoEStats", "RoutingPlan"]
