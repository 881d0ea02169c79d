"""The statistics command: its numbers, what it compares, its formats, and files it cannot use."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SHARED_DATA
from result_files import MODELS, metadata, sample, write_run
from rich.console import Console

from pipespec.commands import reading
from pipespec.metrics.definitions import part_means
from pipespec.print_benchmark_stats import FORMATS, MODES, main
from pipespec.statistics.tables import Column, Table
from pipespec.statistics.text import fit, print_tables

PUBLISHED = SHARED_DATA / "pipespec_results"


def rows_of(*arguments: object, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """Of all tables, by JSON."""
    assert main([*map(str, arguments), "--format", "json"]) == 0
    return [row for table in json.loads(capsys.readouterr().out) for row in table["rows"]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Greedy with two samples, and runs with three, of which two are greedy's prompts."""
    small, _, large = MODELS
    greedy = [sample(0, 4.0, 10), sample(1, 6.0, 10)]
    write_run(tmp_path / "greedy.json", metadata("greedy", [large]), greedy)
    for lookahead, seconds in ((1, 3.0), (2, 2.0), (4, 2.5)):
        results = [
            sample(index, seconds, 10, [[1, 2, 3, 3]], powers_w=[100.0, 50.0, 9.0])
            for index in range(3)
        ]
        run = metadata("chain", [small, large], lookahead)
        write_run(tmp_path / f"chain_{lookahead}.json", run, results)
    return tmp_path


def test_every_number_of_a_row(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    greedy, chain = rows_of(folder, capsys=capsys)
    assert (greedy["strategy"], greedy["drafts"], greedy["lookahead"]) == ("greedy", [], None)
    assert greedy["energy_per_token_j"] is greedy["energy_source"] is None
    assert greedy["speed_up_same_prompts"] == greedy["speed_up_all_samples"] == 1.0
    assert chain == {
        "folder": str(folder), "strategy": "chain", "drafts": ["small"], "lookahead": 2,
        "num_samples": 3, "num_tokens": 30, "total_time_s": 6.0, "ms_per_token": 200.0,
        "tokens_per_s": 5.0, "speed_up_same_prompts": 2.5, "speed_up_all_samples": 2.5,
        "num_matched_samples": 2, "num_same_text": 2, "acceptance_rate": [None],
        "block_efficiency": [2.25], "energy_per_token_j": 30.0, "energy_source": "power samples",
        "mean_utilization_percent": [50.0, 50.0], "file": str(folder / "chain_2.json"),
    }  # fmt: skip


def test_the_best_lookahead_stands_for_all_unless_all_are_asked_for(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(folder)]) == 0
    assert "2 runs with others left out (--all shows them)" in capsys.readouterr().out
    lookaheads = [row["lookahead"] for row in rows_of(folder, "--all", capsys=capsys)]
    assert lookaheads == [None, 1, 2, 4]
    auto = metadata("chain", MODELS[::2], 7, lookahead_mode="auto")
    write_run(folder / "auto.json", auto, [sample(0, 9.0, 10, [[9]])])
    assert [row["lookahead"] for row in rows_of(folder, capsys=capsys)] == [None, 2, "auto"]


