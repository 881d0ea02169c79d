"""One sample on the terminal: its text on standard output as it comes, all else on stderr."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from emulated import write_emulated, write_prompts
from rich.console import Console

from pipespec import GenerationParams, load, run_example
from pipespec.commands.acceptance import AcceptanceView, painter
from pipespec.config import Schedule
from pipespec.metrics import Origin, StageCounts, token_origins, verification_origins
from pipespec.tokenizer import TextTokenizer, load_tokenizer

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


# -- which tokens a draft wrote ---------------------------------------------------------------

A, C, B, U = Origin.ACCEPTED, Origin.CORRECTION, Origin.BONUS, Origin.UNDRAFTED


@pytest.mark.parametrize(
    ("offered", "accepted", "emitted", "origins"),
    [
        (3, 3, 4, [A, A, A, B]),
        (3, 1, 2, [A, C]),
        (3, 0, 1, [C]),
        (3, 2, 2, [A, A]),  # the text ended with an accepted token
        (0, 0, 1, [U]),
        (2, 0, 0, []),
    ],
)
def test_a_verifications_tokens_are_told_apart(
    offered: int, accepted: int, emitted: int, origins: list[Origin]
) -> None:
    assert verification_origins(offered, accepted, emitted) == origins


def test_tokens_before_the_first_verification_are_the_targets_own() -> None:
    assert token_origins(3, [(2, 1, 2)]) == [U, A, C]
    assert token_origins(1, [(2, 1, 2)]) == [C]  # what is known already is not told again
    assert token_origins(2, []) == [U, U]


@pytest.mark.parametrize("num_models", [2, 3])
@pytest.mark.parametrize("strategy", ["chain", "async-chain"])
def test_what_is_told_while_tokens_come_is_what_the_target_counted(
    strategy: str, num_models: int, tmp_path: Path
) -> None:
    told: list[tuple[int, Origin]] = []
    calls = 0

    def on_tokens(tokens: Sequence[int], origins: Sequence[Origin]) -> None:
        nonlocal calls
        calls += 1
        told.extend(zip(tokens, origins, strict=True))

    # With a lookahead, the target uses its drafts however busy the machine is.
    config, schedule = write_emulated(tmp_path, num_models), Schedule(lookahead=2)
    with load(config, strategy, schedule) as decoder:
        output = decoder.generate("def f(", GenerationParams(60), on_tokens=on_tokens)
    counts = StageCounts.from_values(output.counts[-1])
    steps = zip(counts.offered, counts.accepted, counts.emitted, strict=True)
    assert tuple(token for token, _ in told) == output.token_ids
    assert [origin for _, origin in told] == token_origins(60, steps)
    assert sum(origin is A for _, origin in told) == counts.num_accepted > 10
    assert calls > 3


@pytest.mark.parametrize("strategy", ["chain", "async-chain"])
def test_marks_tell_tokens_apart_where_there_are_no_colours(
    strategy: str, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    plain, _ = shown([*flags, "--strategy", "greedy"], capsys)
    marked, told = shown([*flags, "--strategy", strategy, "--show-acceptance"], capsys)
    legend, text = marked.split("\n\n", 1)
    assert legend == "drafted, accepted  [!correction!]  [+bonus+]  [.no draft.]"
    assert re.sub(r"\[([!+.])(.*?)\1\]", r"\2", text, flags=re.DOTALL) == plain
    summary = told.splitlines()[-1]
    assert summary.startswith("20 tokens: ")
    numbers = [int(number) for number in re.findall(r"\d+", summary)]
    assert sum(numbers[1:]) == 20
    assert "accepted" in summary


def shown_by(
    tokens: str, origins: Sequence[Origin], pieces: Sequence[str], console: Console | None = None
) -> str:
    """What a view writes of tokens that come together and of text that becomes certain later."""
    written: list[str] = []
    tokenizer: TextTokenizer = load_tokenizer(None)  # a token is a byte
    paint = painter(console or Console(file=io.StringIO()))
    view = AcceptanceView(tokenizer, paint, written.append)
    view.on_tokens(tokenizer.encode(tokens), origins)
    for piece in pieces:
        view.on_text(piece)
    return "".join(written)


def test_text_that_comes_late_keeps_the_origins_of_its_tokens() -> None:
    assert shown_by("abcd", [A, A, C, B], ["a", "bc", "d"]) == "ab[!c!][+d+]"
    assert shown_by("abcd", [C, A, A, B], ["abc"]) == "[!a!]bc"  # a stop text swallowed the rest


def test_a_character_of_several_tokens_belongs_to_the_last() -> None:
    assert shown_by("\u00e9x", [A, C, A], ["\u00e9x"]) == "[!\u00e9!]x"


def test_half_a_character_at_the_end_belongs_to_the_last_token() -> None:
    assert shown_by("ab", [A, C], ["ab", "\ufffd"]) == "a[!b!][!\ufffd!]"


@pytest.mark.parametrize(
    ("environment", "has_colours"),
    [
        ({"TERM": "xterm-256color"}, True),
        ({"TERM": "xterm-256color", "NO_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
    ],
)
def test_a_terminal_shows_colours_unless_told_otherwise(
    environment: dict[str, str], has_colours: bool
) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, _environ=environment)
    text = shown_by("ab\nc", [A, C, C, B], ["ab\nc"], console)
    assert ("\x1b[" in text) is has_colours
    assert ("[!" in text) is not has_colours
    if has_colours:
        assert re.sub(r"\x1b\[[0-9;]*m", "", text) == "ab \nc"  # a corrected line's end shows
        assert "\n\x1b" in text or "\x1b[0m\n" in text  # no background runs to the margin


def test_colours_come_while_the_text_is_written(tmp_path: Path) -> None:
    config = write_emulated(tmp_path, target_ms=20.0)
    flags = ["--prompt", "x", "--models-config-path", config, "--strategy", "chain"]
    command = [sys.executable, "-m", "pipespec.run_example", "--show-acceptance", *flags]
    environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    terminal, end = pty.openpty()
    try:
        with subprocess.Popen(
            [*command, "--max-new-tokens", "40"],
            stdout=end,
            stderr=subprocess.DEVNULL,
            env={**environment, "TERM": "xterm-256color"},
        ) as process:
            try:
                os.close(end)
                pieces = []
                while select.select([terminal], [], [], 30.0)[0]:
                    try:
                        pieces.append(os.read(terminal, 4096))
                    except OSError:  # how Linux says that nobody writes any more
                        break
                assert process.wait(30.0) == 0
            finally:
                process.kill()
    finally:
        os.close(terminal)
    styled = [piece for piece in pieces if b"\x1b[" in piece]
    assert len(styled) > 5  # the target needs 20 ms a forward, so they came apart
    assert b"[!" not in b"".join(pieces)


def test_greedy_has_no_acceptance_to_show(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_example.main([*flags, "--strategy", "greedy", "--show-acceptance"]) == 2
    assert "--show-acceptance is for chain and async-chain" in capsys.readouterr().err


# -- how a prompt is written ------------------------------------------------------------------


def test_the_basic_template_writes_a_conversation_as_text(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [("system", "Be brief."), ("user", "Hi."), ("assistant", "Yes?"), ("user", "Why?")]
    row = {"conversation": [{"role": role, "content": content} for role, content in turns]}
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps(row))
    chat = [*flags[:2], "--dataset", str(path), *flags[4:], "--strategy", "greedy"]
    text, _ = shown([*chat, "--use-basic-template"], capsys)
    assert text.startswith("SYSTEM: Be brief.\nUSER: Hi.\nASSISTANT: Yes?\nUSER: Why?\nASSISTANT:")
    text, _ = shown([*chat, "--use-basic-template", "--no-generation-prompt"], capsys)
    assert not text.startswith("SYSTEM: Be brief.\nUSER: Hi.\nASSISTANT: Yes?\nUSER: Why?\nASSIST")
    _, told = shown([*flags, "--strategy", "greedy", "--use-basic-template"], capsys)
    assert "note: --use-basic-template changes nothing: prompts is plain text" in told


def test_a_model_without_a_chat_template_gets_the_basic_one(
    flags: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("pipespec.tokenizer.plain.ByteTokenizer.has_chat_template", False)
    path = tmp_path / "xsum.jsonl"
    path.write_text('{"document": "It rained."}')
    flags[3] = f"xsum={path}"
    text, told = shown([*flags, "--strategy", "greedy"], capsys)
    assert text.startswith("USER: Say in one sentence")
    assert "\n\nIt rained.\nASSISTANT:" in text
    assert "target has no chat template: turns are written as USER: and ASSISTANT:" in told


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--sample-index", "2"], "--sample-index is 2, but"),
        (["--sample-index", "-1"], "--sample-index is -1; it must be 0 or more"),
        (["--prompt", "x"], "--prompt and --dataset exclude each other"),
    ],
)
def test_a_wrong_choice_of_prompt_is_answered_by_one_line(
    more: list[str], complaint: str, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_example.main([*flags, *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line


def test_the_users_own_prompt_is_fed_as_it_stands(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    own = [*flags[:2], *flags[4:], "--prompt", "x", "--use-basic-template"]
    assert run_example.main(own) == 2
    assert "--use-basic-template is for conversations" in capsys.readouterr().err


def test_samples_before_the_one_that_is_wanted_need_not_fit(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags[3] = write_prompts(tmp_path, ["long " * 2000, "short"])
    text, told = shown([*flags, "--strategy", "greedy", "--sample-index", "1"], capsys)
    assert text.startswith("short")
    assert "cut" not in told
