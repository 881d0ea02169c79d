"""Result files: nothing finished is ever lost, and nothing of another run is ever mixed in."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipespec.config import GenerationParams, ModelConfig, SamplingParams, Schedule
from pipespec.errors import DataError, PipeSpecError, UsageError
from pipespec.results import (
    OutputPlan,
    ResultWriter,
    describe_environment,
    load_results,
    metadata_differences,
    partial_path,
    plan_output,
    result_file_name,
    run_metadata,
    sample_result,
)
from pipespec.results.environment import commit_of

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT.parent / "shared" / "data" / "pipespec_results"
MODELS = (
    ModelConfig("org/small", ("cuda:0",), "float16"),
    ModelConfig("org/large", ("cuda:1", "cuda:2"), quantize="4bit"),
)
METRICS = {"model_times": [[0.1], [0.2]], "accepted_tokens": [[3]]}
METRICS |= {"total_time": 1.0, "tokens_generated": 4}


def metadata(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "strategy": "async-chain",
        "models": MODELS,
        "generation": GenerationParams(stop=("\n\n",)),
        "schedule": Schedule(lookahead=4),
        "dataset": "humaneval",
        "dataset_source": "openai/openai_humaneval",
        "dataset_digest": "0123",
        "num_samples": 3,
        "generation_prompt": True,
        "runner": "auto",
        "environment": {"host": "here", "commit": None},
        "started_at": "2025-06-01T12:00:00+00:00",
    }
    return run_metadata(**{**values, **changes})


def sample(index: int, text: str = "out") -> dict[str, Any]:
    return sample_result(index, "async-chain", METRICS, text, "in")


def finished(path: Path, **changes: Any) -> Path:
    with ResultWriter(path, metadata(**changes)) as writer:
        writer.add(sample(0))
        return writer.finish()


def interrupted(path: Path, *indexes: int, **changes: Any) -> Path:
    with ResultWriter(path, metadata(**changes)) as writer:
        for index in indexes:
            writer.add(sample(index))
    return partial_path(path)


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- names and metadata -----------------------------------------------------------------------


def test_file_names_are_those_of_the_original() -> None:
    models = ["Llama-3.2-1B-Instruct", "Llama-3.1-8B-Instruct"]
    assert result_file_name("greedy", models, 5) == "greedy_Llama-3.1-8B-Instruct.json"
    joined = "Llama-3.2-1B-Instruct-Llama-3.1-8B-Instruct"
    assert result_file_name("chain", models, 8) == f"chain_{joined}_8.json"
    assert result_file_name("async-chain", models, 0) == f"async-chain_{joined}_0.json"
    assert result_file_name("async-chain", models, None, True) == f"async-chain_{joined}_auto.json"


@pytest.mark.shared_data
def test_every_published_file_has_the_name_that_we_would_give_it() -> None:
    for path in sorted(PUBLISHED.glob("*.json")):
        stored = load_results(path).metadata
        names = [model["path"].split("/")[-1] for model in stored["model_configs"]]
        assert result_file_name(stored["strategy"], names, stored["lookahead"]) == path.name


def test_metadata_begin_with_the_originals_keys() -> None:
    values = metadata()
    first = ["strategy", "model_configs", "lookahead", "dataset", "num_samples"]
    assert list(values)[:5] == first
    assert values["lookahead"] == 4
    assert values["lookahead_mode"] == "fixed"
    assert values["model_configs"][1] == {
        "path": "org/large",
        "devices": ["cuda:1", "cuda:2"],
        "dtype": "bfloat16",
        "quantize": "4bit",
    }
    assert json.loads(json.dumps(values, allow_nan=False)) == values


def test_greedy_knows_only_the_target_and_no_schedule() -> None:
    one = metadata(strategy="greedy", schedule=Schedule(lookahead=4))
    other = metadata(strategy="greedy", schedule=Schedule(policy="pipespec"), models=MODELS[1:])
    assert one == other
    assert one["lookahead"] == 0
    assert [model["path"] for model in one["model_configs"]] == ["org/large"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"models": MODELS[1:]}, "number of model_configs (2 there, 1 now)"),
        (
            {"models": (MODELS[0], ModelConfig("org/large", ("cuda:1", "cuda:2")))},
            "model_configs[1].quantize (4bit there, none now)",
        ),
        (
            {"generation": GenerationParams(64, stop=("\n\n",))},
            "max_new_tokens (128 there, 64 now)",
        ),
        ({"generation": GenerationParams()}, "stop"),
        ({"schedule": Schedule(lookahead=5)}, "lookahead (4 there, 5 now)"),
        (
            {"schedule": Schedule("pipespec", 4, outcomes=4)},
            "policy (adaptive there, pipespec now)",
        ),
        ({"schedule": Schedule(lookahead=4, run_ahead=8)}, "run_ahead (64 there, 8 now)"),
        ({"dataset_digest": "4567"}, "dataset_digest (0123 there, 4567 now)"),
        ({"num_samples": 4}, "num_samples (3 there, 4 now)"),
        ({"generation_prompt": False}, "generation_prompt"),
        ({"runner": "hf"}, "runner (auto there, hf now)"),
    ],
)
def test_a_difference_in_what_is_run_is_named(changes: dict[str, Any], named: str) -> None:
    (difference,) = metadata_differences(metadata(), metadata(**changes))
    assert difference.startswith(named)


def test_where_and_when_it_ran_is_no_difference() -> None:
    elsewhere = metadata(environment={"host": "there"}, started_at="2026", dataset_source="./x")
    assert metadata_differences(metadata(), elsewhere) == []


def test_a_lookahead_that_the_policy_chose_may_come_out_differently() -> None:
    auto = metadata(schedule=Schedule())
    assert metadata_differences({**auto, "lookahead": 6}, auto) == []
    assert "lookahead_mode" in metadata_differences(metadata(), auto)[0]


def test_sampling_is_compared_exactly_after_a_round_trip(tmp_path: Path) -> None:
    sampling = SamplingParams(0.1 + 0.2, 0.987654321012, 7, 1e-9, (1 << 63) - 1)
    changes = {"generation": GenerationParams(sampling=sampling)}
    stored = load_results(finished(tmp_path / "a.json", **changes)).metadata
    assert metadata_differences(stored, metadata(**changes)) == []
    warmer = GenerationParams(sampling=SamplingParams(0.3, 0.987654321012, 7, 1e-9, (1 << 63) - 1))
    assert metadata_differences(stored, metadata(generation=warmer))


def test_the_environment_is_plain_and_names_versions() -> None:
    facts = describe_environment()
    assert facts["versions"]["python"] == sys.version.split()[0]
    assert facts["versions"]["torch"]
    assert facts["host"]
    assert json.loads(json.dumps(facts)) == facts


def test_a_file_that_its_checkout_does_not_track_has_no_commit(tmp_path: Path) -> None:
    git = ("git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x")
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        done = subprocess.run([*git, *command], check=False, capture_output=True, timeout=30)
        if done.returncode:
            pytest.skip("git does not work here")
    installed = tmp_path / "site-packages" / "module.py"
    installed.parent.mkdir()
    installed.write_text("", encoding="utf-8")
    assert commit_of(installed) is None
    subprocess.run([*git, "add", "."], check=True, timeout=30)
    commit = commit_of(installed)
    assert commit is not None
    assert commit.endswith("-dirty")
    assert len(commit) == 40 + len("-dirty")


# -- writing and reading ----------------------------------------------------------------------


def test_a_finished_file_is_read_back_in_order_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "run.json"
    with ResultWriter(path, metadata()) as writer:
        writer.add(sample(2))
        writer.add(sample(0))
        writer.update_metadata(pids=[11, 12], effective_schedule={"lookahead": 4})
        assert writer.finish() == path
    assert files_in(path.parent) == ["run.json"]
    run = load_results(path)
    assert [result["sample_index"] for result in run.results] == [0, 2]
    assert run.metadata == {**metadata(), "pids": [11, 12], "effective_schedule": {"lookahead": 4}}
    keys = ["sample_index", "strategy", "metrics", "output_text", "input_text", "gpustats"]
    assert list(run.results[0]) == keys


def test_files_are_compact_and_numbers_are_as_long_as_they_mean(tmp_path: Path) -> None:
    metrics = {**METRICS, "total_time": 0.123456789, "rate": float("nan"), "more": (1e-9, 5)}
    with ResultWriter(tmp_path / "a.json", metadata()) as writer:
        writer.add(sample_result(0, "chain", metrics, "out", "in"))
        text = writer.finish().read_text(encoding="utf-8")
    assert '"total_time":0.1234568,' in text
    assert '"rate":null,"more":[0.0,5]' in text
    assert ": " not in text
    assert "NaN" not in text


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.integers(0, 9), st.text(st.characters()), min_size=1), st.integers(0, 9))
def test_any_texts_in_any_order_with_a_resume_anywhere_survive(
    texts: dict[int, str], cut: int
) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.json"
        items = list(texts.items())
        with ResultWriter(path, metadata()) as writer:
            for index, text in items[:cut]:
                writer.add(sample(index, text))
        with ResultWriter.resume(path, metadata()) as writer:
            assert writer.done == {index for index, _ in items[:cut]}
            for index, text in items[cut:]:
                writer.add(sample(index, text))
            writer.finish()
        results = load_results(path).results
        assert {result["sample_index"]: result["output_text"] for result in results} == texts


def test_what_becomes_known_later_joins_a_samples_metrics_and_survives(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with ResultWriter(path, metadata()) as writer:
        writer.add(sample(0))
        writer.add_metrics(0, first_divergence=7, divergence_margin=1e-5)
    with ResultWriter.resume(path, metadata()) as writer:
        assert writer.results[0]["metrics"]["first_divergence"] == 7
        writer.finish()
    (result,) = load_results(path).results
    assert result["metrics"] == {**METRICS, "first_divergence": 7, "divergence_margin": 1e-5}


def test_half_a_surrogate_pair_in_a_text_does_not_lose_the_run(tmp_path: Path) -> None:
    with ResultWriter(tmp_path / "a.json", metadata()) as writer:
        writer.add(sample(0, "\ud83d"))
        writer.finish()
    assert load_results(tmp_path / "a.json").results[0]["output_text"] == "\ud83d"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is not JSON or was cut off"),
        (b'{"metadata":{"strategy":"greedy"', "is not JSON or was cut off"),
        (b"\xff\xfe\x00", "is not JSON or was cut off"),
        (b"[" * 100_000, "is not JSON or was cut off"),
        (b"[]", "holds no JSON object"),
        (b'{"a":1}', 'lacks "metadata" or "results"'),
        (b'{"metadata":{},"results":[]}', 'no text "metadata.strategy"'),
        (b'{"metadata":{"strategy":"x","model_configs":3},"results":[]}', "model_configs"),
        (b'{"metadata":{"strategy":"x","model_configs":[]},"results":[{}]}', "results[0] has no"),
        (
            b'{"metadata":{"strategy":"x","model_configs":[],"schema_version":99},"results":[]}',
            "schema version 99",
        ),
    ],
)
def test_a_file_that_is_no_result_file_is_refused_by_name(
    tmp_path: Path, content: bytes, complaint: str
) -> None:
    path = tmp_path / "foreign.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_results(path)
    assert str(path) in str(caught.value)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no\.json: No such file"):
        load_results(tmp_path / "no.json")


# -- interruptions ----------------------------------------------------------------------------

WRITER = """
import sys, time
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_results import ResultWriter, metadata, sample
with ResultWriter(Path(sys.argv[1]), metadata()) as writer:
    for index in range(1000):
        writer.add(sample(index, "x" * 100_000))
        print(index, flush=True)
