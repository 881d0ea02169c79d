"""From a profile to the `System` that it is of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pipespec.config import GenerationParams, ModelConfig
from pipespec.emulation import TokenOracle
from pipespec.messages import Submit
from pipespec.planning.profile import Profile
from pipespec.planning.system import Overheads, PlanModel, System, num_devices
from pipespec.planning.trace import (
    Draws,
    Ranked,
    TraceOracle,
    agreement,
    rank_shares,
    recorded_draws,
    target_draws,
)


def measured_system(
    profile: Profile,
    models: Sequence[ModelConfig],
    generation: GenerationParams,
    eos: tuple[int, ...],
) -> System:
    """What a complete profile says of a hierarchy. eos: the target's end-of-text ids."""
    last = len(models) - 1
    texts = profile.texts
    return System(
        models=tuple(
            PlanModel(
                name=measured.name,
                times=measured.times,
                chain_times=measured.chain_times or measured.times,
                context_length=measured.context_length,
                num_tail_rows=measured.num_tail_rows,
                num_devices=num_devices(model),
            )
            for measured, model in zip((profile.models[i] for i in range(last + 1)), models)
        ),
        submits=tuple(
            Submit(number, text.prompt, (), generation.sampling, len(text.tokens), eos, ())
            for number, text in enumerate(texts)
        ),
        oracles=TraceOracles(profile),
        overheads=profile.overheads or Overheads(),
        slow_downs=tuple(
            tuple(profile.slow_downs.get((i, j), 1.0) for j in range(last + 1))
            for i in range(last + 1)
        ),
    )


@dataclass(frozen=True, slots=True)
class TraceOracles:
    """The oracles of any subset of a profile's models, made once. Called with indexes."""

    profile: Profile
    _made: dict[tuple[int, ...], Sequence[TokenOracle]] = field(default_factory=dict)
    _recorded: dict[int, dict[int, Ranked]] = field(default_factory=dict)

    def __call__(self, stages: tuple[int, ...]) -> Sequence[TokenOracle]:
        if stages not in self._made:
            self._made[stages] = self._make(stages)
        return self._made[stages]

    def _make(self, stages: tuple[int, ...]) -> Sequence[TokenOracle]:
        """From the target up: each follows the next larger one where nothing was recorded."""
        made: list[TokenOracle] = []
        for place in reversed(range(len(stages))):
            stage = stages[place]
            below = stages[place + 1] if place + 1 < len(stages) else None
            draws = self._draws(stage)
            made.append(
                TraceOracle(
                    recorded=self._recorded_of(stage),
                    vocab_size=self.profile.vocab_size,
                    larger=None if below is None else made[-1],
                    agreement=1.0 if below is None else agreement(draws, self._draws(below)),
                    rank_shares=[] if below is None else rank_shares(draws, self._draws(below)),
                    own=stage << 40,
                )
            )
        return made[::-1]

    def _recorded_of(self, stage: int) -> dict[int, Ranked]:
        if stage not in self._recorded:
            profile = self.profile
            branches = profile.all_branches()
            self._recorded[stage] = recorded_draws(profile.texts, branches, self._draws(stage))
        return self._recorded[stage]

    def _draws(self, stage: int) -> Draws:
        if stage in self.profile.draws:
            return self.profile.draws[stage]
        return target_draws(self.profile.texts)
