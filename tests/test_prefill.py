"""Prompts that are cut to a number of tokens: what goes, what stays, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from emulated import write_emulated, write_prompts
from hypothesis import given
from hypothesis import strategies as st

from pipespec import benchmark, plan, run_example
from pipespec.data import Sample, Span, Turn, shortened
from pipespec.data.prompts import basic_text
from pipespec.errors import DataError
from pipespec.results import load_results


def words(sample: Sample) -> int:
    """A token is a word."""
    return len((sample.text or basic_text(sample.messages or ())).split())


def test_a_document_loses_its_end_and_the_instruction_nothing() -> None:
    text = "Summarize:\none two three four five six\nIn short:"
    sample = Sample(3, text=text, document=Span(11, text.index("\nIn")))
    short, num_lost = shortened(sample, 6, words)
    assert short == Sample(3, text="Summarize:\none two three \nIn short:")
    assert num_lost == len("four five six")


def test_what_fits_is_left_alone() -> None:
    sample = Sample(0, text="one two", document=Span(4, 7))
    assert shortened(sample, 2, words) == (sample, 0)


def test_a_conversation_without_a_document_loses_the_end_of_its_longest_turn() -> None:
    long = " ".join(["word"] * 50)
    turns = (Turn("system", "Be brief."), Turn("user", long), Turn("assistant", "Ok."))
    short, _ = shortened(Sample(0, messages=turns), 20, words)
    assert short.messages is not None
    assert words(short) == 20
    assert (short.messages[0], short.messages[2]) == (turns[0], turns[2])
    assert long.startswith(short.messages[1].content)


def test_an_instruction_that_does_not_fit_is_refused() -> None:
    sample = Sample(0, text="Do this with it: x", document=Span(17, 18))
    with pytest.raises(DataError, match="is 4 tokens without any of its document"):
        shortened(sample, 3, words)


@given(st.text(max_size=200), st.integers(0, 30), st.integers(0, 30), st.integers(1, 60))
def test_as_much_is_kept_as_fits(document: str, before: int, after: int, limit: int) -> None:
    def count(sample: Sample) -> int:
        return len((sample.text or "").encode("utf-8", "surrogatepass"))

    text = "<" * before + document + ">" * after
    sample = Sample(0, text=text, document=Span(before, before + len(document)))
    if before + after > limit:
        if count(sample) > limit:
            with pytest.raises(DataError):
                shortened(sample, limit, count)
        return
    short, num_lost = shortened(sample, limit, count)
    assert short.text is not None
    assert count(short) <= limit
    kept = short.text[before : len(short.text) - after]
    assert short.text == "<" * before + kept + ">" * after
    assert document.startswith(kept)
    assert len(kept) + num_lost == len(document)
    if num_lost:  # one character more would be too much
        more = document[: len(kept) + 1]
        assert count(Sample(0, text="<" * before + more + ">" * after)) > limit


# -- the commands -----------------------------------------------------------------------------


def flags(folder: Path, *rows: dict[str, object], **target: object) -> list[str]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = write_emulated(folder, **target)
    return [
        *("--models-config-path", config, "--dataset", f"xsum={path}"),
        *("--strategy", "greedy", "--max-new-tokens", "4"),
    ]


def test_the_example_shows_the_cut_prompt_and_says_what_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row: dict[str, object] = {"document": "abcdefghij" * 30}
    assert run_example.main([*flags(tmp_path, row), "--prefill", "100"]) == 0
    shown = capsys.readouterr()
    prompt = shown.out[:100]
    assert prompt.startswith(
        "user: Say in one sentence what this news article is about.\n\nabcdefg"
    )
    assert prompt.endswith("\nassistant: ")
    kept = prompt.count("abcdefghij") * 10
    assert "prompt 0 cut to at most 100 tokens (--prefill): " in shown.err
    assert 300 - kept - 10 <= int(shown.err.split("(--prefill): ")[1].split()[0]) <= 300 - kept


def test_by_default_the_example_leaves_room_for_the_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row: dict[str, object] = {"document": "abcdefghij" * 90}
    assert run_example.main(flags(tmp_path, row, context_length=200)) == 0
    shown = capsys.readouterr().err
    assert "prompt 0 cut to at most 196 tokens (--prefill)" in shown
    assert "4 tokens (length)" in shown


def test_a_benchmark_records_a_prefill_and_only_that(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict[str, object]] = [{"document": "short"}, *[{"document": "long " * 40}] * 2]
    run = [*flags(tmp_path, *rows), "--output-dir", str(tmp_path / "results")]
    assert benchmark.main([*run, "--prefill", "90"]) == 0
    assert "note: 2 of 3 prompts cut to at most 90 tokens (--prefill)" in capsys.readouterr().out
    (path,) = (tmp_path / "results").glob("*.json")
    stored = load_results(path)
    assert stored.metadata["prefill"] == 90
    assert max(len(result["input_text"]) for result in stored.results) == 90
    assert benchmark.main(run) == 2  # other prompts: not the same run
    assert "prefill (90 there, none now)" in capsys.readouterr().err
    assert benchmark.main([*run, "--force"]) == 0
    assert load_results(path).metadata["prefill"] is None


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--prefill", "0"], "--prefill is 0; it must be at least 1 token"),
        (["--prefill", "300"], "--prefill is 300, more than the 256 tokens of target's context"),
        (["--prefill", "60"], "tokens without any of its document or text, more than --prefill 60"),
        (["--prefill", "many"], "--prefill: invalid int value: 'many'"),
    ],
)
def test_a_wrong_prefill_is_answered_by_one_line(
    more: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*flags(tmp_path, {"document": "words " * 40}, context_length=256), *more]
    for main in (run_example.main, benchmark.main):
        assert main(given) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert complaint in lines[0]


def test_without_the_flag_a_benchmark_says_how_to_shorten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = flags(tmp_path, {"document": "words " * 90}, context_length=256)
    assert benchmark.main(long) == 2
    assert "cut it with --prefill N" in capsys.readouterr().err


def test_the_users_own_prompt_is_cut_as_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = flags(tmp_path, {"document": "x"})
    del given[2:4]
    assert run_example.main([*given, "--prompt", "0123456789", "--prefill", "4"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("0123")
    assert "456789" not in shown.out
    assert "prompt 0 cut to at most 4 tokens (--prefill): 6 characters are left out" in shown.err


def test_plain_text_loses_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = flags(tmp_path, {"document": "x"})
    given[3] = write_prompts(tmp_path, ["def mean(values):\n"])
    assert run_example.main([*given, "--prefill", "8"]) == 0
    assert capsys.readouterr().out.startswith("def mean")


def test_a_plan_is_run_on_the_same_prompts(tmp_path: Path) -> None:
    options = plan.make_parser().parse_args(
        [*flags(tmp_path, {"document": "x"})[:4], "--prefill", "90"]
    )
    words = plan._text_flags(options, plan._read_settings(options))
    assert words[words.index("--prefill") + 1] == "90"
