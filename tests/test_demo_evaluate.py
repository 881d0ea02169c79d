"""The measures of the demo family: each against a slow twin that does one thing at a time."""

from __future__ import annotations

import itertools
import json
import lzma
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from pipespec.config import SamplingParams
from pipespec.data.arithmetic import arithmetic_problems
from pipespec.data.stdlib import StdlibPrompt
from pipespec.demo import evaluate, evaluation
from pipespec.demo.continuations import continue_texts, draft_ranks
from pipespec.demo.corpus import SourceFile
from pipespec.demo.measures import (
    LOOKAHEADS,
    TOP,
    Continuation,
    Round,
    distinct_ngrams,
    pass_at_k,
    rounds,
    speculation,
)
from pipespec.demo.real_text import Windows, read_text, windows, xz_figures
from pipespec.demo.tokenizer import END_OF_TEXT_ID, save_tokenizer, train_tokenizer
from pipespec.errors import UsageError
from pipespec.sampling import draw
from tests.tiny import make_tiny, one_thread

__all__ = ["one_thread"]

GREEDY = SamplingParams()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LlamaForCausalLM]:
    """Two random models; the target is the larger one."""
    folder = tmp_path_factory.mktemp("models")
    folders = {
        "draft": make_tiny(folder / "draft", seed=1, num_hidden_layers=1),
        "target": make_tiny(folder / "target", seed=2),
    }
    return {
        name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for name, path in folders.items()
    }


def random_prompts(lengths: Sequence[int]) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(1, 128) for _ in range(length)] for length in lengths]


# -- counting ---------------------------------------------------------------------------------


def test_repeated_4_grams_are_those_the_prompt_or_the_text_already_had() -> None:
    text = Continuation((1, 2, 3, 4), (1, 2, 3, 4, 5))
    assert text.repeated() == [False, False, False, True, False]


def test_distinct_4_grams_are_counted_over_all_texts() -> None:
    assert distinct_ngrams([(1, 2, 3, 4, 5), (1, 2, 3, 4, 6), (7, 8)]) == 3 / 4
    assert distinct_ngrams([(1, 1, 1, 1, 1, 1)]) == 1 / 3
    assert distinct_ngrams([(1, 2)]) is None


def test_a_round_accepts_the_run_of_agreements_and_then_corrects() -> None:
    agrees = [True, True, False, False, True, True, True, True, True]
    assert rounds(agrees, 4) == [Round(0, 2), Round(3, 0), Round(4, 4)]


@pytest.mark.parametrize(("num_samples", "k"), [(8, 1), (8, 8), (8, 3), (5, 2)])
def test_pass_at_k_is_the_share_of_k_subsets_with_a_correct_sample(
    num_samples: int, k: int
) -> None:
    for num_correct in range(num_samples + 1):
        correct = [index < num_correct for index in range(num_samples)]
        subsets = list(itertools.combinations(correct, k))
        share = sum(map(any, subsets)) / len(subsets)
        assert pass_at_k(num_samples, num_correct, k) == pytest.approx(share)


def test_speculation_is_what_counting_token_by_token_gives() -> None:
    rng = random.Random(0)
    ranks = [[rng.choice((1, 1, 1, 2, 3, 4, 5, 9)) for _ in range(60)] for _ in range(5)]
    counted = [[rng.random() < 0.9 for _ in text] for text in ranks]
    for flags, figures in (
        ([[True] * 60] * 5, speculation(ranks)),
        (counted, speculation(ranks, counted)),
    ):
        seen = [ranks[i][j] for i in range(5) for j in range(60) if flags[i][j]]
        wrong = [rank for rank in seen if rank != 1]
        assert figures.num_tokens == len(seen)
        assert figures.agreement == pytest.approx(seen.count(1) / len(seen))
        for k in TOP:
            share = sum(rank <= k for rank in wrong) / len(wrong)
            assert figures.correction_in_top[k] == pytest.approx(share)
        for k in LOOKAHEADS:
            accepted = accepted_one_by_one(ranks, flags, k)
            assert figures.num_rounds[k] == len(accepted)
            assert figures.mean_accepted[k] == pytest.approx(sum(accepted) / len(accepted))
        for place, share_there in figures.accepted_at.items():
            share = sum(count >= place for count in accepted) / len(accepted)
            assert share_there == pytest.approx(share)
        assert sum(filter(None, figures.accepted_at.values())) == pytest.approx(
            figures.mean_accepted[8]
        )


