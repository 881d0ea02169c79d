"""What may go wrong with W&B, played by a module of the same name; and the table of keys."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from pipespec.errors import UsageError
from pipespec.metrics.verifications import Verification, accepted_ids, target_verifications
from pipespec.tracking import Tracker
from pipespec.tracking.keys import (
    KEYS,
    When,
    end_values,
    facts_of,
    own_values,
    sample_values,
)
from pipespec.tracking.tables import tables
from pipespec.tracking.wandb_runs import WandbOptions, open_wandb

METADATA = {"strategy": "greedy", "model_configs": [{"path": "a/target"}]}


class CommError(Exception):
    """What W&B raises for its server."""


class FakeRun:
    url = "https://example/run"
    disabled = False

    def __init__(self, module: FakeWandb, options: dict[str, Any]) -> None:
        self.module = module
        self.options = options
        self.settings = SimpleNamespace(sync_dir="/there/wandb/run-1")
        self.rows: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.config = self
        self.exit_codes: list[int] = []

    def update(self, values: object, allow_val_change: bool) -> None:
        assert allow_val_change

    def log(self, row: dict[str, Any]) -> None:
        self.module.raise_for("log")
        self.rows.append(row)

    def finish(self, exit_code: int) -> None:
        self.exit_codes.append(exit_code)
        self.module.raise_for("finish")


class FakeWandb(ModuleType):
    """failures: what is raised in which call, by the number of the call."""

    __version__ = "0.0"
    errors = SimpleNamespace(CommError=CommError)

    def __init__(self, mode: str = "online", is_logged_in: bool = True) -> None:
        super().__init__("wandb")
        self.mode = mode
        self.is_logged_in = is_logged_in
        self.failures: dict[tuple[str, int], Exception] = {}
        self.calls: list[str] = []
        self.runs: list[FakeRun] = []

    def raise_for(self, call: str) -> None:
        self.calls.append(call)
        error = self.failures.get((call, self.calls.count(call)))
        if error is not None:
            raise error

    def Settings(self, **values: Any) -> Any:  # noqa: N802 - as in W&B
        return SimpleNamespace(**values)

    def setup(self, settings: object = None) -> Any:
        self.raise_for("setup")
        return SimpleNamespace(settings=SimpleNamespace(mode=self.mode, project=None))

    def login(self, prompt: bool, verify: bool) -> bool:
        assert not prompt
        return self.is_logged_in

    def init(self, **options: Any) -> FakeRun:
        self.raise_for("init")
        self.runs.append(FakeRun(self, options))
        return self.runs[-1]

    def Table(self, columns: list[str], data: list[list[Any]]) -> Any:  # noqa: N802
        return (columns, data)

    def teardown(self) -> None:
        self.raise_for("teardown")


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWandb]:
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    yield module
    assert module.calls[-1] == "teardown"


def sample(index: int, **more: Any) -> dict[str, Any]:
    metrics = {"total_time": 2.0, "tokens_generated": 4, "num_target_forwards": 4, **more}
    return {
        "sample_index": index, "strategy": "greedy", "metrics": metrics, "output_text": "out",
        "input_text": "in", "gpustats": [],
    }  # fmt: skip


def use(tracker: Tracker, num_runs: int = 1, num_samples: int = 3) -> None:
    """Runs of some samples, each from its start to its end."""
    for _ in range(num_runs):
        with tracker.run(METADATA, Path("/there")) as tracked:
            results = [sample(index) for index in range(num_samples)]
            for result in results:
                tracked.log_sample(result, METADATA)
            tracked.log_end(results, METADATA, results, decode=str)


def test_a_run_is_closed_with_what_became_of_it(wandb: FakeWandb) -> None:
    said: list[str] = []
    with open_wandb(WandbOptions(name="mine", entity="us"), said.append) as tracker:
        use(tracker)
        with pytest.raises(KeyboardInterrupt), tracker.run(METADATA, Path("/there")):
            raise KeyboardInterrupt
    first, second = wandb.runs
    assert (first.exit_codes, second.exit_codes) == ([0], [1])
    assert first.options["project"] == "pipespec"
    assert (first.options["entity"], first.options["name"]) == ("us", "mine")
    assert [row["generation step"] for row in first.rows[:-1]] == [4, 8, 12]
    assert said == ["W&B: https://example/run"] * 2


@pytest.mark.parametrize(
    ("call", "number", "num_rows"),
    [("log", 1, [0]), ("log", 2, [1]), ("log", 4, [3]), ("finish", 1, [4]), ("init", 1, [])],
)
def test_a_failure_is_said_once_and_ends_the_logging_of_the_command(
    call: str, number: int, num_rows: list[int], wandb: FakeWandb
) -> None:
    wandb.failures[call, number] = RuntimeError("gone\nfor good")
    said: list[str] = []
    with open_wandb(WandbOptions(), said.append) as tracker:
        use(tracker, num_runs=3)
    assert [len(run.rows) for run in wandb.runs] == num_rows
    (line,) = [line for line in said if "http" not in line]
    assert "(RuntimeError: gone)" in line
    assert "going on without it" in line


def test_where_the_server_fails_all_runs_are_logged_offline(wandb: FakeWandb) -> None:
    wandb.failures["init", 1] = CommError("timed out")
    said: list[str] = []
    with open_wandb(WandbOptions(is_group=True), said.append) as tracker:
        use(tracker, num_runs=2)
    assert said[0] == "W&B: logging offline, because the server failed: CommError: timed out"
    assert [run.options["mode"] for run in wandb.runs] == ["offline", "offline"]
    assert [len(run.rows) for run in wandb.runs] == [4, 4]
    assert wandb.calls.count("init") == 3


def test_an_upload_that_takes_too_long_is_left_for_later(wandb: FakeWandb) -> None:
    wandb.failures["finish", 1] = TimeoutError()
    said: list[str] = []
    with open_wandb(WandbOptions(), said.append) as tracker:
        use(tracker, num_runs=2)
    assert said[1].endswith("`wandb sync` uploads /there/wandb/run-1")
    assert [len(run.rows) for run in wandb.runs] == [4, 4]


def test_nobody_logged_in_is_an_error_unless_nothing_is_uploaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for mode, is_error in (("online", True), ("offline", False), ("disabled", False)):
        monkeypatch.setitem(sys.modules, "wandb", FakeWandb(mode, is_logged_in=False))
        if is_error:
            with pytest.raises(UsageError, match="wandb login"), open_wandb(WandbOptions(), print):
                pass
        else:
            with open_wandb(WandbOptions(), print):
                pass


def test_a_version_that_is_too_old_is_named(wandb: FakeWandb) -> None:
    wandb.failures["setup", 1] = TypeError("unexpected keyword")
    with (
        pytest.raises(UsageError, match=r"wandb 0.0 could not be set up \(TypeError"),
        open_wandb(WandbOptions(), print),
    ):
        pass


@pytest.mark.parametrize("found", [None, ModuleType("wandb")])
def test_a_missing_package_is_an_error_also_where_a_folder_has_its_name(
    found: ModuleType | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", found)
    with (
        pytest.raises(UsageError, match="pip install") as caught,
        open_wandb(WandbOptions(), print),
    ):
        pass
    assert str(caught.value).startswith("--use-wandb: the package wandb ")
    assert "\n" not in str(caught.value)


# -- the table of keys ----------------------------------------------------------------------------


def test_every_key_of_the_studies_is_in_the_table_once() -> None:
    names = [key.name for key in KEYS]
    assert len(names) == len(set(names)) == 23
    assert all(bool(key.waits_for) is (key.when is When.NEVER) for key in KEYS)


def test_every_key_is_explained_in_the_page_on_results() -> None:
    page = (Path(__file__).parents[1] / "results" / "README.md").read_text(encoding="utf-8")
    lines = page.splitlines()
    for key in KEYS:
        (line,) = [line for line in lines if line.startswith("|") and f"`{key.name}`" in line]
        if key.when is When.NEVER:
            assert key.waits_for in line
        else:
            assert f"| {key.unit} |" in line


def test_only_gpus_count_as_gpus() -> None:
    readings = [
        {"gpu_utilizations": [40.0, 99.0, 60.0], "gpu_memories": [50, 1, None],
         "memory_used_mib": [1024.0, 7.0, 2048.0]},
        {"gpu_utilizations": [80.0, 99.0, 100.0], "gpu_memories": [70, 1, None],
         "memory_used_mib": [1024.0, 7.0, 4096.0]},
    ]  # fmt: skip
    devices = [{"kind": "gpu"}, {"kind": "process"}, {"kind": "gpu"}]
    result = {**sample(0), "gpustats": readings}
    values = sample_values(facts_of([result], {**METADATA, "monitor": {"devices": devices}}))
    assert values["gpu SM utilization (%)"] == 70
    assert values["gpu memory (MB)"] == 2048
    assert values["gpu memory usage (%)"] == 60
    assert not any("gpu" in key for key in sample_values(facts_of([sample(0)], METADATA)))


def test_what_is_not_known_is_left_out() -> None:
    metadata = {**METADATA, "strategy": "chain"}
    original = sample(0, accepted_tokens=[[3]], model_times=[[0.5], [0.5]])
    facts = facts_of([original], metadata)
    assert set(end_values(facts)) == {"assisted_latency_tok", "assisted_thr"}
    assert "acceptance rate (%)" not in sample_values(facts)
    assert tables([original], metadata, str) == {}


def test_of_rates_of_several_pairs_the_targets_has_the_plain_name() -> None:
    pairs: dict[str, Sequence[Any]] = {
        "accepted_tokens": [[2], [3]], "num_accepted": [1, 2], "num_offered": [2, 4],
    }  # fmt: skip
    values = own_values(facts_of([sample(0, **pairs)], {**METADATA, "strategy": "chain"}))
    assert values["pipespec/acceptance_rate/0"] == 0.5
    assert values["pipespec/acceptance_rate"] == 0.5
    assert values["pipespec/block_efficiency/0"] == 2
    assert values["pipespec/block_efficiency"] == 3


# -- verifications --------------------------------------------------------------------------------


def test_the_last_verification_may_end_with_an_accepted_token() -> None:
    metrics = {"offered_tokens": [[3, 2, 4]], "accepted_tokens": [[2, 0, 4]], "num_accepted": [5]}
    assert target_verifications(metrics) == [Verification(3, 1, 2), Verification(4, 4, 4)]
    result = {"metrics": metrics, "output_ids": [10, 11, 12, 13, 14, 15, 16]}
    assert accepted_ids(result) == [11, 13, 14, 15, 16]
    assert accepted_ids({**result, "output_ids": [10, 11]}) == []