"""


def start_writer(path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(path), str(ROOT / "tests")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def read_until(process: subprocess.Popen[str], wanted: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == wanted:
            return
    raise AssertionError("the writer ended early")


def test_kill_minus_nine_loses_no_finished_sample(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    with start_writer(path) as process:
        read_until(process, "2")
        process.send_signal(signal.SIGKILL)
    assert not path.exists()
    with ResultWriter.resume(path, metadata(started_at="later")) as writer:
        assert writer.done >= {0, 1, 2}
        added = max(writer.done) + 1
        assert writer.done == set(range(added))
        writer.add(sample(added))
        writer.finish()
    run = load_results(path)
    assert len(run.results) == added + 1
    assert all(result["output_text"] == "x" * 100_000 for result in run.results[:added])
    assert run.metadata["started_at"] == metadata()["started_at"]
    assert run.metadata["resumed"] == [{"started_at": "later", "host": "here", "commit": None}]
    assert files_in(tmp_path) == ["run.json"]


def test_a_second_writer_of_the_same_file_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    with start_writer(path) as process:
        read_until(process, "0")
        for resume in (False, True):
            with pytest.raises(
                UsageError, match=rf"another process \(pid {process.pid}\)"
            ) as caught:
                ResultWriter(path, metadata(), resume=resume)
            assert "\n" not in str(caught.value)
        process.kill()
    assert partial_path(path).stat().st_size > 100_000  # the refused writers did not empty it


def test_two_writers_in_one_process_are_refused_too(tmp_path: Path) -> None:
    with ResultWriter(tmp_path / "run.json", metadata()) as writer:
        with pytest.raises(UsageError, match=f"pid {os.getpid()}"):
            ResultWriter(tmp_path / "run.json", metadata())
        ResultWriter(tmp_path / "other.json", metadata()).close()
        writer.add(sample(0))


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "run.json.lock").write_text("1", encoding="utf-8")  # pid 1 lives, but holds no lock
    finished(tmp_path / "run.json")
    assert files_in(tmp_path) == ["run.json"]


@given(st.integers(0, 400))
@settings(max_examples=40, deadline=None)
def test_a_file_cut_anywhere_in_its_last_line_resumes_with_the_lines_before(cut: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.json"
        partial = interrupted(path, 0, 1)
        whole = partial.read_bytes()
        last = whole.rindex(b"\n", 0, -1) + 1
        partial.write_bytes(whole[: min(last + cut, len(whole) - 1)])
        with ResultWriter.resume(path, metadata()) as writer:
            assert writer.done == {0}
            writer.add(sample(1))
            writer.finish()
        assert len(load_results(path).results) == 2


def test_a_file_cut_in_its_first_line_starts_over(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    partial_path(path).write_bytes(b'{"metadata":{"strat')
    with ResultWriter.resume(path, metadata()) as writer:
        assert writer.done == frozenset()
        writer.add(sample(0))
        writer.finish()
    assert len(load_results(path).results) == 1


def test_damage_before_the_last_line_is_not_skipped(tmp_path: Path) -> None:
    partial = interrupted(tmp_path / "run.json", 0, 1)
    lines = partial.read_bytes().splitlines(keepends=True)
    partial.write_bytes(lines[0] + b"{garbage}\n" + lines[2])
    with pytest.raises(DataError, match="line 2 is damaged"):
        ResultWriter.resume(tmp_path / "run.json", metadata())
    assert files_in(tmp_path) == ["run.json.partial"]  # and the lock is free again


def test_an_interrupted_run_of_something_else_is_not_continued(tmp_path: Path) -> None:
    partial = interrupted(tmp_path / "run.json", 0)
    before = partial.read_bytes()
    with pytest.raises(UsageError, match=r"num_samples \(3 there, 9 now\).*--force"):
        ResultWriter.resume(tmp_path / "run.json", metadata(num_samples=9))
    assert partial.read_bytes() == before


def test_an_earlier_result_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = finished(tmp_path / "run.json", num_samples=1)
    with suppress(KeyboardInterrupt), ResultWriter(path, metadata()) as writer:
        writer.add(sample(0))
        raise KeyboardInterrupt
    assert load_results(path).metadata["num_samples"] == 1
    assert files_in(tmp_path) == ["run.json", "run.json.partial"]


def fail_from(monkeypatch: pytest.MonkeyPatch, call: int) -> Callable[[], None]:
    """`os.fsync` reports a full disk from its `call`-th call on; returns what ends that."""
    real, calls = os.fsync, 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls >= call:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return lambda: monkeypatch.setattr(os, "fsync", real)


def test_a_full_disk_is_one_line_and_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.json"
    with ResultWriter(path, metadata()) as writer:
        writer.add(sample(0))
        free = fail_from(monkeypatch, 1)
        with pytest.raises(PipeSpecError, match=r"No space left.* 1 finished samples are safe"):
            writer.add(sample(1))
        with pytest.raises(PipeSpecError, match="No space left"):
            writer.finish()
        free()
    assert files_in(tmp_path) == ["run.json.partial"]
    with ResultWriter.resume(path, metadata()) as writer:
        assert writer.done == {0}


def test_a_disk_that_takes_half_a_line_leaves_no_torn_line(tmp_path: Path) -> None:
    """With a real limit on the size of a file, so that the write itself is short."""
    limited = """
