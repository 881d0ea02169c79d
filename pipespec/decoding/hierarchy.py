"""From a models config to everything a strategy needs to start: folders, tokenizer, placement.

Reads files and looks at the machine; loads no weights and starts no process.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipespec.checkpoint import (
    CheckpointShape,
    eos_token_ids,
    locate,
    locate_cached,
    locate_tokenizer,
)
from pipespec.config import ModelConfig
from pipespec.emulation import parse_emulation
from pipespec.errors import ConfigError
from pipespec.placement import Machine, StagePlacement, in_process, place, this_machine
from pipespec.tokenizer import TextTokenizer, check_same_tokenizer, load_tokenizer


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """The models of a run, smallest draft first, target last, ready to be loaded.

    folders, tokenizer_folders: where each model's files are, None where there are none.
    context_length: positions that a request may take. vocab_size: ids that may be drawn, the
    tokenizer's; wider logits are padding. eos: the target's end-of-text ids.
    """

    models: tuple[ModelConfig, ...]
    folders: tuple[Path | None, ...]
    tokenizer_folders: tuple[Path | None, ...]
    placements: tuple[StagePlacement, ...]
    machine: Machine
    tokenizer: TextTokenizer
    vocab_size: int
    context_length: int
    eos: tuple[int, ...]

    @property
    def target_only(self) -> Hierarchy:
        """The same target where it stood, without drafts: what `greedy` loads."""
        return self.only((len(self.models) - 1,))

    def only(self, stages: Sequence[int]) -> Hierarchy:
        """Some of the models, by index in rising order, the target among them. Each stays where it
        stood."""
        assert stages[-1] == len(self.models) - 1
        return replace(
            self,
            models=tuple(self.models[stage] for stage in stages),
            folders=tuple(self.folders[stage] for stage in stages),
            tokenizer_folders=tuple(self.tokenizer_folders[stage] for stage in stages),
            placements=tuple(self.placements[stage] for stage in stages),
        )

    def limited_to(self, num_positions: int) -> Hierarchy:
        """The same for requests that take at most so many positions, prompt and output together:
        keys and values are allocated for no more."""
        return replace(self, context_length=min(self.context_length, num_positions))

    def in_process(self, index: int) -> StagePlacement:
        """Where stage `index` goes in a process that sees the whole machine."""
        return in_process(self.placements[index], self.machine)


def open_hierarchy(
    models: Sequence[ModelConfig], *, base: Path | None = None, target_only: bool = False
) -> Hierarchy:
    """Locates and checks what `models` names; paths may be relative to `base`.

    target_only: look at the last model alone (placed as one of all, so that strategies compare on
    the same device).

    Raises:
        ConfigError: no models, or models whose tokenizers differ.
        ModelLoadError: weights or a device that are not here.
    """
    if not models:
        raise ConfigError("a hierarchy needs at least one model")
    machine = this_machine(os.environ)
    place(models, machine)  # a missing device is said before anything is downloaded
    used = tuple(models[-1:]) if target_only else tuple(models)
    folders = tuple(None if m.emulated is not None else locate(m.path, base) for m in used)
    tokenizer_folders = tuple(
        folder if model.tokenizer is None else locate_tokenizer(model.tokenizer, base)
        for model, folder in zip(used, folders, strict=True)
    )
    tokenizers = [load_tokenizer(folder) for folder in tokenizer_folders]
    check_same_tokenizer([(m.name, t) for m, t in zip(used, tokenizers, strict=True)])
    tokenizer = tokenizers[-1]
    vocab_size, context_length, eos = _limits(used[-1], folders[-1], tokenizer)
    return Hierarchy(
        models=used,
        folders=folders,
        tokenizer_folders=tokenizer_folders,
        placements=place(models, machine, _weights_gib(models, base))[-len(used) :],
        machine=machine,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        context_length=context_length,
        eos=eos,
    )


def _limits(
    target: ModelConfig, folder: Path | None, tokenizer: TextTokenizer
) -> tuple[int, int, tuple[int, ...]]:
    """Ids that may be drawn, positions, end-of-text ids."""
    if folder is not None:
        context_length = CheckpointShape.read(folder).context_length
        return tokenizer.num_ids, context_length, eos_token_ids(folder)
    emulation = parse_emulation(target.emulated or {}, target.name)
    vocab_size = min(tokenizer.num_ids, emulation.vocab_size)
    return vocab_size, emulation.context_length, (emulation.eos_token_id,)


def _weights_gib(models: Sequence[ModelConfig], base: Path | None) -> list[float] | None:
    """The size of every model's weights, or None: a draft of `target_only` may not be here."""
    sizes = []
    for model in models:
        folder = None if model.emulated is not None else locate_cached(model.path, base)
        if folder is None and model.emulated is None:
            return None
        shape = None if folder is None else CheckpointShape.read(folder)
        num_bytes = 0 if shape is None else shape.weight_bytes(model.dtype, model.quantize)
        sizes.append(num_bytes / (1 << 30))
    return sizes