def test_repetitions_are_not_sifted_for_the_luckiest(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run in another folder is another run, compared with the greedy run that lies beside it."""
    again = folder / "again"
    write_run(again / "greedy.json", metadata("greedy", MODELS[-1:]), [sample(0, 1.0, 10)])
    slow = [sample(0, 2.0, 10, [[4, 5]])]
    write_run(again / "chain.json", metadata("chain", MODELS[::2], 2), slow)
    rows = rows_of(folder, capsys=capsys)
    chain = [row for row in rows if row["strategy"] == "chain"]
    assert sorted(row["speed_up_same_prompts"] for row in chain) == [0.5, 2.5]
    assert main([str(folder), "--format", "markdown"]) == 0
    assert "| folder | strategy |" in capsys.readouterr().out


def test_what_decides_the_text_keeps_runs_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sampled run is not compared with greedy decoding, whatever its strategy is called."""
    sampled = {"temperature": 0.8, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": 3}
    for name, more in (("a", {}), ("b", {"sampling": sampled, "max_new_tokens": 64})):
        run = metadata("greedy", MODELS[-1:], **more)
        write_run(tmp_path / f"{name}.json", run, [sample(0, 1.0, 10)])
    run = metadata("chain", MODELS, 2, sampling=sampled, max_new_tokens=64)
    write_run(tmp_path / "c.json", run, [sample(0, 0.5, 10, [[2, 2], [4, 5]])])
    assert main([str(tmp_path), "--format", "json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first["title"] == "humaneval, target large"
    assert second["title"] == (
        "humaneval, target large, at most 64 new tokens, temperature 0.8, seed 3"
    )
    assert [row["speed_up_same_prompts"] for row in second["rows"]] == [1.0, 2.0]


def test_without_greedy_there_is_no_speed_up_and_a_note_says_why(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "greedy.json").unlink()
    assert main([str(folder)]) == 0
    text = capsys.readouterr().out
    assert "a greedy run of large on humaneval is missing" in text
    assert "x" not in text.split("chain")[1].split("\n")[0]
    write_run(folder / "greedy.json", metadata("greedy", MODELS[-1:]), [sample(7, 1.0, 10)])
    assert main([str(folder)]) == 0
    assert "have none in common" in capsys.readouterr().out


def test_recorded_energy_is_told_from_an_estimate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    powers = [100.0, 50.0]
    counted = [sample(0, 1.0, 10, powers_w=powers, energy_j=80.0)]
    write_run(tmp_path / "counted.json", metadata("greedy", MODELS[:1]), counted)
    sampled = [sample(0, 1.0, 10, powers_w=powers)]
    write_run(tmp_path / "sampled.json", metadata("greedy", MODELS[1:2]), sampled)
    rows = rows_of(tmp_path, capsys=capsys)
    assert [(row["energy_per_token_j"], row["energy_source"]) for row in rows] == [
        (10.0, "power samples"), (8.0, "recorded"),
    ]  # fmt: skip
    assert main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert re.search(r" 8\.00\s", out)
    assert re.search(r"~10\.00\s", out)


# -- formats ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["text", *FORMATS])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_has_every_format(
    folder: Path, mode: str, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "chain_2.json" if mode == "single" else folder
    output = folder / "written"
    arguments = [str(path), "--mode", mode, "--format", form]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert main([*arguments, "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    assert output.read_text() == printed
    assert {"stats": "200", "single": "200", "baseline-timing": "500", "accepted-tokens": "2.0"}[
        mode
    ] in printed


def test_csv_is_one_table_with_a_line_of_names(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(folder / "other.json", metadata("greedy", ["org/a,b"]), [sample(0, 1.0, 10)])
    assert main([str(folder), "--format", "csv"]) == 0
    other, greedy, chain = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert (other["target"], greedy["target"], chain["target"]) == ("a,b", "large", "large")
    assert (chain["block_efficiency"], chain["acceptance_rate"]) == ("2.25", "")


def latex_cells(text: str) -> Iterator[list[str]]:
    """The rows of all tabulars."""
    for body in re.findall(r"\\toprule\n(.*?)\\bottomrule", text, re.DOTALL):
        for line in body.replace("\\midrule\n", "").splitlines():
            assert line.endswith(r" \\")
            yield re.split(r"(?<!\\) & ", line[:-3])


def test_latex_survives_any_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every special character is escaped, every row has the columns that its tabular declares, and
    every group and environment that opens is closed."""
    name = r"[a_b & 50% {x} \ ~ ^ $ # <y> | --z"
    run = metadata(name, [name, "large"], 2)
    write_run(tmp_path / "run.json", run, [sample(0, 1.0, 10, [[2, 3]])])
    write_run(tmp_path / "greedy.json", metadata("greedy", ["large"]), [sample(0, 2.0, 10)])
    assert main([str(tmp_path), "--format", "latex"]) == 0
    text = capsys.readouterr().out
    (declared,) = re.findall(r"\\begin\{tabular\}\{([lr]+)\}", text)
    rows = list(latex_cells(text))
    assert {len(cells) for cells in rows} == {len(declared)}
    escaped = (
        r"{}[a\_b \& 50\% \{x\} \textbackslash{} \textasciitilde{} \textasciicircum{} \$ \# "
        r"\textless{}y\textgreater{} \textbar{} -{}-z"
    )
    assert rows[-1][:2] == [escaped, escaped]
    opened = re.findall(r"\\begin\{(\w+)\}", text)
    assert sorted(opened) == sorted(re.findall(r"\\end\{(\w+)\}", text))
    unescaped = re.sub(r"\\[\\&%$#_{}]", "", text.replace("% needs \\usepackage{booktabs}\n", ""))
    assert unescaped.count("{") == unescaped.count("}")
    assert not re.search(r"[%$#_~^]", unescaped)


def test_a_bar_in_a_name_does_not_end_a_markdown_cell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run.json", metadata("a|b*", ["x"]), [sample(0, 1.0, 10)])
    assert main([str(tmp_path), "--format", "markdown"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert r"a\|b\*" in lines[-1]
    assert len({line.replace(r"\|", "").count("|") for line in lines}) == 1


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_text_fits_its_terminal_and_keeps_what_matters(width: int) -> None:
    columns = (
        Column("a", "drafts", is_text=True),
        Column("b", "ms/token", digits=2),
        *(Column(f"c{rank}", f"column-{rank}", digits=3, rank=rank) for rank in range(1, 8)),
    )
    row = {"a": ("a-model-of-1B-with-a-name", "another-[8B]"), "b": 12.345}
    row |= {f"c{rank}": (0.5, 0.25) for rank in range(1, 8)}
    written = io.StringIO()
    console = Console(file=written, width=width)
    short = {"a-model-of-1B-with-a-name": "1B", "another-[8B]": "another-[8B]"}
    table = Table("title", columns, (row,), short_names=short)
    print_tables([table], console)
    text = written.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "a-model-of-1B-with-a-name" in text
    assert "another-[8B]" in text
    assert "12.35" in text
    layout = fit(table, console)
    assert layout.is_short == ("1B: a-model-of-1B-with-a-name\n" in text) == (width < 160)
    left_out = [column for column in columns if column not in layout.columns]
    ranks = [column.rank for column in left_out]
    assert ranks == list(range(8 - len(ranks), 8))  # the least important
    assert bool(ranks) == (width < 100)
    for column in left_out:
        assert column.header in text.split("no room for")[1]


# -- the other modes --------------------------------------------------------------------------


def test_one_file_in_detail(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "chain_2.json"
    assert main([str(path), "--mode", "single", "--format", "json"]) == 0
    about, samples, devices = json.loads(capsys.readouterr().out)
    assert {"key": "lookahead", "value": "2"} in about["rows"]
    assert [row["ms_per_token"] for row in samples["rows"]] == [200.0] * 3
    assert [row["energy_j"] for row in samples["rows"]] == [300.0] * 3
    assert samples["notes"] == [
        "3 samples: 30 tokens in 6.00 s",
        "ms/token: 200.00 in all, 200.00 to 200.00 by sample",
        "energy, estimated as mean sampled power times time: ~900.0 J, ~30.00 J/token",
    ]
    assert devices["rows"] == [
        {"device": 0, "models": ["small"], "mean_utilization_percent": 50.0, "mean_power_w": 100.0,
         "energy_from_power_j": 600.0},
        {"device": 1, "models": ["large"], "mean_utilization_percent": 50.0, "mean_power_w": 50.0,
         "energy_from_power_j": 300.0},
    ]  # fmt: skip


def test_baseline_timing_is_of_greedy_runs_fastest_first(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(folder / "g.json", metadata("greedy", MODELS[:1]), [sample(0, 1.0, 10)])
    rows = rows_of(folder, "--mode", "baseline-timing", capsys=capsys)
    assert [(row["model"], row["tokens_per_s"]) for row in rows] == [("small", 10), ("large", 2)]
    assert main([str(folder / "chain_2.json"), "--mode", "baseline-timing"]) == 1
    assert "no file is of a greedy run" in capsys.readouterr().err


def test_accepted_tokens_are_means_of_fifths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = [sample(0, 1.0, 10, [[3, 1], [4]]), sample(1, 1.0, 10, [[2, 0, 9, 5], [6, 8]])]
    write_run(tmp_path / "run.json", metadata("async-chain", MODELS), results)
    (row,) = rows_of(tmp_path, "--mode", "accepted-tokens", capsys=capsys)
    assert row["num_verifications"] == [5, 3]
    means = [row[name] for name in row if name.startswith("tokens_per_verification")]
    assert means == [[1, 4], [2, 6], [3, 8], [5, None], [9, None]]
    write_run(tmp_path / "run.json", metadata("greedy", MODELS), [sample(0, 1.0, 10)])
    assert main([str(tmp_path), "--mode", "accepted-tokens"]) == 1


def test_parts_are_of_equal_length_like_the_originals() -> None:
    values = sorted([5, 1, 1, 1, 2, 2, 9, 9, 9, 9, 3, 7])
    counts = {value: values.count(value) for value in values}
    parts = [values[start : start + 3] for start in range(0, 15, 3)]  # ceil(12 / 5)
    means = [sum(part) / len(part) if part else None for part in parts]
    assert part_means(counts, 5) == tuple(means)
    assert part_means({}, 5) == (None,) * 5


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["--mode", "single"], 2, "--mode single is for one file; 4 were found"),
        (["--dataset", "gsm8k"], 2, "--dataset is gsm8k; the files are of humaneval"),
        (["--output", "/nowhere/x"], 2, "--output"),
        (["missing"], 2, "there is no file or folder missing"),
        (["--format", "html"], 2, "--format"),
    ],
)
def test_what_the_user_gets_wrong_is_one_line(
    folder: Path, arguments: list[str], code: int, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(folder), *arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert reason in captured.err and captured.err.count("\n") == 1


# -- files that cannot be used ----------------------------------------------------------------


def test_files_that_cannot_be_used_are_named_and_the_rest_is_printed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (folder / "chain_4.json").read_text()
    (folder / "cut.json").write_text(whole[: len(whole) // 2])
    (folder / "foreign.json").write_text('{"rows": [1, 2]}')
    empty = [{**sample(0, 1.0, 10), "metrics": {**sample(0, 1.0, 10)["metrics"]}}]
    empty[0]["metrics"]["tokens_generated"] = 0
    write_run(folder / "zero.json", metadata("greedy", MODELS[-1:]), empty)
    bare = sample(0, 1.0, 10, [[4, 5]])
    del bare["gpustats"]
    write_run(folder / "bare.json", metadata("chain", MODELS, 8), [bare])
    assert main([str(folder), "--format", "json"]) == 0
    captured = capsys.readouterr()
    (table,) = json.loads(captured.out)
    assert len(table["rows"]) == 3
    assert table["rows"][-1]["energy_per_token_j"] is None  # used, but for what it lacks
    lines = captured.err.splitlines()
    assert len(lines) == 3
    for name, line in zip(("cut", "foreign", "zero"), lines):
        assert line.startswith("passed over: ") and f"{name}.json" in line


def test_only_if_nothing_is_left_it_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "foreign.json").write_text("[]")
    assert main([str(tmp_path)]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert "foreign.json" in first
    assert second.startswith("error: none of 1 files could be used")


def replacements(value: Any) -> Iterator[Any]:
    """`value` with something else in the place of each of its parts, one at a time."""
    yield from (None, "x", -1, [], {}, [None], True, 1e999)
    items = value.items() if isinstance(value, dict) else enumerate(value)
    if not isinstance(value, dict | list):
        return
    for key, part in items:
        for other in replacements(part) if isinstance(part, dict | list) else (None, "x", -1, [1]):
            changed = value.copy()
            changed[key] = other
            yield changed


def test_no_junk_in_a_file_ends_in_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file is used or named, in every mode: nothing is raised but what is reported."""
    ours = {"num_offered": [3], "num_accepted": [1], "forward_times_s": [0.1, 0.2], "energy_j": 3.0}
    good = sample(0, 1.0, 10, [[2, 3]], powers_w=[5.0, 6.0], time_to_first_token_s=0.1, **ours)
    about = metadata("chain", MODELS[:2], 2, sampling={"temperature": 0.5}, stop=["a"])
    path = tmp_path / "run.json"
    contents = [{"metadata": about, "results": [result]} for result in replacements(good)]
    contents += [{"metadata": each, "results": [good]} for each in replacements(about)]
    codes = set()
    for number, content in enumerate(contents):
        path.write_text(json.dumps(content))
        form = ("json", "text", "latex", "csv")[number % 4]
        codes.add(main([str(path), "--mode", MODES[number % len(MODES)], "--format", form]))
    assert codes == {0, 1}
    assert "Traceback" not in capsys.readouterr().err


def test_reading_for_long_is_told_on_stderr(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(folder)]) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(reading, "FIRST_AFTER_S", 0.0)
    assert main([str(folder)]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "reading file 1 of 4, chain_1.json: 1 samples"


def test_the_memory_does_not_grow_with_the_size_of_samples(tmp_path: Path) -> None:
    """Sixty megabytes of the original's lists and texts, in little more than Python itself takes:
    what is kept of a sample are sums."""
    long = sample(0, 20.0, 1000, [[4] * 2000], powers_w=[5.0] * 8, text="x" * 10_000)
    long["metrics"]["model_times"] = [[0.0104043483]] * 2 + [[0.0104043483] * 2000]
    text = json.dumps(long)
    count = 60_000_000 // len(text) + 1
    with (tmp_path / "run.json").open("w") as file:
        file.write('{"metadata":' + json.dumps(metadata("chain", MODELS[:2])) + ',"results":[')
        for index in range(count):
            one = text.replace('"sample_index": 0', f'"sample_index": {index}')
            file.write((",\n" if index else "") + one)
        file.write("]}")
    code = (
        "import resource, sys; from pipespec.print_benchmark_stats import main\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert main([sys.argv[1], '--format', 'csv']) == 0\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    *lines, more_kib = ended.stdout.splitlines()
    (row,) = csv.DictReader(lines)
    assert int(row["num_samples"]) == count
    assert int(more_kib) < 24_000


# -- the original's files ---------------------------------------------------------------------

SMALL, MIDDLE, LARGE = "Llama-3.2-1B-Instruct", "Llama-3.1-8B-Instruct", "Llama-3.1-70B-Instruct"
# target, strategy, drafts, lookahead: ms/token, speed-up the published way, on the same prompts
HEADLINE = {
    (SMALL, "greedy", (), None): (11.72, 1, 1),
    (MIDDLE, "greedy", (), None): (22.46, 1, 1),
    (LARGE, "greedy", (), None): (123.69, 1, 1),
    (LARGE, "chain", (SMALL,), 8): (84.72, 1.460, 1.471),
    (LARGE, "chain", (MIDDLE,), 8): (93.42, 1.324, 1.321),
    (LARGE, "chain", (SMALL, MIDDLE), 8): (90.14, 1.372, 1.374),
    (LARGE, "async-chain", (SMALL,), 0): (54.85, 2.255, 2.343),
    (LARGE, "async-chain", (MIDDLE,), 0): (54.52, 2.269, 2.330),
    (LARGE, "async-chain", (SMALL, MIDDLE), 0): (48.76, 2.537, 2.636),
}
CHAIN_MS = (
    "34.84 25.21 21.39 20.03 19.28 18.60 18.30 18.66 18.62 18.71 "
    "19.18 18.91 19.67 18.96 20.26 20.60 21.09 21.55 21.83 22.36"
)
ASYNC_CHAIN_MS = (
    "14.53 14.44 14.26 13.90 15.38 14.48 15.73 15.99 16.58 16.26 17.35 "
    "17.34 18.50 18.10 19.23 19.24 20.06 22.25 22.74 23.10 22.02"
)


@pytest.fixture(scope="module")
def published_tables() -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        written = io.StringIO()
        patch.setattr(sys, "stdout", written)
        assert main([str(PUBLISHED), "--all", "--format", "json"]) == 0
    return json.loads(written.getvalue())  # type: ignore[no-any-return]


@pytest.mark.shared_data
def test_the_published_table_comes_out_of_the_published_files(
    published_tables: list[dict[str, Any]],
) -> None:
    rows = {}
    for table in published_tables:
        target = table["target"].removeprefix("Meta-")
        for row in table["rows"]:
            key = (target, row["strategy"], tuple(row["drafts"]), row["lookahead"])
            rows[key] = row
    assert len(rows) == 50
    for key, (ms_per_token, published_way, same_prompts) in HEADLINE.items():
        row = rows.pop(key)
        assert row["ms_per_token"] == pytest.approx(ms_per_token, abs=0.006), key
        assert row["speed_up_all_samples"] == pytest.approx(published_way, abs=6e-4), key
        assert row["speed_up_same_prompts"] == pytest.approx(same_prompts, abs=6e-4), key
    for strategy, first, sweep in (("chain", 1, CHAIN_MS), ("async-chain", 0, ASYNC_CHAIN_MS)):
        for lookahead, ms_per_token in enumerate(map(float, sweep.split()), first):
            row = rows.pop((MIDDLE, strategy, (SMALL,), lookahead))
            assert row["ms_per_token"] == pytest.approx(ms_per_token, abs=0.006)
            assert row["speed_up_all_samples"] == pytest.approx(22.458 / ms_per_token, rel=1e-3)
    assert not rows


@pytest.mark.shared_data
def test_the_published_energy_comes_out_of_the_published_files(
    published_tables: list[dict[str, Any]],
) -> None:
    (large,) = (table for table in published_tables if "70B" in table["target"])
    found = {
        (row["strategy"], len(row["drafts"])): row["energy_per_token_j"] for row in large["rows"]
    }
    for key, joules in ((("greedy", 0), 32.9), (("chain", 2), 40.4), (("async-chain", 2), 26.1)):
        assert found[key] == pytest.approx(joules, rel=0.005)


@pytest.mark.shared_data
def test_the_shown_text_says_what_was_published(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(PUBLISHED)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"greedy .* 123\.69 ", text)
    assert re.search(r"async-chain .* 48\.76 +2\.64x +2\.54x ", text)
    assert "published" in text
    assert "39 runs with others left out" in text
    assert max(map(len, text.splitlines())) <= 100
