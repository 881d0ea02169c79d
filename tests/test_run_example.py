"""One sample on the terminal: its text on standard output as it comes, all else on stderr."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from emulated import write_emulated, write_prompts

from pipespec import run_example

STRATEGIES = ("greedy", "chain", "async-chain")


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    """Two emulated models and two prompts."""
    data = write_prompts(tmp_path, ["def mean(values):\n", "[bold]class[/bold]"])
    config = write_emulated(tmp_path)
    return ["--models-config-path", config, "--dataset", data, "--max-new-tokens", "20"]


def shown(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """Runs the command; what it wrote to standard output and to stderr."""
    capsys.readouterr()
    assert run_example.main(arguments) == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_every_strategy_writes_the_same_text_after_the_prompt(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {}
    for strategy in STRATEGIES:
        texts[strategy], told = shown([*flags, "--strategy", strategy], capsys)
        assert told.splitlines()[0].startswith(f"{strategy}: loading ")
        summary = told.splitlines()[-1]
        assert summary.startswith(f"{strategy}: 20 tokens (length), ")
        assert ("acceptance rate" in summary) is (strategy != "greedy")
    assert texts["greedy"] == texts["chain"] == texts["async-chain"]
    assert texts["greedy"].startswith("def mean(values):\n")
    assert len(texts["greedy"]) > len("def mean(values):\n") + 5


def test_the_prompt_is_a_sample_or_the_users_own_text(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    greedy = [*flags, "--strategy", "greedy"]
    second, _ = shown([*greedy, "--sample-index", "1"], capsys)
    own, _ = shown([*greedy[:2], *greedy[4:], "--prompt", "[bold]class[/bold]"], capsys)
    assert second.startswith("[bold]class[/bold]")
    assert own == second


def test_text_is_written_piece_by_piece(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Recorder:
        """A standard output that remembers each piece and when it was flushed."""

        encoding = "utf-8"
        pieces: list[str] = []  # noqa: RUF012

        def write(self, text: str) -> int:
            self.pieces.append(text)
            return len(text)

        def flush(self) -> None:
            self.pieces.append("flush")

        def isatty(self) -> bool:
            return False

    monkeypatch.setattr(sys, "stdout", Recorder())
    assert run_example.main([*flags, "--strategy", "greedy"]) == 0
    assert Recorder.pieces.count("flush") > 10


def test_a_text_ends_before_a_stop_text(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    whole, _ = shown([*flags, "--strategy", "chain"], capsys)
    text = whole.removeprefix("def mean(values):\n").rstrip("\n")
    stop = next(character for character in text[3:] if character.isascii())
    cut, told = shown([*flags, "--strategy", "chain", "--stop", stop], capsys)
    assert cut == f"def mean(values):\n{text[: text.index(stop)]}\n"
    assert "(stop)" in told
