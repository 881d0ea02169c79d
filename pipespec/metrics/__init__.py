"""Every number that PipeSpec reports, defined once: what a stage counts, per sample, per run."""

from pipespec.metrics.counts import StageCounts
from pipespec.metrics.origins import Origin, token_origins, verification_origins
from pipespec.metrics.runs import Comparison, Summary, energy_estimate_j, speed_up, summarise
from pipespec.metrics.samples import sample_metrics
from pipespec.metrics.totals import PairTotals, SampleTotals, sample_totals

__all__ = [
    "Comparison",
    "Origin",
    "PairTotals",
    "SampleTotals",
    "StageCounts",
    "Summary",
    "energy_estimate_j",
    "sample_metrics",
    "sample_totals",
    "speed_up",
    "summarise",
    "token_origins",
    "verification_origins",
]
