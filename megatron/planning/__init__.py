"""What a run needs, computed before it is launched: parameters and FLOPs."""

from megatron.planning.flops import model_flops_per_token, peak_tflops
from megatron.planning.parameters import ParameterCount, count_parameters

__all__ = ["ParameterCount", "count_parameters", "model_flops_per_token", "peak_tflops"]