def accepted_one_by_one(
    ranks: Sequence[Sequence[int]], counted: Sequence[Sequence[bool]], lookahead: int
) -> list[int]:
    """Drafts accepted in each round, by playing every text through."""
    found: list[int] = []
    for text, flags in zip(ranks, counted):
        place = 0
        while place + lookahead < len(text):
            start, accepted = place, 0
            while accepted < lookahead and text[place] == 1:
                accepted, place = accepted + 1, place + 1
            place += 1  # the bonus or correction token
            if all(flags[start : start + lookahead]):
                found.append(accepted)
    return found


def test_where_nothing_can_be_measured_there_is_no_figure() -> None:
    figures = speculation([[1, 1, 1]])
    assert figures.agreement == 1.0
    assert figures.standard_error is None
    assert set(figures.correction_in_top.values()) == {None}
    assert set(figures.mean_accepted.values()) == {None}
    assert speculation([[1, 2]], [[False, False]]).agreement is None


# -- texts ------------------------------------------------------------------------------------


@torch.inference_mode()
def continue_slowly(
    model: LlamaForCausalLM, prompt: Sequence[int], params: SamplingParams, num_tokens: int
) -> tuple[int, ...]:
    """Without a batch, without a cache."""
    text = list(prompt)
    while len(text) < len(prompt) + num_tokens:
        logits = model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1:]
        text += draw(logits, [len(text)], params, logits.shape[1])
        if text[-1] == END_OF_TEXT_ID:
            break
    return tuple(text[len(prompt) :])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_texts_written_together_are_those_written_alone(
    models: dict[str, LlamaForCausalLM], temperature: float
) -> None:
    # More than one batch, prompts of many lengths, half of the rows with a seed of their own.
    prompts = random_prompts([3 + index % 17 for index in range(70)])
    sampling = [SamplingParams(temperature, seed=min(seed, 35)) for seed in range(70)]
    texts = continue_texts(models["target"], prompts, sampling, 24)
    for prompt, params, text in zip(prompts, sampling, texts):
        assert text.prompt == tuple(prompt)
        assert text.tokens == continue_slowly(models["target"], prompt, params, 24), params
    if temperature:
        lengths = {len(text.tokens) for text in texts}
        assert len(lengths) > 2, "some texts must end early, or ending early is not tested"


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_rank_1_is_what_the_draft_would_draw_at_that_position(
    models: dict[str, LlamaForCausalLM], temperature: float
) -> None:
    (prompt,) = random_prompts([9])
    params = SamplingParams(temperature, seed=5)
    (text,) = continue_texts(models["target"], [prompt], [params], 30)
    of_draft, of_target = draft_ranks([models["draft"], models["target"]], text, params)
    assert set(of_target) == {1}
    assert max(of_draft) > 1, "the models must differ for the test to mean anything"
    with torch.inference_mode():
        for index, rank in enumerate(of_draft):
            before = torch.tensor([text.prompt + text.tokens[:index]])
            logits = models["draft"](input_ids=before, use_cache=False).logits[0, -1:]
            ahead = 0
            while (drawn := draw(logits, [before.shape[1]], params, 128)[0]) != text.tokens[index]:
                logits[0, drawn] = -torch.inf
                ahead += 1
            assert rank == ahead + 1


def test_equal_logits_rank_by_token_id(models: dict[str, LlamaForCausalLM]) -> None:
    def constant(input_ids: torch.Tensor, use_cache: bool) -> object:
        return type("Output", (), {"logits": torch.zeros(1, input_ids.shape[1], 128)})

    ((first, seventh),) = draft_ranks([constant], Continuation((5,), (0, 6)), GREEDY)  # type: ignore[list-item]
    assert (first, seventh) == (1, 7)


