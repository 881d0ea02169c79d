"""Emulated models: step times by query length, and tokens that agree as often as real ones do.

One definition for the processes (`runners.emulated`, which sleeps) and the simulator (which does
not). Knows no clock, no tensors and no other stage.
"""

from pipespec.emulation.model import Emulation, parse_emulation
from pipespec.emulation.oracle import Oracle, Stretches, TokenOracle

__all__ = ["Emulation", "Oracle", "Stretches", "TokenOracle", "parse_emulation"]
