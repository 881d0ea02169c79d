"""Data sets: what a name means, what a row means, and one clear line for everything else."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipespec.data import BUILT_IN, Sample, Turn, load_dataset, prompt_ids, prompt_text
from pipespec.data import hub as hub_module
from pipespec.data.hub import HubSource, read_hub
from pipespec.data.registry import digest
from pipespec.errors import DataError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One and one?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "And one?"},
    {"role": "assistant", "content": "Three."},
]


class FakeTokenizer:
    """Characters are ids; 1 begins a text; the chat template writes it as `^`."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = [1 if char == "^" else ord(char) for char in text]
        return [1, *ids] if add_special_tokens else ids

    def render_chat(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool
    ) -> str:
        turns = "".join(f"<{turn['role']}>{turn['content']}" for turn in messages)
        return "^" + turns + ("<assistant>" if add_generation_prompt else "")


def write_lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def error_of(name: str | Path, num_samples: int | None = None) -> str:
    with pytest.raises(DataError) as caught:
        load_dataset(str(name), num_samples)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- what a row means -------------------------------------------------------------------------


def test_a_prompt_a_question_and_a_text_are_each_the_prompt(tmp_path: Path) -> None:
    rows = ({"question": "q", "answer": "a"}, {"text": "t"}, {"prompt": "p", "text": "no"})
    data = load_dataset(str(write_lines(tmp_path / "mixed.jsonl", *rows)))
    assert [sample.text for sample in data.samples] == ["q", "t", "p"]
    assert [sample.index for sample in data.samples] == [0, 1, 2]
    assert data.name == "mixed"


def test_a_conversation_is_cut_before_the_last_assistant_turn(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "chat.jsonl", {"conversation": CONVERSATION})
    (sample,) = load_dataset(str(path)).samples
    assert sample.messages is not None
    assert [turn.content for turn in sample.messages] == [
        "Be brief.",
        "One and one?",
        "Two.",
        "And one?",
    ]


def test_a_conversation_that_waits_for_a_reply_is_kept_whole(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "chat.jsonl", {"conversation": CONVERSATION[:4]})
    (sample,) = load_dataset(str(path)).samples
    assert sample.messages is not None
    assert sample.messages[-1] == Turn("user", "And one?")


def test_a_text_gets_a_begin_of_text_token_and_a_conversation_its_templates_only() -> None:
    tokenizer = FakeTokenizer()
    assert prompt_ids(Sample(0, text="ab"), tokenizer) == [1, ord("a"), ord("b")]
    chat = Sample(0, messages=(Turn("user", "x"),))
    assert prompt_ids(chat, tokenizer).count(1) == 1
    assert prompt_text(chat, tokenizer) == "^<user>x<assistant>"
    assert prompt_text(chat, tokenizer, generation_prompt=False) == "^<user>x"


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"answer": "a", "id": 3}, "none of the columns conversation, prompt, question, text"),
        ({"answer": "a", "id": 3}, "(it has: answer, id)"),
        ({"prompt": 3}, '"prompt" is not a text'),
        ({"prompt": " \n"}, '"prompt" is empty'),
        ({"prompt": "\ud83d"}, '"prompt" has half a surrogate pair'),
        ({"conversation": "hello"}, '"conversation" is not a list'),
        ({"conversation": []}, "no user turn"),
        ({"conversation": [CONVERSATION[0], CONVERSATION[2]]}, "no user turn"),
        ({"conversation": [{"from": "human", "value": "x"}]}, "turn 1 is not"),
        ({"conversation": [CONVERSATION[1], {"role": "user", "content": None}]}, "turn 2 is not"),
        ({}, "(it has: none)"),
    ],
)
def test_a_row_that_makes_no_prompt_is_named(tmp_path: Path, row: Any, complaint: str) -> None:
    path = write_lines(tmp_path / "bad.jsonl", {"prompt": "fine"}, row)
    message = error_of(path)
    assert f"{path} line 2 " in message
    assert complaint in message


def test_only_rows_that_are_used_are_checked(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "bad.jsonl", {"prompt": "fine"}, {"answer": 1})
    assert len(load_dataset(str(path), 1).samples) == 1


# -- files ------------------------------------------------------------------------------------


