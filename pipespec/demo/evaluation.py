"""What a demo family is worth on text it has not seen: the work of `pipespec.demo.evaluate`.

Weak models loop, and a loop is easy to predict: every figure about a pair is therefore given for
all of the text and for the part that repeats no 4-gram. Models run in float32, which is not what
every engine runs them in. The held-out modules are those of the running interpreter; arithmetic
questions are generated, and held out by the numbers in them.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from pipespec.config import SamplingParams
from pipespec.data.arithmetic import arithmetic_problems, is_correct
from pipespec.data.stdlib import stdlib_prompts
from pipespec.demo.continuations import continue_texts, draft_ranks
from pipespec.demo.corpus import held_out_files, is_library_module, train_files
from pipespec.demo.figures import (
    PASS_AT,
    Evaluation,
    EvaluationSettings,
    ModelFigures,
    PairFigures,
    TextSample,
)
from pipespec.demo.measures import Continuation, distinct_ngrams, mean, pass_at_k, speculation
from pipespec.demo.progress import Progress, Report
from pipespec.demo.real_text import read_text, windows, xz_figures
from pipespec.errors import ModelLoadError, UsageError

Models = Mapping[str, LlamaForCausalLM]


def evaluate(
    folder: Path, settings: EvaluationSettings, num_threads: int | None, report: Report
) -> Evaluation:
    """Measure every model folder under `folder`, and every smaller model against every larger.
    num_threads: None leaves the number to torch."""
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    transformers_logging.disable_progress_bar()
    tokenizer, models = _load(folder)
    num_parts = 2 + len(models) * (2 + len(settings.temperatures))
    parts = iter(range(1, num_parts + 1))

    def done(part: str) -> None:
        report(Progress("evaluation", next(parts), num_parts, part))

    files = held_out_files()
    library = [file for file in files if is_library_module(file.module_name)]
    other = [file for file in files if not is_library_module(file.module_name)]
    library_windows, other_windows = (
        windows(tokenizer, kind, settings.num_windows, settings.window_length)
        for kind in (library, other)
    )
    library_bits, pairs_on_text = read_text(models, library_windows)
    other_bits, _ = read_text(models, other_windows)
    done("held-out text")
    xz = xz_figures(library, other, train_files())
    done("xz")

    prompts = stdlib_prompts()[: settings.num_prompts]
    prompt_ids: list[list[int]] = [tokenizer(prompt.text)["input_ids"] for prompt in prompts]
    figures: list[ModelFigures] = []
    pairs: list[PairFigures] = []
    greedy: list[Continuation] = []
    for place, (name, model) in enumerate(models.items()):
        drafts = dict(list(models.items())[:place])
        for temperature in (0.0, *settings.temperatures):
            sampling = [SamplingParams(temperature, seed=seed) for seed in range(len(prompts))]
            texts = continue_texts(model, prompt_ids, sampling, settings.num_tokens)
            pairs += _pairs(drafts, name, texts, sampling)
            done(f"{name} at temperature {temperature:g}")
            if temperature == 0.0:
                greedy = texts
        figures.append(
            ModelFigures(
                name=name,
                num_parameters=model.num_parameters(),
                library_bits_per_byte=library_bits[name],
                other_bits_per_byte=other_bits[name],
                distinct_4grams=distinct_ngrams(text.tokens for text in greedy),
                repeated_share=mean(flag for text in greedy for flag in text.repeated()),
                pass_at=_pass_at(model, tokenizer, settings),
            )
        )
        done(f"{name} at arithmetic")
    return Evaluation(
        python=platform.python_version(),
        settings=settings,
        num_scored_bytes=library_windows.num_bytes + other_windows.num_bytes,
        models=tuple(figures),
        xz=xz,
        pairs=tuple(pairs),
        pairs_on_text=tuple(pairs_on_text),
        samples=tuple(
            TextSample(prompt.name, prompt.text, tokenizer.decode(text.tokens))
            for prompt, text in list(zip(prompts, greedy, strict=True))[: settings.num_samples]
        ),
    )


def _pairs(
    drafts: Models, target: str, texts: Sequence[Continuation], sampling: Sequence[SamplingParams]
) -> list[PairFigures]:
    """Each draft on texts of the target."""
    ranks = [
        draft_ranks(list(drafts.values()), text, params)
        for text, params in zip(texts, sampling, strict=True)
    ]
    clean = [[not flag for flag in text.repeated()] for text in texts]
    figures: list[PairFigures] = []
    for place, draft in enumerate(drafts):
        by_text = [of_drafts[place] for of_drafts in ranks]
        plain, not_repeated = speculation(by_text), speculation(by_text, clean)
        figures.append(PairFigures(draft, target, sampling[0].temperature, plain, not_repeated))
    return figures


def _pass_at(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, settings: EvaluationSettings
) -> dict[int, float | None]:
    """pass@k on held-out arithmetic, of the k there are answers enough for."""
    problems = arithmetic_problems("held-out", settings.num_questions, seed=0)
    prompts: list[list[int]] = [tokenizer(problem.prompt)["input_ids"] for problem in problems]
    num_correct = [0] * len(problems)
    for seed in range(settings.num_answers):
        sampling = [SamplingParams(settings.answer_temperature, seed=seed)] * len(problems)
        texts = continue_texts(model, prompts, sampling, settings.answer_tokens)
        for index, (problem, text) in enumerate(zip(problems, texts, strict=True)):
            answer = tokenizer.decode(text.tokens, skip_special_tokens=True)
            num_correct[index] += is_correct(problem, answer)
    return {
        k: mean(pass_at_k(settings.num_answers, correct, k) for correct in num_correct)
        for k in PASS_AT
        if k <= settings.num_answers
    }


def _load(folder: Path) -> tuple[PreTrainedTokenizerFast, dict[str, LlamaForCausalLM]]:
    """The tokenizer, and the models by name, smallest first."""
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
    return tokenizer, dict(sorted(models.items(), key=lambda item: item[1].num_parameters()))
