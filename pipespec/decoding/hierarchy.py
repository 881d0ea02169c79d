"""From a models config to everything a strategy needs to start: folders, tokenizer, placement.

Reads files and looks at the machine; loads no weights and starts no process.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipespec.checkpoint import CheckpointShape, eos_token_ids, locate
from pipespec.config import ModelConfig
from pipespec.errors import ConfigError
from pipespec.placement import Machine, StagePlacement, in_process, place, this_machine
from pipespec.tokenizer import TextTokenizer, check_same_tokenizer, load_tokenizer


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """The models of a run, smallest draft first, target last, ready to be loaded.

    context_length: positions the target can hold. vocab_size: ids that may be drawn, the
    tokenizer's; wider logits are padding. eos: the target's end-of-text ids.
    """

    models: tuple[ModelConfig, ...]
    folders: tuple[Path | None, ...]
    placements: tuple[StagePlacement, ...]
    machine: Machine
    tokenizer: TextTokenizer
    vocab_size: int
    context_length: int
    eos: tuple[int, ...]

    @property
    def target_only(self) -> Hierarchy:
        """The same target where it stood, without drafts: what `greedy` loads."""
        return Hierarchy(
            self.models[-1:],
            self.folders[-1:],
            self.placements[-1:],
            self.machine,
            self.tokenizer,
            self.vocab_size,
            self.context_length,
            self.eos,
        )

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
    placements = place(models, machine)
    used = tuple(models[-1:]) if target_only else tuple(models)
    folders = tuple(None if m.emulated is not None else locate(m.path, base) for m in used)
    tokenizers = [
        load_tokenizer(locate(model.tokenizer, base) if model.tokenizer else folder)
        for model, folder in zip(used, folders, strict=True)
    ]
    check_same_tokenizer([(m.name, t) for m, t in zip(used, tokenizers, strict=True)])
    target, folder, tokenizer = used[-1], folders[-1], tokenizers[-1]
    if folder is None:
        emulated = target.emulated or {}
        vocab_size = int(emulated.get("vocab_size", tokenizer.num_ids))
        context_length, eos = int(emulated.get("context_length", 1 << 17)), tokenizer.eos_ids
    else:
        vocab_size = tokenizer.num_ids
        context_length = CheckpointShape.read(folder).context_length
        eos = eos_token_ids(folder)
    return Hierarchy(
        models=used,
        folders=folders,
        placements=tuple(placements[-len(used) :]),
        machine=machine,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        context_length=context_length,
        eos=eos,
    )
