"""What a models config is worth on a machine, and which part of it: measure, simulate, rank.

A *profile* is what was measured: step times of each model alone, the tokens that each model draws
along the target's own text, what processes add. A `System` is what a simulation needs, made from a
profile or from emulated models. `search` ranks the ways to run it.
"""
