"""The one table of all keys that a run is logged under.

The names without a slash are those of two earlier studies, Streaminator (multi-completion decoding
with an n-gram draft; 000 and 001) and HPML (assisted decoding of Llama 3; 002), so that their
dashboards show runs of PipeSpec. Ours are below `pipespec/` and have the names of result files.

A key whose value is not known is left out; none is made up. Keys with `waits_for` belong to what
PipeSpec does not do yet: they stand here so that nobody gives them another meaning.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

from pipespec.metrics import Summary, speed_up, summarise

Result = Mapping[str, Any]
Value = float | int | str | None


class When(enum.Enum):
    """When a key is logged."""

    SAMPLE = "each sample; at the end of the run over all of them"
    END = "at the end of the run"
    NEVER = "not yet"


@dataclass(frozen=True, slots=True)
class Facts:
    """What values are computed from: one sample, or all samples of a run.

    num_forwards: of the target since the run began. greedy: the run it is compared with, if there
    is one; empty while samples are logged.
    """

    metadata: Mapping[str, Any]
    results: Sequence[Result]
    summary: Summary
    num_forwards: int | None
    greedy: Sequence[Result] = ()

    @property
    def drafts(self) -> bool:
        """Whether this is speculative decoding, what 002 calls assisted."""
        return bool(self.metadata["strategy"] != "greedy")

    @property
    def baseline(self) -> Summary | None:
        """Greedy, on prompts of this run."""
        if not self.drafts:
            return self.summary
        indexes = {result["sample_index"] for result in self.results}
        same = [result for result in self.greedy if result["sample_index"] in indexes]
        return summarise(same) if same else None


@dataclass(frozen=True, slots=True)
class Key:
    """A key, its unit, the studies that it is from, when it is logged, what it means here, and how
    it is computed; `waits_for` is what it needs that does not exist yet."""

    name: str
    unit: str
    systems: tuple[str, ...]
    when: When
    meaning: str
    value: Callable[[Facts], Value] = lambda _: None
    waits_for: str = ""


def facts_of(
    results: Sequence[Result],
    metadata: Mapping[str, Any],
    greedy: Sequence[Result] = (),
    num_forwards_before: int = 0,
) -> Facts:
    """num_forwards_before: of the target, in samples before these."""
    summary = summarise(results)
    added = summary.num_target_forwards
    num_forwards = None if added is None else num_forwards_before + added
    return Facts(metadata, results, summary, num_forwards, greedy)


def sample_values(facts: Facts) -> dict[str, Value]:
    """What is logged of one sample, or, with all samples, of the run as a whole."""
    return _known({key.name: key.value(facts) for key in KEYS if key.when is When.SAMPLE})


def end_values(facts: Facts) -> dict[str, Value]:
    """What is logged once, at the end of a run."""
    return _known({key.name: key.value(facts) for key in KEYS if key.when is When.END})


def own_values(facts: Facts) -> dict[str, Value]:
    """`pipespec/...`: the fields of `metrics.Summary`. Of several values, one a pair of stages or a
    stage, that of the target has the plain name; those before it end in `/INDEX`."""
    found: dict[str, Value] = {}
    for field in fields(Summary):
        value = getattr(facts.summary, field.name)
        if isinstance(value, tuple):
            for index, item in enumerate(value):
                is_target = index == len(value) - 1
                found[f"pipespec/{field.name}" + ("" if is_target else f"/{index}")] = item
        else:
            found[f"pipespec/{field.name}"] = value
    return _known(found)


def _known(values: Mapping[str, Value]) -> dict[str, Value]:
    return {name: value for name, value in values.items() if value is not None}


def _mean(values: Sequence[float | None]) -> float | None:
    """None if one of them is not known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _gpu_mean(facts: Facts, quantity: str) -> float | None:
    """Over all GPUs and all their readings during the samples. What else is read of devices, such
    as the CPU time of a stage's process, is no GPU."""
    devices = (facts.metadata.get("monitor") or {}).get("devices")
    values: list[float] = []
    for result in facts.results:
        for reading in result["gpustats"]:
            for index, value in enumerate(reading.get(quantity, ())):
                is_gpu = devices is None or devices[index]["kind"] == "gpu"
                if is_gpu and value is not None:
                    values.append(value)
    return _mean(values)


def _target_acceptance(facts: Facts) -> float | None:
    rates = facts.summary.acceptance_rate
    return rates[-1] if facts.drafts and rates else None


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _total_rollbacks(facts: Facts) -> int | None:
    try:
        return sum(int(result["metrics"]["num_rollbacks"][-2]) for result in facts.results)
    except (KeyError, IndexError):  # a file of the original; greedy
        return None


def _baseline(name: str) -> Callable[[Facts], Value]:
    def value(facts: Facts) -> Value:
        baseline = facts.baseline
        return None if baseline is None else getattr(baseline, name)

    return value


def _assisted(name: str) -> Callable[[Facts], Value]:
    return lambda facts: getattr(facts.summary, name) if facts.drafts else None


def _alone(name: str) -> Callable[[Facts], Value]:
    return lambda facts: None if facts.drafts else getattr(facts.summary, name)


