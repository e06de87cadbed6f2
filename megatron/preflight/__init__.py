"""Before hours are spent: is every node of a run whole, as fast as the others, and does it have what the run needs?

    problems = gather_problems(launch, store, problem)    what keeps any rank from starting
    verdict = preflight(config, topology, monitor)        what a run that could start would suffer from

What a rank sees by itself: :mod:`megatron.preflight.facts`; speeds: :mod:`megatron.preflight.speed`; what follows from
all of it: :mod:`megatron.preflight.verdict`.
"""

from megatron.preflight.check import preflight
from megatron.preflight.start import gather_problems
from megatron.preflight.verdict import Verdict

__all__ = ["Verdict", "gather_problems", "preflight"]
