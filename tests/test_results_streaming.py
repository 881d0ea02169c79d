"""Result files of any size, whole and damaged, sample by sample."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import SHARED_DATA

from pipespec.errors import DataError
from pipespec.results import find_files, load_results, read_run, read_runs, streaming
from pipespec.results.streaming import iterate_results, read_metadata

METADATA = {"strategy": "greedy", "model_configs": [{"path": "a"}], "dataset": "x"}


def sample(index: int, text: str = "text") -> dict[str, Any]:
    metrics = {"total_time": 1.5, "tokens_generated": 3, "token_times": [0.25, 0.5]}
    return {
        "sample_index": index, "strategy": "greedy", "metrics": metrics, "output_text": text,
        "input_text": "in", "gpustats": [],
    }  # fmt: skip


def write(path: Path, content: object, **options: Any) -> Path:
    path.write_text(json.dumps(content, **options))
    return path


def whole(results: list[dict[str, Any]]) -> bytes:
    return json.dumps({"metadata": METADATA, "results": results}).encode()


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_file_read_in_pieces_says_what_it_says_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indent: int | None, chunk: int, is_first: bool
) -> None:
    monkeypatch.setattr(streaming, "_CHUNK", chunk)
    texts = ["", 'quo"te\\', "é\n\ud800", "]}," * 5, "x" * 300]
    results = [sample(index, text) for index, text in enumerate(texts)]
    others = [("other", [1, {"results": []}]), ("seconds", 1.5e-05), ("count", 12)]
    pairs = [("metadata", METADATA), *others, ("results", results)]
    content = dict(pairs if is_first else reversed(pairs))
    path = write(tmp_path / "run.json", content, indent=indent)
    assert read_metadata(path) == METADATA
    assert list(iterate_results(path)) == results
    assert read_run(path, lambda result: result["output_text"]).samples == tuple(texts)


@pytest.mark.shared_data
def test_the_originals_files_read_alike_in_both_ways() -> None:
    for path in find_files([SHARED_DATA / "pipespec_results"])[::7]:
        whole = load_results(path)
        run = read_run(path, lambda result: result)
        assert (run.metadata, run.samples) == (whole.metadata, whole.results)


def test_samples_come_in_the_order_of_their_indexes(tmp_path: Path) -> None:
    content = {"metadata": METADATA, "results": [sample(index) for index in (2, 0, 1)]}
    path = write(tmp_path / "run.json", content)
    assert read_run(path, lambda result: result["sample_index"]).samples == (0, 1, 2)


def test_wherever_a_file_was_cut_off_it_is_refused_by_name(tmp_path: Path) -> None:
    text = json.dumps({"metadata": METADATA, "results": [sample(0), sample(1)]})
    path = tmp_path / "cut.json"
    for length in sorted(random.Random(5).sample(range(len(text)), 60)):
        path.write_text(text[:length])
        with pytest.raises(DataError, match=r"cut\.json"):
            read_run(path, lambda result: result)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no JSON object"), (b"[1]", "no JSON object"), (b"{}", 'lacks "metadata"'),
        (b"\xff\xfe", "cut off"), (b'{"metadata": 3}', 'lacks "metadata"'),
        (b'{"metadata": {"strategy": "greedy"}}', "model_configs"),
        (json.dumps({"metadata": METADATA}).encode(), 'lacks "results"'),
        (json.dumps({"metadata": METADATA, "results": []}).encode(), "no samples"),
        (json.dumps({"metadata": METADATA, "results": {}}).encode(), "no list"),
        (json.dumps({"metadata": METADATA, "results": [{}]}).encode(), "sample_index"),
        (b'{"metadata": ' + b"[" * 100_000, "metadata|nested|cut off"),
        (json.dumps({"metadata": {**METADATA, "schema_version": 99}}).encode(), "version 99"),
        (whole([]) + b" {}", "follows its end"), (whole([])[:-1] + b",}", "expecting a key"),
        (b'{3: "metadata"}', "expecting a key"),
        (b'{"metadata": ' + b"9" * 9999 + b"}", "digits"),
        (whole([sample(0), sample(1)]).replace(b"}, {", b"} {"), "expecting ','"),
        (whole([sample(0)]).replace(b"1.5", b"NaN"), "no number .metrics.total_time., 0 or more"),
        (whole([sample(0)]).replace(b"1.5", b"-1.5"), "0 or more"),
        (whole([sample(0)]).replace(b": 3", b": 0"), "no tokens"),
        (b'{"results": [], ' + whole([])[1:], '"results" twice'),
    ],
)  # fmt: skip
def test_other_files_are_refused_with_the_reason(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    path = tmp_path / "other.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=reason) as caught:
        read_run(path, lambda result: result)
    assert "other.json" in str(caught.value) and "\n" not in str(caught.value)


def test_what_the_other_reader_takes_is_taken(tmp_path: Path) -> None:
    """A byte order mark, a surrogate without a partner, a sample without a monitor's samples."""
    bare = {key: value for key, value in sample(0).items() if key != "gpustats"}
    text = whole([bare]).decode().replace('"text"', '"te\ud800xt"')
    path = tmp_path / "run.json"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode(errors="surrogatepass"))
    (result,) = read_run(path, lambda result: result).samples
    assert result["output_text"] == "te\ud800xt"
    assert result["gpustats"] == []
    assert load_results(path).results == (result,)