def test_a_json_file_may_hold_an_array_or_lines(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    array = tmp_path / "array.json"
    array.write_text("\ufeff\n " + json.dumps(rows, indent=2), encoding="utf-8")
    lines = write_lines(tmp_path / "lines.json", *rows)
    assert load_dataset(str(array)).digest == load_dataset(str(lines)).digest


def test_blank_lines_are_skipped_and_still_counted(tmp_path: Path) -> None:
    path = tmp_path / "gaps.jsonl"
    path.write_text('\n{"prompt": "a"}\n\n{"prompt": \n', encoding="utf-8")
    assert f"{path} line 4 is not JSON" in error_of(path)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("x.jsonl", b'{"prompt": "a"}\nprompt: b\n', "line 2 is not JSON"),
        ("x.jsonl", b'{"prompt": "a"}\n[1]\n', "line 2 is not an object"),
        ("x.json", b'[{"prompt": "a"},\n {"prompt" "b"}]', "line 2 is not JSON"),
        ("x.json", b'[{"prompt": "a"}, 7]', "row 2 is not an object"),
        ("x.json", b'[{"prompt": "a"}', "is not JSON"),
        ("x.json", b"[" * 100_000, "is not JSON"),
        ("x.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("x.jsonl", b'{"prompt": "\xff\xfe"}\n', "is not UTF-8"),
        ("x.json", b"[]", "has no rows"),
        ("x.jsonl", b"\n", "has no rows"),
        ("x.txt", b"hello", "a data file is .jsonl or .json"),
    ],
)
def test_a_broken_file_is_named_with_its_line(
    tmp_path: Path, name: str, content: bytes, complaint: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    message = error_of(path)
    assert str(path) in message
    assert complaint in message


def test_a_missing_file_or_folder_is_said_to_be_missing(tmp_path: Path) -> None:
    for name in (tmp_path / "no.jsonl", tmp_path / "no", "./no", "no.json", "~/no/such/folder"):
        assert "there is no file or folder" in error_of(name)


@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=5))
def test_any_text_survives_the_way_through_a_file(texts: list[str]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = write_lines(Path(folder) / "t.jsonl", *({"text": text} for text in texts))
        assert [sample.text for sample in load_dataset(str(path)).samples] == texts


# -- folders ----------------------------------------------------------------------------------


def test_a_folder_of_conversations_saved_by_datasets_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"conversation": CONVERSATION, "id": 1}, {"conversation": CONVERSATION[:3], "id": 2}]
    folder = tmp_path / "mt_bench"
    datasets.Dataset.from_list(rows).save_to_disk(str(folder))
    data = load_dataset(str(folder))
    assert data.name == "mt_bench"
    assert data.samples[1].messages == (Turn("system", "Be brief."), Turn("user", "One and one?"))


def test_of_several_splits_test_comes_before_validation_and_train(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    splits = {
        name: datasets.Dataset.from_list([{"prompt": name}]) for name in ("train", "validation")
    }
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "two"))
    assert load_dataset(str(tmp_path / "two")).samples[0].text == "validation"
    splits["test"] = datasets.Dataset.from_list([{"prompt": "test"}])
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "three"))
    assert load_dataset(str(tmp_path / "three")).samples[0].text == "test"


def test_a_single_split_may_have_any_name_and_of_others_the_user_is_told(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    easy, hard = (datasets.Dataset.from_list([{"prompt": name}]) for name in ("easy", "hard"))
    datasets.DatasetDict({"easy": easy}).save_to_disk(str(tmp_path / "one"))
    assert load_dataset(str(tmp_path / "one")).samples[0].text == "easy"
    datasets.DatasetDict({"easy": easy, "hard": hard}).save_to_disk(str(tmp_path / "two"))
    assert "it has: easy, hard" in error_of(tmp_path / "two")


def test_a_bad_row_of_a_folder_is_named_with_its_split(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"answer": "a"}])
    datasets.DatasetDict({"test": rows}).save_to_disk(str(tmp_path / "set"))
    assert "split test row 1 has none of the columns" in error_of(tmp_path / "set")


def test_an_empty_set_saved_by_datasets_is_refused(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"prompt": []}).save_to_disk(str(tmp_path / "empty"))
    assert "has no rows" in error_of(tmp_path / "empty")


def test_a_folder_that_datasets_did_not_write_is_refused(tmp_path: Path) -> None:
    assert "is not a data set folder" in error_of(tmp_path)
    (tmp_path / "state.json").write_text("{}", encoding="utf-8")
    assert "cannot be read as a data set" in error_of(tmp_path)


# -- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["humanevall", "", "no/such/thing", "a b", "x" * 5000, "~nobody"])
def test_an_unknown_name_is_answered_with_what_there_is(name: str) -> None:
    message = error_of(name)
    if not name.startswith("~"):
        assert "stdlib, humaneval, gsm8k" in message


def test_a_folder_in_the_current_directory_does_not_shadow_a_built_in_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gsm8k").mkdir()
    rows = [("row 1", {"question": "why?"})]
    monkeypatch.setattr("pipespec.data.registry.read_hub", lambda source: rows)
    data = load_dataset("gsm8k")
    assert data.samples[0].text == "why?"
    assert "not the folder of that name" in data.warnings[0]
    assert "./gsm8k" in data.warnings[0]
    assert "is not a data set folder" in error_of("./gsm8k")