import resource, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_results import PipeSpecError, ResultWriter, metadata, sample
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
with ResultWriter(Path(sys.argv[1]), metadata()) as writer:
    writer.add(sample(0))
    try:
        writer.add(sample(1, "x" * 50_000))
    except PipeSpecError as error:
        print(error)
    writer.add(sample(2))
"""
    path = tmp_path / "run.json"
    done = subprocess.run(
        [sys.executable, "-c", limited, str(path), str(ROOT / "tests")],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert "File too large" in done.stdout
    with ResultWriter.resume(path, metadata()) as writer:
        assert writer.done == {0, 2}


# -- what to do with what is there ------------------------------------------------------------


def test_a_new_run_runs_and_its_folder_is_made(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run.json"
    assert plan_output(path, metadata()) is OutputPlan.RUN
    assert plan_output(path, metadata(), resume=True) is OutputPlan.RUN
    assert files_in(path.parent) == []


def test_the_same_run_is_skipped_unless_forced(tmp_path: Path) -> None:
    path = finished(tmp_path / "run.json")
    assert plan_output(path, metadata()) is OutputPlan.SKIP
    assert plan_output(path, metadata(), resume=True) is OutputPlan.SKIP
    assert plan_output(path, metadata(), force=True) is OutputPlan.RUN


def test_another_run_is_refused_with_the_keys_that_differ(tmp_path: Path) -> None:
    path = finished(tmp_path / "run.json")
    wanted = metadata(num_samples=9, schedule=Schedule(lookahead=5))
    with pytest.raises(UsageError) as caught:
        plan_output(path, wanted)
    message = str(caught.value)
    assert "lookahead (4 there, 5 now), num_samples (3 there, 9 now)" in message
    assert "--force" in message
    assert "\n" not in message
    assert plan_output(path, wanted, force=True) is OutputPlan.RUN


def test_a_file_of_the_original_is_not_taken_for_ours(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    stored = {"strategy": "async-chain", "model_configs": [], "lookahead": 4}
    path.write_text(json.dumps({"metadata": stored, "results": []}), encoding="utf-8")
    with pytest.raises(UsageError, match=r"schema_version \(none there, 1 now\)"):
        plan_output(path, metadata())


def test_a_damaged_file_is_refused_and_can_be_forced(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text("{", encoding="utf-8")
    with pytest.raises(UsageError, match=r"was cut off.*--force overwrites it"):
        plan_output(path, metadata())
    assert plan_output(path, metadata(), force=True) is OutputPlan.RUN


def test_an_unfinished_run_wants_a_decision(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    interrupted(path, 0, 1)
    with pytest.raises(UsageError, match=r"holds 2 samples.*--resume.*--force"):
        plan_output(path, metadata())
    assert plan_output(path, metadata(), resume=True) is OutputPlan.RESUME
    assert plan_output(path, metadata(), force=True) is OutputPlan.RUN
    with pytest.raises(UsageError, match="num_samples"):
        plan_output(path, metadata(num_samples=9), resume=True)


def test_force_and_resume_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="contradict"):
        plan_output(tmp_path / "run.json", metadata(), force=True, resume=True)


def test_a_folder_that_cannot_be_written_is_found_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    path = tmp_path / "file" / "humaneval" / "run.json"
    for start in (lambda: plan_output(path, metadata()), lambda: ResultWriter(path, metadata())):
        with pytest.raises(UsageError, match="--output-dir: cannot write to") as caught:
            start()
        assert caught.value.exit_code == 2
    (tmp_path / "closed").mkdir(mode=0o500)
    if os.geteuid() != 0:  # root may write everywhere
        with pytest.raises(UsageError, match="cannot write to"):
            plan_output(tmp_path / "closed" / "run.json", metadata())


def test_a_name_that_is_too_long_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="File name too long"):
        plan_output(tmp_path / f"{'x' * 300}.json", metadata())