# -- held-out text ----------------------------------------------------------------------------


@torch.inference_mode()
def test_reading_in_batches_finds_what_reading_token_by_token_finds(
    models: dict[str, LlamaForCausalLM],
) -> None:
    rows = torch.tensor(random_prompts([12] * 10))
    rows[3, 4:12] = rows[3, 0:4].repeat(2)  # the end of a window that repeats itself
    text = Windows(rows, num_bytes=100)
    bits, (pair,) = read_text(models, text)
    spent = dict.fromkeys(models, 0.0)
    same, overlap, clean = [], [], []
    for row in rows:
        for place in range(6, 12):
            probs = {}
            for name, model in models.items():
                logits = model(input_ids=row[None, :place], use_cache=False).logits[0, -1]
                probs[name] = torch.softmax(logits, dim=-1)
                spent[name] -= torch.log2(probs[name][row[place]]).item()
            same.append(probs["draft"].argmax().item() == probs["target"].argmax().item())
            overlap.append(torch.minimum(probs["draft"], probs["target"]).sum().item())
            ngram, before = row[place - 3 : place + 1].tolist(), row[:place].tolist()
            clean.append(all(before[i : i + 4] != ngram for i in range(place - 3)))
    for name in models:
        assert bits[name] == pytest.approx(spent[name] / 100, rel=1e-4)
    assert (pair.draft, pair.target) == ("draft", "target")
    assert not all(clean)
    assert pair.agreement == pytest.approx(sum(same) / 60)
    assert pair.overlap == pytest.approx(sum(overlap) / 60, rel=1e-4)
    num_clean = sum(clean)
    assert pair.clean_agreement == pytest.approx(sum(itertools.compress(same, clean)) / num_clean)
    assert pair.clean_overlap == pytest.approx(
        sum(itertools.compress(overlap, clean)) / num_clean, rel=1e-4
    )


def source_file(folder: Path, name: str, text: str) -> SourceFile:
    (folder / f"{name}.py").write_text(text, encoding="utf-8")
    return SourceFile(name, folder / f"{name}.py")


def program(seed: int, num_lines: int) -> str:
    rng = random.Random(seed)
    return "".join(f"v{rng.randrange(999)} = {rng.randrange(9999)}\n" for _ in range(num_lines))