def test_a_list_beside_the_results_is_passed_over_item_by_item(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a large file of something else takes no more memory than one of ours."""
    monkeypatch.setattr(streaming, "_CHUNK", 1000)
    path = write(tmp_path / "run.json", {"rows": ["x" * 99] * 1000, "metadata": METADATA})
    longest = 0
    original = streaming._Scanner._read

    def read(scanner: streaming._Scanner, count: int) -> None:
        nonlocal longest
        original(scanner, count)
        longest = max(longest, len(scanner._text))

    monkeypatch.setattr(streaming._Scanner, "_read", read)
    assert read_metadata(path) == METADATA
    assert longest < 3000


def test_a_file_that_is_named_twice_is_read_once(tmp_path: Path) -> None:
    path = write(tmp_path / "run.json", {})
    (tmp_path / "link.json").symlink_to(path)
    assert len(find_files([tmp_path, path, tmp_path / "." / "run.json"])) == 1


def test_what_is_neither_file_nor_folder_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe is neither a file nor a folder"):
        find_files([tmp_path / "pipe"])
    with pytest.raises(DataError, match="too long"):
        find_files([tmp_path / ("x" * 300)])


def test_a_folder_is_searched_and_what_is_no_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    good = {"metadata": METADATA, "results": [sample(0)]}
    write(tmp_path / "set" / "good.json", good)
    write(tmp_path / "race.json", {"race": 1})
    write(tmp_path / "poor.json", {"metadata": METADATA, "results": [{**sample(0), "metrics": {}}]})
    (tmp_path / "run.json.partial").write_text("not looked at")
    skipped: list[str] = []
    (run,) = read_runs([tmp_path], lambda result: result["metrics"]["token_times"], skipped.append)
    assert (run.path.name, run.samples) == ("good.json", ([0.25, 0.5],))
    assert [Path(line.split()[2]).name for line in skipped] == ["poor.json", "race.json"]


def test_what_a_sample_lacks_is_said(tmp_path: Path) -> None:
    path = write(tmp_path / "run.json", {"metadata": METADATA, "results": [sample(0)]})
    with pytest.raises(DataError, match=r"run\.json: results\[0\] lacks 'model_times'"):
        read_run(path, lambda result: result["metrics"]["model_times"])
    with pytest.raises(DataError, match="none of 1 files"):
        read_runs([path], lambda result: result["model_times"], lambda _: None)
    with pytest.raises(DataError, match="no file or folder"):
        find_files([tmp_path / "missing"])


def test_the_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Sixty megabytes, in a process that may have little more than Python itself takes."""
    path = tmp_path / "large.json"
    text = "x" * 20_000
    with path.open("w") as file:
        file.write('{"metadata":' + json.dumps(METADATA) + ',"results":[')
        for index in range(3000):
            file.write((",\n" if index else "") + json.dumps(sample(index, text)))
        file.write("]}")
    assert path.stat().st_size > 60_000_000
    code = (
        "import resource, sys; from pathlib import Path; from pipespec.results import read_run\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "run = read_run(Path(sys.argv[1]), lambda result: len(result['output_text']))\n"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(len(run.samples), after - before)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    count, more_kib = map(int, ended.stdout.split())
    assert count == 3000
    assert more_kib < 24_000
