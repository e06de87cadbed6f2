"""What a run needs, computed before it is launched: parameters, FLOPs, memory, time and communication."""
