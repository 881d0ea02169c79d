"""The HTML report: the numbers of `metrics`, texts that cannot break it, files that are none."""

from __future__ import annotations

import configparser
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import SHARED_DATA
from reports import own_sample, write_both, write_run

from pipespec import report
from pipespec.metrics import speed_up, summarise
from pipespec.reporting import page as page_module
from pipespec.reporting.data import Keeper, Run, RunGroup, device_names, group_samples
from pipespec.reporting.markup import Html, embedded, join, tag
from pipespec.reporting.plots import BINS, lookahead_curves, progress_curves, shares
from pipespec.reporting.verifications import curve, verifications, without_corrections
from pipespec.results import load_results, read_runs
from pipespec.statistics.comparison import comparison_tables

ROOT = Path(__file__).resolve().parents[1]
ORIGINALS = SHARED_DATA / "pipespec_results"
SEED = 5
JUNK = (
    None,
    -1,
    1e300,
    float("nan"),
    float("inf"),
    "",
    "text",
    [],
    [None],
    [["x"]],
    {},
    {"a": []},
    True,
)
NASTY = "</script><script>bad()</script> & <b>\"'\u2028 \ud800 \U0001f600"


class Reader(HTMLParser):
    """What a browser makes of a page: its tables' texts, its scripts, every element."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        while self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "script" in self._open:
            attributes, text = self.scripts.pop()
            self.scripts.append((attributes, text + data))
        elif {"td", "th"} & set(self._open):
            self.tables[-1][-1][-1] += data

    @property
    def data(self) -> Any:
        (text,) = (text for attributes, text in self.scripts if attributes.get("id") == "data")
        return json.loads(text)

    def rows(self) -> dict[str, dict[str, str]]:
        """The cells of the first table by strategy and heading."""
        head, *lines = self.tables[0]
        return {line[0]: dict(zip(head, line, strict=True)) for line in lines}


def groups_of(folder: Path, max_samples: int = 5) -> list[RunGroup]:
    skipped: list[str] = []
    keeper = Keeper(max_samples)
    runs = read_runs([folder], keeper, skipped.append, keeper.on_file)
    assert not skipped
    return group_samples(runs)


def read_page(folder: Path, *flags: str) -> Reader:
    output = folder.with_name(folder.name + ".html")
    assert report.main([str(folder), "--output", str(output), *flags]) == 0
    reader = Reader()
    reader.feed(output.read_text(encoding="utf-8"))
    return reader


def test_the_parts_of_the_page_are_part_of_the_package() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    patterns = setup["options.package_data"]["pipespec.reporting"].split(", ")
    parts = Path(page_module.__file__).parent.glob("*.*")
    assert {part.name for part in parts if part.suffix != ".py"} == set(patterns)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


def only_group(folder: Path) -> RunGroup:
    (group,) = groups_of(folder)
    return group


def by_strategy(folder: Path) -> dict[str, Run]:
    return {run.metadata["strategy"]: run for run in only_group(folder).runs}


# -- numbers -------------------------------------------------------------------------------------


def assert_numbers_are_those_of_the_files(group: RunGroup) -> None:
    for run in group.runs:
        whole = load_results(run.path)
        assert run.compared.summary == summarise(whole.results)
        greedy = group.greedy_of(run)
        if greedy is not None:
            baseline = load_results(greedy.path)
            assert run.compared.comparison == speed_up(whole.results, baseline.results)


def test_numbers_are_those_of_metrics_on_the_whole_files(folder: Path) -> None:
    write_both(folder, 4)
    write_run(folder, "chain", [own_sample(n, "chain", f"another {n % 2}") for n in range(1, 7)])
    group = only_group(folder)
    assert_numbers_are_those_of_the_files(group)
    cells = read_page(folder).rows()["chain"]
    assert cells["speed-up (same prompts)"] == "1.20x"
    assert cells["acceptance rate"] == "0.429"
    assert cells["same text"] == "0/3"
    assert cells["samples"] == "6"


def test_the_table_is_the_one_of_print_benchmark_stats(folder: Path) -> None:
    write_both(folder, 4)
    (table,) = comparison_tables([only_group(folder).group], show_all=True)
    rows = read_page(folder).rows()
    for row in table.rows:
        cells = rows[str(row["strategy"])]
        for column in table.shown[1:]:
            assert cells[column.header] == " / ".join(column.cells(row))


@pytest.mark.shared_data
def test_the_originals_numbers_come_out_as_published() -> None:
    groups = {group.group.target: group for group in groups_of(ORIGINALS, max_samples=0)}
    assert {name: len(group.runs) for name, group in groups.items()} == {
        "Llama-3.2-1B-Instruct": 1, "Llama-3.1-8B-Instruct": 42, "Meta-Llama-3.1-70B-Instruct": 7,
    }  # fmt: skip
    large = groups["Meta-Llama-3.1-70B-Instruct"]
    assert_numbers_are_those_of_the_files(large)
    best = max(large.runs, key=lambda run: run.tokens_per_s)
    assert best.compared.summary.ms_per_token == pytest.approx(48.76, abs=0.005)
    assert best.compared.comparison is not None
    assert best.compared.comparison.speed_up == pytest.approx(2.636, abs=0.0005)
    fastest = [run.metadata["lookahead"] for run in groups["Llama-3.1-8B-Instruct"].shown]
    assert fastest == [0, 7, 3], "greedy, chain, async-chain"


@pytest.mark.shared_data
def test_the_page_of_fifty_files_shows_them_and_stays_small(tmp_path: Path) -> None:
    output = tmp_path / "page.html"
    assert report.main([str(ORIGINALS), "--output", str(output)]) == 0
    assert output.stat().st_size < 3_000_000
    reader = Reader()
    reader.feed(output.read_text(encoding="utf-8"))
    assert sum(len(run["samples"]) for run in reader.data["runs"]) == 560
    tables = [table for table in reader.tables if "ms/token" in table[0]]
    rows = [dict(zip(table[0], line, strict=True)) for table in tables for line in table[1:]]
    assert len(rows) == 3 + 42 + 1 + 7, "the 8B ones twice: the fastest, then all"
    greedy, best = rows[-7], min(rows[-7:], key=lambda row: float(row["ms/token"]))
    assert (greedy["ms/token"], greedy["J/token"]) == ("123.69", "~32.89")
    assert (best["ms/token"], best["J/token"]) == ("48.76", "~26.06")
    assert best["speed-up (published way)"] == "2.54x"


def test_texts_are_compared_with_greedy_of_the_same_sampling_only(folder: Path) -> None:
    write_both(folder)
    samples = [own_sample(n, "chain") for n in range(2)]
    write_run(folder, "chain", samples, sampling={"temperature": 0.8})
    greedy, sampled = groups_of(folder)
    assert [run.metadata["strategy"] for run in sampled.runs] == ["chain"]
    assert sampled.greedy_of(sampled.runs[0]) is None
    assert all(greedy.greedy_of(run) is greedy.runs[0] for run in greedy.runs)
    assert read_page(folder).data["runs"][2]["greedy"] is None


def test_utilization_is_of_the_runs_own_devices(folder: Path) -> None:
    stats = [
        {"timestamp": 0.0, "gpu_utilizations": [10, 50, 90]},
        {"timestamp": 0.5, "gpu_utilizations": [30, 70, 90]},
    ]
    write_both(folder, gpustats=stats)
    runs = by_strategy(folder)
    assert runs["greedy"].utilization == pytest.approx(60)
    assert runs["async-chain"].utilization == pytest.approx(40)
    assert read_page(folder).rows()["greedy"]["utilization"] == "60 %"


def test_devices_are_called_by_what_is_on_them() -> None:
    devices = [{"kind": "gpu", "name": "H200"}, {"kind": "process"}, {"kind": "cpu-package"}]
    models = [{"path": "org/Small", "devices": "cpu"}, {"path": "org/Large", "devices": "cuda:1"}]
    metadata = {
        "strategy": "chain", "model_configs": models,
        "monitor": {"stages": [[1], [0]], "devices": devices},
    }  # fmt: skip
    assert device_names(metadata, 3) == ["GPU 0: Large", "process: Small", "cpu-package: all"]
    assert device_names({**metadata, "monitor": None}, 2) == ["GPU 0: no model", "GPU 1: Large"]


@pytest.mark.parametrize(
    "stats",
    [
        [],
        [{}],
        [{"timestamp": 0.0, "gpu_utilizations": [], "gpu_powers": []}],
        [{"timestamp": 0.0, "gpu_utilizations": [None, None], "gpu_powers": [None, None]}],
        [{"timestamp": 0.0, "gpu_powers": [1.0, 1.0]}],
    ],
)
def test_without_its_devices_a_run_is_shown_without_their_numbers(
    folder: Path, stats: list[Any]
) -> None:
    write_both(folder, gpustats=stats)
    assert {run.utilization for run in only_group(folder).runs} == {None}
    assert "utilization" not in read_page(folder).rows()["greedy"]


# -- plots ---------------------------------------------------------------------------------------


def test_a_histogram_is_of_all_verifications_that_counted(folder: Path) -> None:
    sample = own_sample(0, "chain")
    sample["metrics"]["accepted_tokens"] = [[1, 0, 1, 14, 30, 300, 9, 10]]
    sample["metrics"]["model_times"][-1] = [0.1] * 8
    sample["metrics"]["offered_tokens"] = [[400] * 8]
    sample["metrics"]["model_starts"][-1] = [0.1] * 8
    write_run(folder, "chain", [sample])
    found = dict(zip(BINS, shares(only_group(folder).runs[0]), strict=True))
    expected = {(1, 1): 2 / 7, (9, 9): 1 / 7, (10, 14): 2 / 7, (30, None): 2 / 7}
    assert {bin_: share for bin_, share in found.items() if share} == pytest.approx(expected)


def test_lookahead_curves_are_in_the_order_of_the_numbers(folder: Path) -> None:
    write_both(folder, 1)
    assert lookahead_curves(only_group(folder)) is None
    for n in (10, 2, 1):
        write_run(folder, "chain", [own_sample(0, "chain")], f"chain_{n}", lookahead=n)
    chart = lookahead_curves(only_group(folder))
    assert chart is not None
    greedy, chain = chart["series"]
    assert [x for x, _ in chain["points"]] == [1, 2, 10]
    assert greedy["points"] == [(1, 200.0), (10, 200.0)]


def test_progress_is_of_a_sample_that_all_runs_have(folder: Path) -> None:
    write_run(folder, "greedy", [own_sample(n, "greedy") for n in (1, 2)])
    write_run(folder, "chain", [own_sample(n, "chain") for n in (2, 3)])
    chart = progress_curves(only_group(folder).shown)
    assert chart is not None and chart["title"] == "Tokens over time, sample 2"
    assert chart["series"][1]["points"] == [(0, 0), (0.4, 1), (0.6, 4), (1.0, 6), (1.0, 6)]


def test_curves_of_the_original_end_at_its_total() -> None:
    greedy = {"total_time": 2.0, "tokens_generated": 4, "token_times": [0.25, 0.25, 0.5]}
    assert curve(greedy) == [(0, 0), (1.0, 1), (1.25, 2), (1.5, 3), (2.0, 4), (2.0, 4)]
    chain = {
        "total_time": 2.0, "tokens_generated": 9, "model_times": [[0.1], [0.2, 0.6]],
        "accepted_tokens": [[4, 7]],
    }  # fmt: skip
    assert curve(chain) == [(0, 0), (0.5, 4), (2.0, 9), (2.0, 9)]


# -- who wrote a token ---------------------------------------------------------------------------


def test_verifications_tell_correction_bonus_and_end_apart() -> None:
    metrics = own_sample(0, "chain")["metrics"]
    found = verifications(metrics)
    assert found is not None
    assert found.accepted == [2, 0, 1], "the overtaken step is left out, the last was cut"
    assert found.own == "cu-"
    assert (found.offered, found.num_before) == ([4, 0, 3], 1)
    assert found.ends_s == pytest.approx([0.6, 0.8, 1.0])
    metrics["offered_tokens"] = [[2, 2, 0, 3]]
    bonus = verifications(metrics)
    assert bonus is not None and bonus.own == "bu-"


def test_with_branches_a_refusal_may_not_be_a_correction(folder: Path) -> None:
    assert without_corrections("cub-") == "eub-"
    write_run(folder, "async-chain", [own_sample(0, "async-chain")], tree=4)
    assert read_page(folder).data["runs"][0]["samples"][0]["written"]["own"] == "eu-"


def test_what_the_original_did_not_record_is_not_guessed() -> None:
    metrics = {
        "total_time": 2.0, "tokens_generated": 20, "model_times": [[0.1] * 9, [0.2, 0.6]],
        "accepted_tokens": [[4, 7]],
    }  # fmt: skip
    found = verifications(metrics)
    assert found is not None
    assert (found.accepted, found.own, found.num_before) == ([3, 6], "ee", 0)
    assert found.offered is None and found.ends_s is None
    assert verifications(own_sample(0, "greedy")["metrics"]) is None


# -- texts ---------------------------------------------------------------------------------------


def test_markup_escapes_all_that_is_not_markup() -> None:
    assert tag("b", "<&>", title='"<', class_="x", hidden=True, id=None) == (
        '<b title="&quot;&lt;" class="x" hidden>&lt;&amp;&gt;</b>'
    )
    assert join(Html("<i>"), "<i>") == "<i>&lt;i&gt;"
    script = embedded({"a": "</script><!--"})
    assert script.count("<") == 2 and "&" not in script


def test_no_text_breaks_the_page(folder: Path) -> None:
    write_both(folder, text=NASTY, input_text=NASTY, finish_reason=NASTY)
    for strategy in ("greedy", "chain"):
        samples = [own_sample(0, strategy, NASTY)]
        other = {"dataset": f"a/{NASTY}", "cpu": NASTY, NASTY: {NASTY: [NASTY]}}
        write_run(folder, strategy, samples, f"{strategy}-&-<b>", **other)
    (folder / "<i>&.json").write_text("[1]")
    reader = read_page(folder)
    assert NASTY in reader.data["texts"]
    num_ours = sum(attributes == {} for attributes, _ in reader.scripts)
    assert num_ours == 1, "the page's own script, and no other"
    assert not {"b", "i"} & {name for name, _ in reader.tags}
    assert "bad()" not in "".join(text for attributes, text in reader.scripts if not attributes)


def test_the_page_fetches_nothing(folder: Path) -> None:
    write_both(folder)
    reader = read_page(folder)
    for name, attributes in reader.tags:
        assert name not in ("link", "img", "iframe", "object"), name
        assert not {"src", "href", "srcset"} & set(attributes), (name, attributes)
    css, js = (
        Path(page_module.__file__).with_name(name).read_text() for name in ("page.css", "page.js")
    )
    assert "url(" not in css and "@import" not in css
    assert "fetch(" not in js and "innerHTML" not in js and "import(" not in js


def test_every_table_has_headers(folder: Path) -> None:
    write_both(folder)
    reader = read_page(folder)
    headers = [attributes for name, attributes in reader.tags if name == "th"]
    assert headers and all(attributes.get("scope") in ("col", "row") for attributes in headers)


def test_long_texts_and_late_samples_are_left_out_and_that_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_both(folder, 3, text="x" * 30_000)
    reader = read_page(folder, "--max-samples", "2")
    assert [len(run["samples"]) for run in reader.data["runs"]] == [2, 2]
    assert {len(text) for text in reader.data["texts"]} == {8, 20_000}
    assert reader.data["runs"][0]["samples"][0]["numCharacters"] == 30_000
    page = (folder.with_name("runs.html")).read_text()
    assert "4 of 6 samples are on this page" in page
    assert reader.rows()["greedy"]["samples"] == "3", "numbers are of all"

    monkeypatch.setattr(page_module, "MAX_DETAIL_BYTES", 21_000)
    data = read_page(folder).data
    assert [len(run["samples"]) for run in data["runs"]] == [1, 1], "in turn, not run by run"


def test_equal_texts_are_on_the_page_once(folder: Path) -> None:
    write_both(folder, 3)
    assert len(read_page(folder).data["texts"]) == 3 + 1


# -- the command ---------------------------------------------------------------------------------


def test_what_is_no_result_file_is_named_and_passed_over(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_both(folder)
    (folder / "race.json").write_text('{"race": 1}')
    whole = (folder / "greedy.json").read_text()
    (folder / "cut.json").write_text(whole[: len(whole) // 2])
    bad = own_sample(0, "chain")
    bad["metrics"]["accepted_tokens"] = [["many"]]
    write_run(folder, "chain", [bad])
    reader = read_page(folder)
    assert set(reader.rows()) == {"greedy", "async-chain"}
    captured = capsys.readouterr()
    assert captured.out.startswith("2 runs, 4 samples to look at: ")
    named = [line for line in captured.err.splitlines() if line.startswith("passed over: ")]
    assert [Path(line.split()[2].rstrip(":")).name for line in named] == [
        "chain.json", "cut.json", "race.json",
    ]  # fmt: skip
    assert "3 files passed over" in folder.with_name("runs.html").read_text()


def test_whatever_stands_in_a_file_there_is_a_page_or_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One value of a whole file is replaced by another, many times; a second file is good."""
    stats = [{"timestamp": 0.0, "gpu_utilizations": [1, 2], "gpu_powers": [1.0, 2.0]}]
    monitor = {"stages": [[0], [1]], "devices": [{"kind": "process", "name": "a"}]}
    samples = [own_sample(0, "chain", gpustats=stats), own_sample(1, "chain")]
    path = write_run(folder, "chain", samples, monitor=monitor, lookahead=3, tree=2)
    write_run(folder, "greedy", [own_sample(0, "greedy")])
    whole, rng = path.read_text(), random.Random(SEED)
    for _ in range(250):
        content = json.loads(whole)
        holder, key = rng.choice(list(places_in(content)))
        holder[key] = rng.choice(JUNK)
        path.write_text(json.dumps(content))
        output = folder.with_name("runs.html")
        assert report.main([str(folder), "--output", str(output)]) == 0, (SEED, key, holder)
        reader = Reader()
        reader.feed(output.read_text(encoding="utf-8"))
        assert reader.data["runs"], (SEED, key, holder)
    capsys.readouterr()


