"""From parsed flags to checked values: models, limits, schedule. Reads the models config only."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from pipespec.checkpoint.locate import SHIPPED_PREFIX
from pipespec.commands.arguments import HUB_MAX_NEW_TOKENS
from pipespec.commands.tracing import TraceRecorder
from pipespec.config import (
    STRATEGIES,
    GenerationParams,
    ModelConfig,
    SamplingParams,
    Schedule,
    find_models_config,
    load_models_config,
)
from pipespec.decoding import (
    AsyncChainSpeculativeDecoder,
    ChainSpeculativeDecoder,
    GreedyDecoder,
    Hierarchy,
    open_hierarchy,
)
from pipespec.errors import UsageError
from pipespec.stage_process import StageStatus

DEFAULT_READY_TIMEOUT_S: Final = 600.0
AnyDecoder = GreedyDecoder | ChainSpeculativeDecoder | AsyncChainSpeculativeDecoder


@dataclass(frozen=True, slots=True)
class Settings:
    """What the flags that commands share ask for.

    strategies: in the order in which they run. is_dataset_given: the user named the data set.
    prefill: what `--prefill` said; None where it was not given, and prompts are cut to
    `default_prefill` tokens, if that is not None, or to what the context has room for.
    is_basic_template: write conversations without the tokenizer's chat template. trace: what
    happens is noted there. monitor_interval_s: between two readings of the devices; 0: none.
    """

    strategies: tuple[str, ...]
    config_path: Path
    models: tuple[ModelConfig, ...]
    dataset: str
    is_dataset_given: bool
    generation_prompt: bool
    generation: GenerationParams
    schedule: Schedule
    runner: str
    transport: str
    ready_timeout_s: float
    prefill: int | None = None
    default_prefill: int | None = None
    is_basic_template: bool = False
    trace: TraceRecorder | None = None
    monitor_interval_s: float = 0.0

    def schedule_of(self, strategy: str) -> Schedule:
        """A policy says how to wait, and `chain` never does: it has the adaptive one's rule."""
        if strategy == "async-chain":
            return self.schedule
        return replace(self.schedule, policy=Schedule().policy)


def read_settings(options: argparse.Namespace) -> Settings:
    """Checks the flags, also against each other and against the models config.

    Raises:
        UsageError: naming the flag.
        ConfigError: naming the models config and the key.
    """
    strategies = STRATEGIES if options.strategy == "all" else (options.strategy,)
    schedule = Schedule(
        options.policy, options.lookahead, options.run_ahead, options.outcomes, options.tree
    )
    config_path = find_models_config(options.models_config_path)
    models = load_models_config(config_path)
    if options.runner != "auto":
        models = tuple(replace(model, runner=options.runner) for model in models)
    if options.deterministic:  # the target alone decides what is written
        models = (*models[:-1], replace(models[-1], deterministic=True))
    _check_strategies(strategies, schedule, models, config_path)
    if options.prefill is not None and options.prefill < 1:
        raise UsageError(f"--prefill is {options.prefill}; it must be at least 1 token")
    timeout_s = options.ready_timeout
    if not (math.isfinite(timeout_s) and timeout_s > 0):
        raise UsageError(
            f"--ready-timeout is {timeout_s:g}; it must be a number of seconds above 0"
        )
    return Settings(
        strategies=strategies,
        config_path=config_path,
        models=models,
        dataset=_default_dataset(models) if options.dataset is None else options.dataset,
        is_dataset_given=options.dataset is not None,
        generation_prompt=not options.no_generation_prompt,
        generation=_generation(options, models),
        schedule=schedule,
        runner=options.runner,
        transport=options.transport,
        ready_timeout_s=timeout_s,
        prefill=options.prefill,
    )


def is_small(models: tuple[ModelConfig, ...]) -> bool:
    """Whether all models are shipped with PipeSpec or emulated: nothing to download, and limits
    that suit them."""
    return all(
        model.path.startswith(SHIPPED_PREFIX) or model.emulated is not None for model in models
    )


def open_models(settings: Settings) -> Hierarchy:
    """Finds and checks what the strategies need; see `open_hierarchy`."""
    return open_hierarchy(
        settings.models,
        base=settings.config_path.parent,
        target_only=settings.strategies == ("greedy",),
    )


def open_decoder(
    strategy: str,
    hierarchy: Hierarchy,
    settings: Settings,
    on_progress: Callable[[tuple[StageStatus, ...]], None] | None = None,
) -> AnyDecoder:
    """The strategy with its models loaded; a context manager."""
    on_trace = None if settings.trace is None else settings.trace.add
    if strategy == "greedy":
        return GreedyDecoder(hierarchy, on_trace=on_trace)
    schedule = settings.schedule_of(strategy)
    if strategy == "chain":
        return ChainSpeculativeDecoder(hierarchy, schedule, on_trace=on_trace)
    return AsyncChainSpeculativeDecoder(
        hierarchy,
        schedule,
        transport=settings.transport,
        ready_timeout_s=settings.ready_timeout_s,
        on_progress=on_progress,
        on_trace=on_trace,
    )


def _check_strategies(
    strategies: tuple[str, ...],
    schedule: Schedule,
    models: tuple[ModelConfig, ...],
    config_path: Path,
) -> None:
    drafting = [strategy for strategy in strategies if strategy != "greedy"]
    if drafting and len(models) < 2:
        raise UsageError(
            f"--strategy {drafting[-1]} needs a draft and a target, but {config_path} has one "
            "model; add a draft before it, or use --strategy greedy"
        )
    if "chain" in strategies and schedule.lookahead == 0:
        raise UsageError(
            "--lookahead 0 is for async-chain; chain drafts at least 1 token: use --lookahead 1 "
            "or more, or --strategy async-chain"
        )


def _default_dataset(models: tuple[ModelConfig, ...]) -> str:
    return "stdlib" if is_small(models) else "humaneval"


def _generation(options: argparse.Namespace, models: tuple[ModelConfig, ...]) -> GenerationParams:
    sampling = SamplingParams(
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        min_p=options.min_p,
        seed=options.seed,
    )
    limit = options.max_new_tokens
    if limit is None:
        limit = GenerationParams().max_new_tokens if is_small(models) else HUB_MAX_NEW_TOKENS
    return GenerationParams(limit, sampling, tuple(options.stop or ()))
