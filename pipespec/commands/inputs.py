"""Models and prompts of a run, checked before any weights are loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipespec.commands.settings import Settings, open_models
from pipespec.data import Dataset, Sample, load_dataset, prompt_ids, prompt_text, shortened
from pipespec.decoding import Hierarchy
from pipespec.errors import DataError, UsageError
from pipespec.placement import place, this_machine


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is fed for one sample: `ids`, and the text that they are of. index: in the data set.
    num_lost: characters that `--prefill` has cost it."""

    index: int
    text: str
    ids: tuple[int, ...]
    num_lost: int = 0


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything that a command needs to open a decoder and use it."""

    hierarchy: Hierarchy
    dataset: Dataset
    prompts: tuple[Prompt, ...]
    notes: tuple[str, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know: of the data set, its prompts, and where the models go."""
        notes = dict.fromkeys(placement.note for placement in self.hierarchy.placements)
        return (*self.dataset.warnings, *self.notes, *filter(None, notes))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return self.hierarchy.tokenizer.decode(ids, skip_special_tokens=False)


def read_inputs(
    settings: Settings, num_samples: int | None, *, sample_index: int | None = None
) -> Inputs:
    """Opens models and data set, cheapest question first: a missing GPU or a mistyped data set is
    reported before anything is downloaded for the models.

    sample_index: that sample alone, of the first `num_samples`.

    Raises:
        UsageError: naming the flag, file, model or sample that does not fit.
    """
    if num_samples is not None and num_samples < 1:
        raise DataError(f"--num-samples is {num_samples}; it must be a positive integer")
    place(settings.models, this_machine(os.environ))
    is_given = settings.is_dataset_given
    dataset = _load(settings, num_samples, sample_index) if is_given else None
    hierarchy = open_models(settings)
    prefill = prefill_of(settings, hierarchy)
    if dataset is None:
        dataset = _load(settings, num_samples, sample_index)
    prompts = read_prompts(dataset, hierarchy, settings)
    longest = max(len(prompt.ids) for prompt in prompts)
    limit = longest + settings.generation.max_new_tokens
    notes = (*_template_notes(dataset, hierarchy, settings), *prefill_notes(prompts, prefill))
    return Inputs(hierarchy.limited_to(limit), dataset, prompts, notes)


def read_prompts(dataset: Dataset, hierarchy: Hierarchy, settings: Settings) -> tuple[Prompt, ...]:
    """All samples as token ids.

    Raises:
        DataError: a sample without a token, or with more than the target's context holds.
    """
    return tuple(
        make_prompt(sample, f"sample {sample.index} of {dataset.source}", hierarchy, settings)
        for sample in dataset.samples
    )


def make_prompt(sample: Sample, what: str, hierarchy: Hierarchy, settings: Settings) -> Prompt:
    """A sample as token ids, cut to `--prefill`; `what` names it.

    Raises:
        DataError: it has no token, or too many.
    """
    tokenizer, generation_prompt = hierarchy.tokenizer, settings.generation_prompt
    is_basic = _is_basic(hierarchy, settings)

    def ids_of(sample: Sample) -> list[int]:
        return prompt_ids(sample, tokenizer, generation_prompt, is_basic=is_basic)

    num_lost, prefill = 0, prefill_of(settings, hierarchy)
    if prefill is not None:
        try:
            sample, num_lost = shortened(sample, prefill, lambda other: len(ids_of(other)))
        except DataError as error:
            raise DataError(f"{what} {error}, more than --prefill {prefill}") from error
    ids = ids_of(sample)
    check_length(what, ids, hierarchy)
    text = prompt_text(sample, tokenizer, generation_prompt, is_basic=is_basic)
    return Prompt(sample.index, text, tuple(ids), num_lost)


def prefill_of(settings: Settings, hierarchy: Hierarchy) -> int | None:
    """Tokens that prompts are cut to; None for whole prompts. A default leaves room in the context
    for what is to be written, or half of it.

    Raises:
        UsageError: `--prefill` is more than the target's context.
    """
    context = hierarchy.context_length
    if settings.prefill is not None and settings.prefill > context:
        raise UsageError(
            f"--prefill is {settings.prefill}, more than the {context} tokens of "
            f"{hierarchy.models[-1].name}'s context; give less, and leave room for "
            "--max-new-tokens"
        )
    if settings.prefill is not None or settings.default_prefill is None:
        return settings.prefill
    room = max(context - settings.generation.max_new_tokens, context // 2)
    return min(settings.default_prefill, room)


def check_length(what: str, ids: Sequence[int], hierarchy: Hierarchy) -> None:
    """Whether the target can read `ids` and write at least one token; `what` names the prompt.

    Raises:
        DataError: it cannot.
    """
    if not ids:
        raise DataError(f"{what} is empty: there is no token to continue from")
    if len(ids) > hierarchy.context_length:
        raise DataError(
            f"{what} has {len(ids)} tokens, more than the {hierarchy.context_length} of "
            f"{hierarchy.models[-1].name}'s context; shorten it, or cut it with --prefill N"
        )


def _load(settings: Settings, num_samples: int | None, sample_index: int | None) -> Dataset:
    dataset = load_dataset(settings.dataset, num_samples)
    if sample_index is None:
        return dataset
    if sample_index >= len(dataset.samples):
        raise DataError(
            f"--sample-index is {sample_index}, but {dataset.source} has only "
            f"{len(dataset.samples)} samples"
        )
    return replace(dataset, samples=(dataset.samples[sample_index],))


def _is_basic(hierarchy: Hierarchy, settings: Settings) -> bool:
    return settings.is_basic_template or not hierarchy.tokenizer.has_chat_template


def _template_notes(dataset: Dataset, hierarchy: Hierarchy, settings: Settings) -> tuple[str, ...]:
    has_turns = any(sample.messages is not None for sample in dataset.samples)
    if settings.is_basic_template and not has_turns:
        return (f"--use-basic-template changes nothing: {dataset.name} is plain text",)
    if has_turns and not settings.is_basic_template and not hierarchy.tokenizer.has_chat_template:
        name = hierarchy.models[-1].name
        return (f"{name} has no chat template: turns are written as USER: and ASSISTANT:",)
    return ()


def prefill_notes(prompts: Sequence[Prompt], prefill: int | None) -> tuple[str, ...]:
    """What was cut."""
    cut = [prompt for prompt in prompts if prompt.num_lost]
    if not cut:
        return ()
    lost = sum(prompt.num_lost for prompt in cut)
    which = f"prompt {cut[0].index}" if len(cut) == 1 else f"{len(cut)} of {len(prompts)} prompts"
    limit = f"to at most {prefill} tokens (--prefill)"
    return (f"{which} cut {limit}: {lost:,} characters are left out",)
