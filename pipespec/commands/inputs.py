"""Models and prompts of a run, checked before any weights are loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from pipespec.commands.settings import Settings, open_models
from pipespec.data import Dataset, Sample, load_dataset, prompt_ids, prompt_text
from pipespec.decoding import Hierarchy
from pipespec.errors import DataError
from pipespec.placement import place, this_machine


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is fed for one sample: `ids`, and the text that they are of. index: in the data set."""

    index: int
    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything that a command needs to open a decoder and use it."""

    hierarchy: Hierarchy
    dataset: Dataset
    prompts: tuple[Prompt, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know: of the data set, and of where the models go."""
        notes = dict.fromkeys(placement.note for placement in self.hierarchy.placements)
        return (*self.dataset.warnings, *filter(None, notes))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return self.hierarchy.tokenizer.decode(ids, skip_special_tokens=False)


def read_inputs(settings: Settings, num_samples: int | None) -> Inputs:
    """Opens models and data set, cheapest question first: a missing GPU or a mistyped data set is
    reported before anything is downloaded for the models.

    Raises:
        UsageError: naming the flag, file, model or sample that does not fit.
    """
    if num_samples is not None and num_samples < 1:
        raise DataError(f"--num-samples is {num_samples}; it must be a positive integer")
    place(settings.models, this_machine(os.environ))
    dataset = _load(settings, num_samples) if settings.is_dataset_given else None
    hierarchy = open_models(settings)
    if dataset is None:
        dataset = _load(settings, num_samples)
    prompts = read_prompts(dataset, hierarchy)
    longest = max(len(prompt.ids) for prompt in prompts)
    limit = longest + settings.generation.max_new_tokens
    return Inputs(hierarchy.limited_to(limit), dataset, prompts)


def read_prompts(dataset: Dataset, hierarchy: Hierarchy) -> tuple[Prompt, ...]:
    """All samples as token ids.

    Raises:
        DataError: a sample without a token, or with more than the target's context holds.
    """
    return tuple(_prompt(sample, dataset, hierarchy) for sample in dataset.samples)


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
            f"{hierarchy.models[-1].name}'s context; shorten it"
        )


def _load(settings: Settings, num_samples: int | None) -> Dataset:
    return load_dataset(settings.dataset, num_samples, generation_prompt=settings.generation_prompt)


def _prompt(sample: Sample, dataset: Dataset, hierarchy: Hierarchy) -> Prompt:
    tokenizer, generation_prompt = hierarchy.tokenizer, dataset.generation_prompt
    ids = prompt_ids(sample, tokenizer, generation_prompt)
    check_length(f"sample {sample.index} of {dataset.source}", ids, hierarchy)
    text = prompt_text(sample, tokenizer, generation_prompt)
    return Prompt(sample.index, text, tuple(ids))
