"""One strategy over all prompts: which file it goes to, running it, and what is recorded of it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from time import perf_counter
from typing import Any, Final, Self

from pipespec.commands.display import Display, SampleProgress
from pipespec.commands.entry import library_errors
from pipespec.commands.equality import Divergence, first_divergence, with_margins
from pipespec.commands.inputs import Inputs, Prompt
from pipespec.commands.monitoring import RunMonitor, pids_of
from pipespec.commands.payoff import is_enough, payoff_metadata
from pipespec.commands.settings import AnyDecoder, Settings, open_decoder
from pipespec.commands.tracing import noted
from pipespec.decoding import Generation
from pipespec.metrics import StageCounts, sample_metrics
from pipespec.planning.payoff import WrittenText
from pipespec.results import (
    OutputPlan,
    ResultWriter,
    partial_path,
    plan_output,
    result_file_name,
    run_metadata,
    sample_result,
)
from pipespec.results.reading import read_partial
from pipespec.state.counts import Counts
from pipespec.tokenizer import token_lengths

Result = Mapping[str, Any]
OnSample = Callable[[Result, Mapping[str, Any]], None]
WARM_UP_TOKENS: Final = 16


@dataclass(frozen=True, slots=True)
class Run:
    """One strategy of a benchmark. metadata: what is known of it before it starts."""

    strategy: str
    path: Path
    metadata: dict[str, Any]
    plan: OutputPlan


def describe_run(
    strategy: str,
    settings: Settings,
    inputs: Inputs,
    output_dir: Path,
    environment: Mapping[str, Any],
    *,
    drop_stages: bool = False,
) -> tuple[Path, dict[str, Any]]:
    """The file and the metadata of a strategy's run. environment: of `describe_environment`."""
    schedule = settings.schedule_of(strategy)
    names = [model.name for model in settings.models]
    file_name = result_file_name(
        strategy, names, schedule.lookahead, auto=schedule.lookahead is None
    )
    metadata = run_metadata(
        strategy=strategy,
        models=settings.models,
        generation=settings.generation,
        schedule=schedule,
        dataset=inputs.dataset.name,
        dataset_source=inputs.dataset.source,
        dataset_digest=inputs.dataset.digest,
        num_samples=len(inputs.prompts),
        generation_prompt=settings.generation_prompt,
        prefill=settings.prefill,
        runner=settings.runner,
        environment=environment,
        started_at=_now(),
        drop_stages=drop_stages,
    )
    return output_dir / file_name, metadata


def plan_run(
    strategy: str,
    settings: Settings,
    inputs: Inputs,
    output_dir: Path,
    environment: Mapping[str, Any],
    *,
    force: bool,
    resume: bool,
    drop_stages: bool = False,
) -> Run:
    """What is to be done for a strategy. environment: of `describe_environment`. drop_stages:
    async-chain goes on without those that turn out not to pay.

    Raises:
        UsageError: its file is another run's, or the folder cannot be written.
    """
    path, metadata = describe_run(
        strategy, settings, inputs, output_dir, environment, drop_stages=drop_stages
    )
    plan = plan_output(path, metadata, force=force, resume=resume)
    return Run(strategy, path, metadata, plan)


def run_strategy(
    run: Run,
    settings: Settings,
    inputs: Inputs,
    greedy: Sequence[Result],
    display: Display,
    on_sample: OnSample = lambda _result, _metadata: None,
) -> None:
    """Loads the models, generates every sample that is not on the disk yet, and finishes the file.
    on_sample: is told of each one of the run that is on the disk, and of the run's metadata.

    Raises:
        PipeSpecError: with a note on what was kept, like anything else that ends the run early.
    """
    monitor = RunMonitor(settings.monitor_interval_s, inputs.hierarchy, run.strategy)
    with monitor, _Models(run, settings, inputs, display, monitor, on_sample) as models:
        models.load(_stages_at_start(run, inputs))
        with _writer(run, len(inputs.prompts)) as writer:
            earlier = writer.metadata.get("monitor")
            writer.update_metadata(pids=models.pids, **monitor.metadata(earlier))
            for result in writer.results:
                on_sample(result, writer.metadata)
            if run.strategy == "async-chain" and writer.metadata.get("payoff") is None:
                _judge_stages(models, writer, greedy)
            models.write_samples(writer)
            models.close()  # room for the target alone
            monitor.close()
            writer.update_metadata(**monitor.metadata(earlier))
            _record_differences(writer, inputs, settings, greedy, display)
            if run.strategy != "greedy":
                writer.update_metadata(**effective_schedule(writer.metadata, writer.results))
            writer.finish()


