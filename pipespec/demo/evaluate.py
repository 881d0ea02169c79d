"""`python -m pipespec.demo.evaluate DIR`: what a demo family is worth on text it has not seen.

Weak models loop, and a loop is easy to predict: agreement on greedy text is therefore given for all
of it and for the part that repeats no 4-gram. Models run in float32, which is not what every engine
runs them in. The held-out modules are those of the running interpreter.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from pipespec.data.stdlib import stdlib_prompts
from pipespec.demo.corpus import held_out_files, is_table_module, is_test_module
from pipespec.demo.measures import (
    Continuation,
    accepted_per_round,
    agreement,
    bits_and_choices,
    greedy,
)
from pipespec.demo.tokenizer import END_OF_TEXT_ID
from pipespec.errors import ModelLoadError, PipeSpecError, UsageError


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """How much is measured; a window's first half is context, its second half is scored."""

    num_prompts: int = 40
    num_tokens: int = 96
    num_windows: int = 128
    window_length: int = 512


@dataclass(frozen=True, slots=True)
class ModelFigures:
    """One model alone: size, and bits per byte on held-out library modules and on the others."""

    name: str
    num_parameters: int
    library_bits_per_byte: float
    other_bits_per_byte: float
    repeated_share: float


@dataclass(frozen=True, slots=True)
class PairFigures:
    """A draft against a target, on the target's greedy text and on held-out library text.

    `standard_error` is that of `agreement` over prompts; it says nothing about training seeds.
    """

    draft: str
    target: str
    agreement: float
    standard_error: float
    clean_agreement: float
    real_text_agreement: float
    accepted_at_4: float
    accepted_at_8: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Everything that is printed, and under which conditions."""

    python: str
    settings: EvaluationSettings
    num_scored_bytes: int
    models: tuple[ModelFigures, ...]
    pairs: tuple[PairFigures, ...]


def evaluate(folder: Path, settings: EvaluationSettings) -> Evaluation:
    """Measure every model folder under `folder`, and every smaller model against every larger."""
    tokenizer, models = _load(folder)
    names = sorted(models, key=lambda name: models[name].num_parameters())
    library, library_bytes = _windows(tokenizer, True, settings)
    other, other_bytes = _windows(tokenizer, False, settings)
    prompts = [
        tokenizer(prompt.text)["input_ids"] for prompt in stdlib_prompts()[: settings.num_prompts]
    ]
    figures: list[ModelFigures] = []
    pairs: list[PairFigures] = []
    choices: dict[str, torch.Tensor] = {}
    for place, name in enumerate(names):
        bits, choices[name] = bits_and_choices(models[name], library, library.shape[1] // 2)
        other_bits, _ = bits_and_choices(models[name], other, other.shape[1] // 2)
        texts = [greedy(models[name], prompt, settings.num_tokens) for prompt in prompts]
        figures.append(
            ModelFigures(
                name=name,
                num_parameters=models[name].num_parameters(),
                library_bits_per_byte=bits / library_bytes,
                other_bits_per_byte=other_bits / other_bytes,
                repeated_share=fmean(flag for text in texts for flag in text.repeated()),
            )
        )
        for draft in names[:place]:
            real = (choices[draft] == choices[name]).float().mean().item()
            pairs.append(_pair(draft, name, models[draft], texts, real))
    return Evaluation(
        python=platform.python_version(),
        settings=settings,
        num_scored_bytes=library_bytes + other_bytes,
        models=tuple(figures),
        pairs=tuple(pairs),
    )


def _pair(
    draft_name: str,
    target_name: str,
    draft: LlamaForCausalLM,
    texts: Sequence[Continuation],
    real_text_agreement: float,
) -> PairFigures:
    agrees = [agreement(draft, text) for text in texts]
    by_prompt = torch.tensor([fmean(flags) for flags in agrees])
    clean = [
        flag
        for flags, text in zip(agrees, texts, strict=True)
        for flag, repeated in zip(flags, text.repeated(), strict=True)
        if not repeated
    ]

    def accepted(lookahead: int) -> float:
        rounds = [n for flags in agrees for n in accepted_per_round(flags, lookahead)]
        return fmean(rounds) if rounds else 0.0

    spread = by_prompt.std().item() if len(by_prompt) > 1 else float("nan")
    return PairFigures(
        draft=draft_name,
        target=target_name,
        agreement=fmean(flag for flags in agrees for flag in flags),
        standard_error=spread / len(by_prompt) ** 0.5,
        clean_agreement=fmean(clean) if clean else 0.0,
        real_text_agreement=real_text_agreement,
        accepted_at_4=accepted(4),
        accepted_at_8=accepted(8),
    )


def _load(folder: Path) -> tuple[PreTrainedTokenizerFast, dict[str, LlamaForCausalLM]]:
    folders = sorted(path.parent for path in folder.glob("*/config.json"))
    if not folders:
        raise UsageError(
            f"{folder} holds no model folders; name the folder that --out of "
            "pipespec.demo.train wrote"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folders[0])
        models = {
            path.name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            for path in folders
        }
    except (OSError, ValueError) as error:
        first_line = str(error).partition("\n")[0]
        raise ModelLoadError(f"cannot load the models in {folder}: {first_line}") from error
    return tokenizer, models


def _windows(
    tokenizer: PreTrainedTokenizerFast, library: bool, settings: EvaluationSettings
) -> tuple[torch.Tensor, int]:
    """Windows spread evenly over the held-out modules, and the bytes of their scored halves."""
    tokens: list[int] = []
    for file in held_out_files():
        is_other = is_test_module(file.module_name) or is_table_module(file.module_name)
        if is_other != library:
            tokens += [*tokenizer(file.text(), verbose=False)["input_ids"], END_OF_TEXT_ID]
    length = settings.window_length
    starts = torch.linspace(0, len(tokens) - length, settings.num_windows).long().tolist()
    windows = torch.tensor([tokens[start : start + length] for start in starts])
    # In a byte-level vocabulary every character of an entry stands for one byte.
    entries = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = set(tokenizer.all_special_ids)
    num_bytes = torch.tensor([0 if i in special else len(entry) for i, entry in enumerate(entries)])
    return windows, int(num_bytes[windows[:, length // 2 :]].sum())


def _tables(evaluation: Evaluation) -> tuple[Table, Table]:
    alone = Table(title="models, on held-out text", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("model", "parameters", "bits/byte library", "bits/byte other", "repeated"):
        alone.add_column(heading, justify="left" if heading == "model" else "right")
    for m in evaluation.models:
        alone.add_row(
            m.name,
            f"{m.num_parameters:,}",
            f"{m.library_bits_per_byte:.3f}",
            f"{m.other_bits_per_byte:.3f}",
            f"{m.repeated_share:.2f}",
        )
    together = Table(
        title="draft -> target: agreement, and mean accepted at lookahead k",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for heading in ("pair", "agree (SE)", "no repeat", "real text", "k=4", "k=8"):
        together.add_column(heading, justify="left" if heading == "pair" else "right", no_wrap=True)
    for p in evaluation.pairs:
        together.add_row(
            f"{p.draft} -> {p.target}",
            f"{p.agreement:.3f} ({p.standard_error:.3f})",
            f"{p.clean_agreement:.3f}",
            f"{p.real_text_agreement:.3f}",
            f"{p.accepted_at_4:.2f}",
            f"{p.accepted_at_8:.2f}",
        )
    return alone, together


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    defaults = EvaluationSettings()
    parser = argparse.ArgumentParser(
        prog="python -m pipespec.demo.evaluate",
        description="Measure a demo family on the standard library's held-out modules.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of the model folders")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--prompts", type=int, default=defaults.num_prompts)
    parser.add_argument("--tokens", type=int, default=defaults.num_tokens)
    parser.add_argument("--windows", type=int, default=defaults.num_windows)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    transformers_logging.disable_progress_bar()
    try:
        for flag in ("prompts", "tokens", "windows", "threads"):
            if getattr(options, flag) < 1:
                raise UsageError(f"--{flag} is {getattr(options, flag)}; give at least 1")
        torch.set_num_threads(options.threads)
        settings = EvaluationSettings(options.prompts, options.tokens, options.windows)
        evaluation = evaluate(options.folder, settings)
    except PipeSpecError as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", markup=False)
        return error.exit_code
    if options.json:
        sys.stdout.write(json.dumps(asdict(evaluation), indent=2) + "\n")
    else:
        console = Console()
        for table in _tables(evaluation):
            console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