def test_xz_after_the_train_text_pays_only_for_what_is_new(tmp_path: Path) -> None:
    text, unseen = program(1, 200), program(2, 200)
    file = source_file(tmp_path, "library", text)
    new = source_file(tmp_path, "new", unseen)
    seen = xz_figures(library=[file], other=[new], train=[file])
    alone = 8 * len(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    assert seen.on_library == pytest.approx(alone / len(text))
    assert seen.on_library_after_train < 0.2 * seen.on_library
    not_seen = xz_figures(library=[file], other=[new], train=[new])
    assert 0.5 * seen.on_library < not_seen.on_library_after_train < seen.on_library


# -- the command ------------------------------------------------------------------------------


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two random models with a tokenizer, and a small library of their own to be measured on."""
    held_out = [
        source_file(tmp_path, "module", program(3, 300)),
        source_file(tmp_path, "test_module", program(4, 300)),
    ]
    train = [source_file(tmp_path, "seen", program(5, 300))]
    prompts = [StdlibPrompt(f"module.f{n}", program(n, 3)) for n in range(4)]
    monkeypatch.setattr(evaluation, "held_out_files", lambda: held_out)
    monkeypatch.setattr(evaluation, "train_files", lambda: train)
    monkeypatch.setattr(evaluation, "stdlib_prompts", lambda: prompts)
    tokenizer = train_tokenizer([file.text() for file in train], 300)
    folder = tmp_path / "family"
    for name, num_layers in (("small", 1), ("large", 2)):
        make_tiny(folder / name, vocab_size=300, num_hidden_layers=num_layers, seed=num_layers)
        save_tokenizer(tokenizer, folder / name, 512)
    return folder


SMALL = ["--prompts", "3", "--tokens", "24", "--windows", "4", "--threads", "1"]
ARITHMETIC = ["--questions", "2", "--answers", "2"]


def test_the_command_measures_every_model_and_every_pair(
    family: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(family), *SMALL, *ARITHMETIC, "--temperatures", "0.8", "1", "--samples", "2"]
    assert evaluate.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [model["name"] for model in found["models"]] == ["small", "large"]
    assert found["models"][0]["pass_at"] == {"1": 0.0}
    assert [pair["temperature"] for pair in found["pairs"]] == [0.0, 0.8, 1.0]
    assert list(found["pairs"][0]["plain"]["accepted_at"]) == [str(n) for n in range(1, 9)]
    (pair,) = found["pairs_on_text"]
    assert (pair["draft"], pair["target"]) == ("small", "large")
    assert 0 < pair["overlap"] < 1
    assert [sample["name"] for sample in found["samples"]] == ["module.f0", "module.f1"]


def test_answers_are_marked_and_counted_over_questions(
    family: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(family / "small")
    answers = {
        problem.prompt: problem.answer for problem in arithmetic_problems("held-out", 4, seed=0)
    }
    hardest = list(answers)[3]

    def write(
        model: object, prompts: Sequence[Sequence[int]], sampling: Sequence[SamplingParams], _: int
    ) -> list[Continuation]:
        """Answers every question but one, in two samples of eight; else says little."""
        texts = []
        for prompt, params in zip(prompts, sampling):
            asked = tokenizer.decode(prompt)
            knows = asked in answers and asked != hardest and params.seed in (1, 5)
            answer = f" {answers[asked]}\n#### 0" if knows else " 1 + 1 = 2 and so on"
            texts.append(Continuation(tuple(prompt), tuple(tokenizer(answer)["input_ids"])))
        return texts

    monkeypatch.setattr(evaluation, "continue_texts", write)
    assert evaluate.main([str(family), *SMALL, "--questions", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["models"][0]["pass_at"] == pytest.approx({"1": 3 / 4 * 2 / 8, "8": 3 / 4})


def test_tables_fit_80_columns_and_show_the_samples(
    family: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("small", "large"):
        (family / name).rename(family / f"{name}-12.5M")
    assert evaluate.main([str(family), *SMALL, "--questions", "0", "--samples", "1"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert "…" not in shown, "no figure is cut off"
    assert shown.count("small-12.5M -> large-12.5M") == 3
    assert "greedy, no repeat" in shown
    assert "module.f0" in shown


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "DIR"),
        (["no/such/folder"], "no/such/folder"),
        (["x", "--prompts", "0"], "--prompts"),
        (["x", "--questions", "-1"], "--questions"),
        (["x", "--samples", "41"], "--samples"),
        (["x", "--temperatures", "0"], "--temperatures"),
        (["x", "--temperatures", "nan"], "--temperatures"),
        (["x", "--tokens", "many"], "--tokens"),
        (["x", "--threads", "99999999999"], "--threads"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line


def test_too_little_held_out_text_is_said(family: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(family / "small")
    with pytest.raises(UsageError, match="held-out tokens of one kind, fewer than a window of 64"):
        windows(tokenizer, [source_file(tmp_path, "short", "x = 1\n")], 4, 64)


def test_windows_count_the_bytes_of_their_second_halves(family: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(family / "small")
    file = source_file(tmp_path, "letters", "naïve = 'ä'\n" * 40)
    found = windows(tokenizer, [file], 5, 32)
    halves = [tokenizer.decode(row, skip_special_tokens=True) for row in found.tokens[:, 16:]]
    assert found.tokens.shape == (5, 32)
    cut = sum(half.count("\N{REPLACEMENT CHARACTER}") for half in halves)
    lost = 2 * cut  # a replacement character has three bytes, half an ä has one
    assert found.num_bytes == sum(len(half.encode()) for half in halves) - lost
