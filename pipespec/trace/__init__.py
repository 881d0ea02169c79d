"""What happened when, in every stage of a run, on one clock: recorded, written, checked, summed up.

Events are taken where the protocol is driven (`TracedState`, `TracedTransport`), so that a loop
without a tracer runs the very code that it ran before. All processes of a host share the clock
(`time.perf_counter` is CLOCK_MONOTONIC); several hosts do not, and are not dealt with here.

The file is in the trace event format of Chrome, which https://ui.perfetto.dev and chrome://tracing
draw. Source: "Trace Event Format", D. Sinclair, N. Duca and others.
"""

from pipespec.trace.events import OnTrace, StageTrace, StrategyTrace, Tracer
from pipespec.trace.state import TracedState
from pipespec.trace.transport import TracedTransport

__all__ = [
    "OnTrace",
    "StageTrace",
    "StrategyTrace",
    "TracedState",
    "TracedTransport",
    "Tracer",
]