def places_in(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in it, with each of its keys."""
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    for key in keys:
        yield value, key
        yield from places_in(value[key])


def test_it_fails_only_if_nothing_is_left(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "race.json").write_text("{}")
    output = folder / "page.html"
    assert report.main([str(folder), "--output", str(output)]) == 1
    passed_over, error = capsys.readouterr().err.splitlines()
    assert "race.json" in passed_over
    assert error.startswith("error: none of 1 files could be used")
    assert not output.exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["missing"], "no file or folder missing"),
        (["runs", "--output", "page.json"], "--output is page.json; it must end in .html"),
        (["runs", "--output", "no/page.html"], "--output: there is no folder no"),
        (["runs", "--output", "folder.html"], "--output: folder.html is a folder"),
        (["runs", "--max-samples", "-1"], "--max-samples: -1 is not a count"),
        (["empty"], "empty has no .json files"),
    ],
)
def test_wrong_input_is_one_line_before_any_work(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    named: str,
) -> None:
    write_both(folder)
    monkeypatch.chdir(folder.parent)
    for name in ("folder.html", "empty"):
        Path(name).mkdir()
    monkeypatch.setattr(report, "make_page", None)
    assert report.main(flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line


def test_a_page_is_replaced_by_a_newer_one(folder: Path) -> None:
    write_both(folder)
    folder.with_name("runs.html").write_text("old")
    assert read_page(folder).data
    assert not list(folder.parent.glob("*.tmp"))


def test_the_memory_does_not_grow_with_the_file(folder: Path) -> None:
    """Sixty megabytes of texts, samples beyond the first ones as digests."""
    text = "x" * 20_000
    write_run(folder, "greedy", [own_sample(index, "greedy", text) for index in range(3000)])
    assert (folder / "greedy.json").stat().st_size > 60_000_000
    code = (
        "import sys; from pathlib import Path; from pipespec.report import main\n"
        "assert main([sys.argv[1], '--output', sys.argv[2]]) == 0\n"
        "lines = Path('/proc/self/status').read_text().splitlines()\n"
        "print(next(line.split()[1] for line in lines if line.startswith('VmHWM')))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(folder / "page.html")],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    peak_kib = int(ended.stdout.splitlines()[-1])
    assert peak_kib < 60_000, "Python and its modules take half of that"
