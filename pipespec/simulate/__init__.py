"""The protocol under a virtual clock: test bed, planner's engine, definition of ideal throughput.

The same `StageState` and policies that the processes run, driven by a discrete-event scheduler with
seeded randomness. A failure replays from its seed. Nothing here sleeps, opens or spawns anything.
"""

from pipespec.simulate.checks import InvariantViolation
from pipespec.simulate.engine import Simulation
from pipespec.simulate.scenario import Scenario, simulate_seed
from pipespec.simulate.setup import Faults, Report, SimStage

__all__ = [
    "Faults",
    "InvariantViolation",
    "Report",
    "Scenario",
    "SimStage",
    "Simulation",
    "simulate_seed",
]