def test_the_same_built_in_set_goes_by_its_hub_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[HubSource] = []

    def rows(source: HubSource) -> list[tuple[str, dict[str, str]]]:
        asked.append(source)
        return [("row 1", {"prompt": "def f():", "question": "why?"})]

    monkeypatch.setattr("pipespec.data.registry.read_hub", rows)
    for name in ("humaneval", "openai_humaneval", "openai/openai_humaneval"):
        assert load_dataset(name).name == "humaneval"
    assert load_dataset("openai/gsm8k").samples[0].text == "why?"
    assert load_dataset("owner/name").name == "name"
    assert load_dataset("owner/name:hard").name == "name-hard"
    assert asked[0] == HubSource("openai/openai_humaneval", split="test")
    assert asked[-1] == HubSource("owner/name", "hard")


def test_stdlib_has_six_samples_unless_told_otherwise() -> None:
    six, seven = load_dataset("stdlib"), load_dataset("stdlib", 7)
    assert len(six.samples) == 6 == BUILT_IN["stdlib"].default_num_samples
    assert seven.samples[:6] == six.samples
    assert seven.digest != six.digest


# -- numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_samples", [0, -1])
def test_no_samples_or_fewer_is_refused(num_samples: int) -> None:
    assert f"--num-samples is {num_samples}" in error_of("stdlib", num_samples)


def test_more_samples_than_there_are_takes_all_and_says_so(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "few.jsonl", {"prompt": "a"}, {"prompt": "b"})
    data = load_dataset(str(path), 10)
    assert len(data.samples) == 2
    assert "only 2 samples" in data.warnings[0]
    assert load_dataset(str(path), 2).warnings == ()


def test_the_digest_names_content_and_order() -> None:
    a, b = Sample(0, text="a"), Sample(1, text="b")
    chat = Sample(0, messages=(Turn("user", "a"),))
    digests = {digest(samples) for samples in ([a], [b], [a, b], [b, a], [chat], [])}
    assert len(digests) == 6
    assert digest([a, b]) == "66a06e756e12203ea7450ed3767374a7"


# -- the hub ----------------------------------------------------------------------------------


def hub_at(monkeypatch: pytest.MonkeyPatch, port: int, cache: Path) -> None:
    """Points the hub libraries at a port of this machine and at an empty cache."""
    datasets = pytest.importorskip("datasets")
    from huggingface_hub import constants, hf_api

    endpoint = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(hf_api.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)


def test_without_a_hub_the_error_comes_soon_and_names_alternatives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        hub_at(monkeypatch, unused.getsockname()[1], tmp_path)
        started_s = time.monotonic()
        message = error_of("gsm8k")
    assert time.monotonic() - started_s < 12
    assert "openai/gsm8k:main" in message
    assert "--dataset stdlib" in message


def test_a_hub_that_accepts_and_never_answers_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        hub_at(monkeypatch, silent.getsockname()[1], tmp_path)
        started_s = time.monotonic()
        with pytest.raises(DataError, match="cannot be had from the hub"):
            read_hub(HubSource("owner/name"), timeout_s=0.5)
    assert time.monotonic() - started_s < 9


def test_what_is_in_the_cache_needs_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    write_lines(tmp_path / "rows.jsonl", {"question": "cached?"})
    data_files = {"test": str(tmp_path / "rows.jsonl")}
    datasets.load_dataset("json", data_files=data_files, cache_dir=str(tmp_path / "made"))
    (made,) = (tmp_path / "made" / "json").iterdir()  # default-HASH
    placed = tmp_path / "cache" / "openai___gsm8k" / "main"
    placed.parent.mkdir(parents=True)
    made.rename(placed)
    (info,) = placed.rglob("dataset_info.json")
    values = json.loads(info.read_text(encoding="utf-8"))
    info.write_text(json.dumps({**values, "config_name": "main"}), encoding="utf-8")
    (arrow,) = placed.rglob("json-test.arrow")
    arrow.rename(arrow.with_name("gsm8k-test.arrow"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(hub_module, "_check_reachable", None)  # calling it would fail
    assert load_dataset("gsm8k").samples[0].text == "cached?"


def test_a_set_of_several_configurations_asks_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load(path: str, config: str | None) -> None:
        raise ValueError(
            "Config name is missing.\nPlease pick one among the available configs: ['main', 'b']"
        )

    monkeypatch.setattr(hub_module, "_cached", lambda source: None)
    monkeypatch.setattr(hub_module, "_check_reachable", lambda source, timeout_s: None)
    monkeypatch.setattr(datasets, "load_dataset", load)
    message = error_of("owner/name")
    assert "several configurations (main, b)" in message
    assert "owner/name:NAME" in message


def test_a_split_that_a_built_in_set_lost_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "_cached", lambda source: {"train": []})
    assert "has no split test (it has: train)" in error_of("humaneval")


# -- real data --------------------------------------------------------------------------------


@pytest.mark.shared_data
@pytest.mark.parametrize(("name", "num_rows"), [("humaneval", 164), ("gsm8k_test", 200)])
def test_real_sets_load_from_their_files(name: str, num_rows: int) -> None:
    data = load_dataset(str(SHARED / f"{name}.jsonl"))
    assert len(data.samples) == num_rows
    assert all(sample.text for sample in data.samples)