def find_divergences(
    results: Sequence[Result], greedy: Sequence[Result], prompts: Sequence[Prompt]
) -> list[Divergence]:
    """Every sample whose tokens are not greedy's, of those that both have."""
    prompt_ids = {prompt.index: prompt.ids for prompt in prompts}
    greedy_ids = {result["sample_index"]: result["output_ids"] for result in greedy}
    found = (
        first_divergence(index, prompt_ids[index], greedy_ids[index], result["output_ids"])
        for result in results
        if (index := result["sample_index"]) in greedy_ids
    )
    return [divergence for divergence in found if divergence is not None]


def effective_schedule(metadata: Mapping[str, Any], results: Sequence[Result]) -> dict[str, Any]:
    """What the schedule came to, for the metadata: where the policy chose the lookahead, the
    candidates of a mean verification by the target stand for it."""
    num_offered = sum(result["metrics"]["num_offered"][-1] for result in results)
    num_verifications = sum(result["metrics"]["num_verifications"][-1] for result in results)
    mean = num_offered / num_verifications if num_verifications else 0.0
    is_auto = metadata["lookahead_mode"] == "auto"
    lookahead = round(mean) if is_auto else metadata["lookahead"]
    return {
        "lookahead": lookahead,
        "effective_schedule": {
            "policy": metadata["policy"],
            "lookahead_mode": metadata["lookahead_mode"],
            "lookahead": lookahead,
            "run_ahead": metadata["run_ahead"],
            "mean_candidates": round(mean, 3),
        },
    }


class _Models:
    """The models of a run, all of its stages or some of them, and what they write. A context
    manager. pids: of all processes that have held a model."""

    def __init__(
        self,
        run: Run,
        settings: Settings,
        inputs: Inputs,
        display: Display,
        monitor: RunMonitor,
        on_sample: OnSample,
    ) -> None:
        self.run = run
        self.settings = settings
        self.inputs = inputs
        self.display = display
        self.stages: tuple[int, ...] = ()
        self.pids: list[int] = []
        self._monitor = monitor
        self._on_sample = on_sample
        self._decoder: AnyDecoder | None = None

    def load(self, stages: tuple[int, ...]) -> None:
        """These stages in place of those that ran before. The target alone is what greedy does."""
        self.close()
        self.stages = stages
        strategy = self.run.strategy if len(stages) > 1 else "greedy"
        hierarchy = self.inputs.hierarchy.only(stages)
        with (
            library_errors(f"{self.run.strategy}, while its models were loaded,"),
            self.display.loading(self.run.strategy, hierarchy.models) as on_progress,
        ):
            self._decoder = open_decoder(strategy, hierarchy, self.settings, on_progress)
            self._warm_up(self._decoder)
        self.pids += pids_of(self._decoder)
        self._monitor.follow(stages, self._decoder)

    def write_samples(
        self,
        writer: ResultWriter,
        until: Callable[[dict[int, WrittenText]], bool] = lambda _: False,
    ) -> dict[int, WrittenText]:
        """Those that are not on the disk yet, until they are enough; returns them, by sample."""
        texts: dict[int, WrittenText] = {}
        prompts, strategy = self.inputs.prompts, self.run.strategy
        with self.display.samples(strategy, len(writer.done), len(prompts)) as progress:
            for prompt in prompts:
                if prompt.index not in writer.done and not until(texts):
                    result, texts[prompt.index] = self._write_sample(prompt, progress)
                    writer.add(result)
                    self._on_sample(result, writer.metadata)
        return texts

    def close(self) -> None:
        """Ends processes and frees memory. Idempotent."""
        decoder, self._decoder = self._decoder, None
        if decoder is not None:
            decoder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _warm_up(self, decoder: AnyDecoder) -> None:
        """What happens only once (first calls, first measurements of a policy) is not timed."""
        generation = self.settings.generation
        limit = min(WARM_UP_TOKENS, generation.max_new_tokens)
        with noted(self.settings.trace, "warm-up"):
            decoder.generate(self.inputs.prompts[0].ids, replace(generation, max_new_tokens=limit))

    def _write_sample(
        self, prompt: Prompt, progress: SampleProgress
    ) -> tuple[dict[str, Any], WrittenText]:
        """One sample, as an item of `results` and as its counts."""
        assert self._decoder is not None
        self._monitor.begin()
        started_s = perf_counter()
        with (
            library_errors(f"{self.run.strategy}, on sample {prompt.index},"),
            noted(self.settings.trace, f"sample {prompt.index}"),
        ):
            output = self._decoder.generate(prompt.ids, self.settings.generation, progress.on_text)
        gpustats, device_metrics = self._monitor.end()
        progress.on_sample(len(output.token_ids), output.total_time_s)
        counts = tuple(StageCounts.from_values(values) for values in output.counts)
        tokenizer = self.inputs.hierarchy.tokenizer
        more: dict[str, Any] = {
            "gpustats": gpustats,
            "token_lengths": token_lengths(tokenizer, output.token_ids, output.text),
        }
        if self.run.metadata["drop_stages"]:
            more["stages"] = self.stages
            counts = self._of_all_stages(counts)
        result = _sample_result(self.run.strategy, prompt, output, counts, started_s, more)
        result["metrics"].update(device_metrics)
        return result, WrittenText(counts, output.total_time_s)

    def _of_all_stages(self, counts: Sequence[StageCounts]) -> tuple[StageCounts, ...]:
        """A stage that was left out did nothing, so that all samples of a run have lists of the
        same length."""
        idle = StageCounts.from_values(Counts().to_values())
        by_stage = dict(zip(self.stages, counts))
        return tuple(by_stage.get(stage, idle) for stage in range(len(self.settings.models)))


