"""Known data sets, from local copies with the hub's columns: what is fed, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipespec.data import BUILT_IN, Sample, Turn, load_dataset
from pipespec.data import hub as hub_module
from pipespec.data.hub import CONVERTED, HubSource
from pipespec.errors import DataError

datasets = pytest.importorskip("datasets")

LONG = "word " * 200
ROWS: dict[str, dict[str, Any]] = {
    "humaneval": {"task_id": "HumanEval/0", "prompt": "def f():\n", "entry_point": "f"},
    "gsm8k": {"question": "How many?", "answer": "2 + 2 = 4\n#### 4"},
    "one-shot": {"question": "How many apples?", "answer": "#### 4"},
    "cnn_dailymail": {"article": "A dog barked.", "highlights": "Dog.", "id": "1"},
    "xsum": {"document": "It rained.", "summary": "Rain.", "id": "2"},
    "pg19": {"short_book_title": "T", "publication_date": 1900, "url": "u", "text": "CHAPTER I"},
    "narrativeqa": {
        "document": {"id": "d", "text": "Once upon a time.", "summary": {"text": "Short."}},
        "question": {"text": "When?", "tokens": ["When", "?"]},
        "answers": [{"text": "Once.", "tokens": ["Once"]}],
    },
    "mmlu": {
        "question": "What is 2 + 2?",
        "subject": "abstract_algebra",
        "choices": ["3", "4", "5", "6"],
        "answer": 1,
    },
    "mt-bench": {"category": "writing", "prompt": ["Write.", "Shorten it."], "prompt_id": 3},
    "wikitext": {"text": f" {LONG}\n"},
}


def saved(folder: Path, *rows: dict[str, Any]) -> str:
    datasets.Dataset.from_list(list(rows)).save_to_disk(str(folder))
    return str(folder)


def only_sample(name: str, folder: Path) -> Sample:
    """The one sample of a local copy with the hub's columns."""
    data = load_dataset(f"{name}={saved(folder / 'copy', ROWS[name])}")
    assert data.name == name
    assert data.source == str(folder / "copy")
    (sample,) = data.samples
    return sample


def fed(sample: Sample) -> str:
    if sample.messages is None:
        return sample.text or ""
    (turn,) = sample.messages
    assert turn.role == "user"
    return turn.content


def test_every_set_of_the_hub_has_a_row_here() -> None:
    from_hub = {name for name, entry in BUILT_IN.items() if isinstance(entry.source, HubSource)}
    assert from_hub == set(ROWS)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("humaneval", "def f():\n"),
        ("gsm8k", "How many?"),
        ("pg19", "CHAPTER I"),
        ("wikitext", " ".join(["word"] * 128)),
    ],
)
def test_plain_sets_feed_a_column_as_it_stands(name: str, text: str, tmp_path: Path) -> None:
    sample = only_sample(name, tmp_path)
    assert sample.messages is None
    assert sample.text == text


@pytest.mark.parametrize(
    ("name", "document", "also"),
    [
        ("cnn_dailymail", "A dog barked.", ["Summarize", "three or four sentences"]),
        ("xsum", "It rained.", ["one sentence"]),
        ("narrativeqa", "Once upon a time.", ["story", "Question: When?", "one or two sentences"]),
        (
            "mmlu",
            "What is 2 + 2?",
            ["about abstract algebra", "A. 3\nB. 4\nC. 5\nD. 6", "letter of the right answer"],
        ),
        ("mt-bench", "Write.", []),
    ],
)
def test_instructions_are_a_users_turn_around_the_document(
    name: str, document: str, also: list[str], tmp_path: Path
) -> None:
    sample = only_sample(name, tmp_path)
    text = fed(sample)
    assert sample.messages is not None
    assert sample.document is not None
    assert text[sample.document.start : sample.document.end] == document
    for part in also:
        assert part in text
    for column in ("highlights", "summary", "answers"):  # nothing that tells the answer
        answer = ROWS[name].get(column)
        assert not isinstance(answer, str) or answer not in text


def test_one_shot_is_a_worked_example_and_the_question_in_its_form(tmp_path: Path) -> None:
    sample = only_sample("one-shot", tmp_path)
    assert sample.text is not None
    assert sample.document is not None
    assert sample.text.count("Question: ") == sample.text.count("Answer:") == 2
    assert sample.text.endswith("\n\nQuestion: How many apples?\nAnswer:")
    assert "\n#### 8\n\n" in sample.text
    assert sample.text[sample.document.start : sample.document.end] == "How many apples?"