def _speed_up(facts: Facts) -> Value:
    return speed_up(facts.results, facts.greedy).speed_up if facts.drafts else None


_STREAM: Final = ("000", "001")
_COMPLETIONS: Final = "several completions of a prompt, decoded as a stream"

KEYS: Final[tuple[Key, ...]] = (
    Key(
        "gpu SM utilization (%)",
        "%",
        _STREAM,
        When.SAMPLE,
        "mean over all GPUs and all readings of `gpustats`; the studies log one reading a step",
        lambda facts: _gpu_mean(facts, "gpu_utilizations"),
    ),
    Key(
        "gpu memory (MB)",
        "MiB",
        _STREAM,
        When.SAMPLE,
        "mean of the memory in use of a GPU; as in the studies, 1 MB is 1024 * 1024 bytes",
        lambda facts: _gpu_mean(facts, "memory_used_mib"),
    ),
    Key(
        "gpu memory usage (%)",
        "%",
        _STREAM,
        When.SAMPLE,
        "mean share of a GPU's memory that is in use",
        lambda facts: _gpu_mean(facts, "gpu_memories"),
    ),
    Key(
        "generation step",
        "forwards",
        _STREAM,
        When.SAMPLE,
        "forwards of the target since the run began, prefills included",
        lambda facts: facts.num_forwards,
    ),
    Key(
        "stream utilization (%)",
        "%",
        _STREAM,
        When.NEVER,
        "unfinished sequences / width of the batch; one request at a time would always give 100",
        waits_for=_COMPLETIONS,
    ),
    Key(
        "acceptance rate (%)",
        "%",
        _STREAM,
        When.SAMPLE,
        "accepted / scored by the target, as `acceptance_rate` of the last pair of stages",
        lambda facts: _percent(_target_acceptance(facts)),
    ),
    Key(
        "level_{i}_acceptance",
        "share",
        _STREAM,
        When.NEVER,
        "accepted / scored while i completions of the same prompt were finished",
        waits_for=_COMPLETIONS,
    ),
    Key(
        "token_accuracy_table",
        "table",
        _STREAM,
        When.END,
        "`token`, `accepted_count`, most frequent first: which tokens of the draft are in the text",
    ),
    Key(
        "profiling_summary_table",
        "table",
        _STREAM,
        When.END,
        "`component`, `calls`, `total_time_s`, `avg_time_s`, `fraction_of_total_time`: where each "
        "stage's time goes",
    ),
    Key(
        "lat_tok_assisted",
        "s/token",
        ("002",),
        When.SAMPLE,
        "time of the sample / its tokens, prefill included; not of greedy",
        _assisted("time_per_token_s"),
    ),
    Key(
        "thr_assisted",
        "tokens/s",
        ("002",),
        When.SAMPLE,
        "the inverse; not of greedy",
        _assisted("tokens_per_s"),
    ),
    Key(
        "accept_rate_sample",
        "share",
        ("002",),
        When.SAMPLE,
        "accepted / scored by the target",
        _target_acceptance,
    ),
    Key(
        "baseline_latency_tok",
        "s/token",
        ("002",),
        When.END,
        "time per token of greedy on the same prompts, in this command or stored beside it",
        _baseline("time_per_token_s"),
    ),
    Key(
        "baseline_thr",
        "tokens/s",
        ("002",),
        When.END,
        "the inverse",
        _baseline("tokens_per_s"),
    ),
    Key(
        "assisted_latency_tok",
        "s/token",
        ("002",),
        When.END,
        "time / tokens over all samples of chain or async-chain",
        _assisted("time_per_token_s"),
    ),
    Key(
        "assisted_thr",
        "tokens/s",
        ("002",),
        When.END,
        "the inverse",
        _assisted("tokens_per_s"),
    ),
    Key(
        "speedup_ratio",
        "ratio",
        ("002",),
        When.END,
        "time per token of greedy / of this run, over the prompts that both have",
        _speed_up,
    ),
    Key(
        "accept_rate",
        "share",
        ("002",),
        When.END,
        "accepted / scored by the target, over all samples",
        _target_acceptance,
    ),
    Key(
        "total_rollbacks",
        "count",
        ("002",),
        When.END,
        "verdicts of the target that removed tokens of its draft; in chain, as in 002, its "
        "verifications with a rejection",
        _total_rollbacks,
    ),
    Key(
        "perplexity/perplexity",
        "ratio",
        ("002",),
        When.NEVER,
        "of the target on wikitext-2",
        waits_for="an evaluation of perplexity",
    ),
    Key(
        "generation/latency_per_token",
        "s/token",
        ("002",),
        When.END,
        "of greedy's run alone: time of a model by itself / its tokens",
        _alone("time_per_token_s"),
    ),
    Key(
        "generation/throughput",
        "tokens/s",
        ("002",),
        When.END,
        "the inverse",
        _alone("tokens_per_s"),
    ),
    Key(
        "humaneval/pass@1",
        "share",
        ("002",),
        When.NEVER,
        "tasks whose first completion passes its tests",
        waits_for="an evaluation of HumanEval",
    ),
)