def _sample_result(
    strategy: str,
    prompt: Prompt,
    output: Generation,
    counts: Sequence[StageCounts],
    started_s: float,
    more: Mapping[str, Any],
) -> dict[str, Any]:
    """An item of `results`."""
    times_s = [at_s for at_s, _ in output.arrivals]
    metrics = sample_metrics(
        strategy,
        counts,
        total_time_s=output.total_time_s,
        time_to_first_token_s=output.time_to_first_token_s,
        num_tokens=len(output.token_ids),
        token_times_s=[later - earlier for earlier, later in itertools.pairwise(times_s)],
        started_s=started_s,
    )
    metrics["arrivals"] = output.arrivals
    return sample_result(
        prompt.index,
        strategy,
        metrics,
        output.text,
        prompt.text,
        num_prompt_tokens=output.num_prompt_tokens,
        finish_reason=output.finish_reason,
        output_ids=output.token_ids,
        **more,
    )


def _stages_at_start(run: Run, inputs: Inputs) -> tuple[int, ...]:
    """All that the strategy runs, without those that an interrupted run had left out."""
    whole = tuple(range(len(inputs.hierarchy.models)))
    if run.strategy == "greedy":
        return whole[-1:]
    stored = read_partial(partial_path(run.path)).metadata if run.plan is OutputPlan.RESUME else {}
    found = (stored or {}).get("payoff")
    return tuple(found["best"]) if found and found["dropped"] else whole


def _judge_stages(models: _Models, writer: ResultWriter, greedy: Sequence[Result]) -> None:
    """Writes samples and records which stages paid meanwhile. With --drop-stages that is done as
    soon as enough is written, and those that paid are loaded for the others; else at the end."""
    drops = bool(models.run.metadata["drop_stages"])
    texts = models.write_samples(writer, until=is_enough if drops else lambda _: False)
    if not is_enough(texts):
        return
    drops = drops and len(writer.done) < len(models.inputs.prompts)
    found = payoff_metadata(texts, models.settings.schedule, greedy, drops)
    writer.update_metadata(payoff=found)
    if found["dropped"]:
        names = " and ".join(models.settings.models[stage].name for stage in found["dropped"])
        models.display.line(f"{models.run.strategy}: going on without {names}")
        models.load(found["best"])
        writer.update_metadata(pids=models.pids)


@contextlib.contextmanager
def _writer(run: Run, num_samples: int) -> Iterator[ResultWriter]:
    """The run's file; whatever ends the run early takes along a note on what is kept."""
    metadata = {**run.metadata, "started_at": _now()}
    writer = ResultWriter(run.path, metadata, resume=run.plan is OutputPlan.RESUME)
    try:
        with writer:
            yield writer
    except BaseException as error:
        partial = partial_path(run.path)
        # What counts is the file: a signal may strike between a sample's write and the next line.
        kept = read_partial(partial).results if partial.exists() else {}
        if kept:
            error.add_note(
                f"{len(kept)} of {num_samples} samples of {run.strategy} are kept in {partial}; "
                "the same command with --resume goes on after them"
            )
        else:
            partial.unlink(missing_ok=True)
        raise


def _record_differences(
    writer: ResultWriter,
    inputs: Inputs,
    settings: Settings,
    greedy: Sequence[Result],
    display: Display,
) -> None:
    """Compares with greedy, shows and stores where the outputs part and by what margin."""
    if not greedy:
        return
    divergences = find_divergences(writer.results, greedy, inputs.prompts)
    if divergences:
        display.line(f"outputs unlike greedy's: {len(divergences)}; asking the target how near")
        with library_errors("the comparison with greedy"):
            divergences = with_margins(divergences, inputs.hierarchy, settings.generation.sampling)
    for divergence in divergences:
        display.line(divergence.describe(settings.models[-1].dtype))
        writer.add_metrics(
            divergence.sample_index,
            first_divergence=divergence.position,
            divergence_margin=divergence.margin,
        )
    num_compared = len({result["sample_index"] for result in greedy} & writer.done)
    writer.update_metadata(
        greedy_comparison={"num_compared": num_compared, "num_different": len(divergences)}
    )


def _now() -> str:
    """ISO 8601, with the offset from UTC."""
    return datetime.now().astimezone().isoformat(timespec="seconds")