def test_short_rows_of_wikitext_are_passed_over(tmp_path: Path) -> None:
    rows = [{"text": ""}, {"text": "word " * 127}, {"text": "a " * 128}, {"text": "b " * 999}]
    data = load_dataset(f"wikitext={saved(tmp_path / 'w', *rows)}", 5)
    assert [(s.index, (s.text or "")[0], len((s.text or "").split())) for s in data.samples] == [
        (0, "a", 128),
        (1, "b", 128),
    ]
    assert "only 2 samples" in data.warnings[0]
    with pytest.raises(DataError, match="has no rows of 128 words or more"):
        load_dataset(f"wikitext={saved(tmp_path / 'short', rows[1])}")


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        ("cnn_dailymail", {"article": None}, 'has no "article"'),
        ("cnn_dailymail", {"article": " "}, '"article" is empty'),
        ("xsum", {"document": 3}, '"document" is not a text'),
        ("pg19", {"text": None}, 'has no "text"'),
        ("narrativeqa", {"document": {"id": "d"}}, 'has no "document.text"'),
        ("narrativeqa", {"document": "all of it"}, 'has no "document.text"'),
        ("narrativeqa", {"question": {"text": ""}}, '"question.text" is empty'),
        ("mmlu", {"choices": []}, '"choices" is not a list'),
        ("mmlu", {"choices": [1, 2]}, '"choices" is not a text'),
        ("mmlu", {"subject": None}, 'has no "subject"'),
        ("mt-bench", {"prompt": "Write."}, '"prompt" is not a list'),
        ("mt-bench", {"prompt": []}, '"prompt" is not a list'),
        ("wikitext", {"text": 3}, '"text" is not a text'),
        ("one-shot", {"question": None}, 'has no "question"'),
        ("humaneval", {"prompt": None}, "has none of the columns prompt"),
        ("gsm8k", {"question": None}, "has none of the columns question"),
    ],
)
def test_a_row_that_lacks_something_is_named_with_its_column(
    name: str, change: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "bad", {**ROWS[name], **change})
    with pytest.raises(DataError) as caught:
        load_dataset(f"{name}={folder}")
    assert f"{folder} row 1 " in str(caught.value)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_copy_of_another_set_shows_its_columns(tmp_path: Path) -> None:
    folder = saved(tmp_path / "xsum", ROWS["xsum"])
    with pytest.raises(DataError) as caught:
        load_dataset(f"cnn_dailymail={folder}")
    assert str(caught.value) == (
        f'{folder} row 1 has no "article" (it has: document, summary, id); '
        f"cnn_dailymail={folder} must be a copy of abisee/cnn_dailymail:3.0.0 on the hub"
    )


def test_a_copy_may_be_lines_and_goes_by_other_names_too(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": ["Hello?"]}\n')
    data = load_dataset(f"mt_bench={path}")
    assert data.name == "mt-bench"
    assert data.samples[0].messages == (Turn("user", "Hello?"),)
    assert load_dataset(f"mt-bench={path}").digest == data.digest


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("xsum=", "there is no file or folder behind ="),
        ("xsum=/no/such/folder", "there is no file or folder /no/such/folder"),
        ("stdlib=.", "stdlib is generated"),
        ("xsumm=.", "there is no data set xsumm=."),
    ],
)
def test_a_copy_that_cannot_be_is_refused(name: str, complaint: str) -> None:
    with pytest.raises(DataError) as caught:
        load_dataset(name)
    assert complaint in str(caught.value)


# -- the hub ----------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Puts a function in the place of the hub; what it is asked."""

    def put(load: Callable[..., Any]) -> list[dict[str, Any]]:
        asked: list[dict[str, Any]] = []

        def load_dataset(path: str, config: str | None, **options: Any) -> Any:
            asked.append({"path": path, "config": config, **options})
            return load(**options)

        monkeypatch.setattr(hub_module, "_cached", lambda source: None)
        monkeypatch.setattr(hub_module, "_check_reachable", lambda source, timeout_s: None)
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    return put


def test_a_set_that_is_a_script_is_read_from_the_hubs_converted_copy(
    hub: Callable[..., list[dict[str, Any]]],
) -> None:
    def load(**options: Any) -> Any:
        if "revision" not in options:
            raise RuntimeError("Dataset scripts are no longer supported, but found xsum.py")
        return {"test": [ROWS["xsum"]]}

    asked = hub(load)
    assert "It rained." in fed(load_dataset("xsum").samples[0])
    assert [item.get("revision") for item in asked] == [None, CONVERTED]


def test_an_enormous_set_is_read_only_as_far_as_it_is_asked_for(
    hub: Callable[..., list[dict[str, Any]]],
) -> None:
    def rows() -> Any:
        yield ROWS["narrativeqa"]
        raise ConnectionResetError("gone\nin the middle")

    asked = hub(lambda **options: {"test": rows()})
    assert len(load_dataset("narrativeqa", 1).samples) == 1
    assert asked[0]["streaming"] is True
    with pytest.raises(DataError, match=r"narrativeqa .*\(gone\)"):
        load_dataset("narrativeqa", 2)
