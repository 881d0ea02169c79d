"""One strategy over all prompts: which file it goes to, running it, and what is recorded of it."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from time import perf_counter
from typing import Any, Final

from pipespec.commands.display import Display, SampleProgress
from pipespec.commands.entry import library_errors
from pipespec.commands.equality import Divergence, first_divergence, with_margins
from pipespec.commands.inputs import Inputs, Prompt
from pipespec.commands.settings import AnyDecoder, Settings, open_decoder
from pipespec.config import GenerationParams
from pipespec.decoding import AsyncChainSpeculativeDecoder
from pipespec.metrics import StageCounts, sample_metrics
from pipespec.results import (
    OutputPlan,
    ResultWriter,
    describe_environment,
    partial_path,
    plan_output,
    result_file_name,
    run_metadata,
    sample_result,
)
from pipespec.results.reading import read_partial

Result = Mapping[str, Any]
WARM_UP_TOKENS: Final = 16


@dataclass(frozen=True, slots=True)
class Run:
    """One strategy of a benchmark. metadata: what is known of it before it starts."""

    strategy: str
    path: Path
    metadata: dict[str, Any]
    plan: OutputPlan


def describe_run(
    strategy: str, settings: Settings, inputs: Inputs, output_dir: Path
) -> tuple[Path, dict[str, Any]]:
    """The file and the metadata of a strategy's run."""
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
        runner=settings.runner,
        environment=describe_environment(),
        started_at=_now(),
    )
    return output_dir / file_name, metadata


def plan_run(
    strategy: str,
    settings: Settings,
    inputs: Inputs,
    output_dir: Path,
    *,
    force: bool,
    resume: bool,
) -> Run:
    """What is to be done for a strategy.

    Raises:
        UsageError: its file is another run's, or the folder cannot be written.
    """
    path, metadata = describe_run(strategy, settings, inputs, output_dir)
    plan = plan_output(path, metadata, force=force, resume=resume)
    return Run(strategy, path, metadata, plan)


def run_strategy(
    run: Run,
    settings: Settings,
    inputs: Inputs,
    greedy: Sequence[Result],
    display: Display,
) -> None:
    """Loads the models, generates every sample that is not on the disk yet, and finishes the file.

    Raises:
        PipeSpecError: with a note on what was kept, like anything else that ends the run early.
    """
    with contextlib.ExitStack() as models:
        with (
            library_errors(f"{run.strategy}, while its models were loaded,"),
            display.loading(run.strategy, settings.models) as on_progress,
        ):
            decoder = open_decoder(run.strategy, inputs.hierarchy, settings, on_progress)
            models.callback(decoder.close)
            _warm_up(decoder, inputs.prompts[0], settings.generation)
        with _writer(run, len(inputs.prompts)) as writer:
            writer.update_metadata(pids=_pids(decoder))
            with display.samples(run.strategy, len(writer.done), len(inputs.prompts)) as progress:
                for prompt in inputs.prompts:
                    if prompt.index not in writer.done:
                        writer.add(_generate(decoder, prompt, settings.generation, progress))
            models.close()  # room for the target alone
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


def _warm_up(decoder: AnyDecoder, prompt: Prompt, generation: GenerationParams) -> None:
    """What happens only once (first calls, first measurements of a policy) is not timed."""
    limit = min(WARM_UP_TOKENS, generation.max_new_tokens)
    decoder.generate(prompt.ids, replace(generation, max_new_tokens=limit))


def _generate(
    decoder: AnyDecoder, prompt: Prompt, generation: GenerationParams, progress: SampleProgress
) -> dict[str, Any]:
    """One sample, as an item of `results`."""
    started_s = perf_counter()
    with library_errors(f"{decoder.strategy}, on sample {prompt.index},"):
        output = decoder.generate(prompt.ids, generation, progress.on_text)
    progress.on_sample(len(output.token_ids), output.total_time_s)
    times_s = [at_s for at_s, _ in output.arrivals]
    metrics = sample_metrics(
        decoder.strategy,
        [StageCounts.from_values(counts) for counts in output.counts],
        total_time_s=output.total_time_s,
        time_to_first_token_s=output.time_to_first_token_s,
        num_tokens=len(output.token_ids),
        token_times_s=[later - earlier for earlier, later in itertools.pairwise(times_s)],
        started_s=started_s,
    )
    metrics["arrivals"] = output.arrivals
    return sample_result(
        prompt.index,
        decoder.strategy,
        metrics,
        output.text,
        prompt.text,
        num_prompt_tokens=output.num_prompt_tokens,
        finish_reason=output.finish_reason,
        output_ids=output.token_ids,
    )


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


def _pids(decoder: AnyDecoder) -> list[int]:
    """The processes that hold the models."""
    if isinstance(decoder, AsyncChainSpeculativeDecoder):
        return list(decoder.pipeline.pids)
    return [os.getpid()]
