"""`python -m pipespec.fit_emulation`: what it fits to files of a known process is that process, and
what it fitted to the published greedy and chain runs predicts their async-chain runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipespec.config import Schedule, load_models_config
from pipespec.emulation import Oracle, Stretches, fit
from pipespec.emulation.hidden import fit_two_states
from pipespec.fit_emulation import main, observations, read_published
from pipespec.hashing import extend, hash_tokens
from pipespec.metrics import summarise
from pipespec.results import load_results
from pipespec.simulate.prediction import Workload, emulations_of, predict

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs" / "models"
PUBLISHED = ROOT.parent / "shared" / "data" / "pipespec_results"
needs_published = pytest.mark.skipif(
    not PUBLISHED.is_dir(), reason=f"the original's result files are not in {PUBLISHED}"
)
LLAMAS = ("Llama-3.2-1B-Instruct", "Llama-3.1-8B-Instruct", "Meta-Llama-3.1-70B-Instruct")
DRAFT = Oracle(0.97, 4096, hard_agreement=0.75, stretches=Stretches(30.0, 6.0))
LOOKAHEAD = 8


def result(index: int, **metrics: Any) -> dict[str, Any]:
    texts = {"strategy": "", "output_text": "", "input_text": "", "gpustats": []}
    return {"sample_index": index, **texts, "metrics": metrics}


def write_run(folder: Path, name: str, results: list[dict[str, Any]]) -> None:
    metadata = {"strategy": "", "model_configs": []}
    (folder / name).write_text(json.dumps({"metadata": metadata, "results": results}))


def chain_result(index: int, new_tokens: int) -> dict[str, Any]:
    """A text of the original's chain at 1 ms a draft token, 10 ms for one token and 40 ms for
    several; which of them a step was is known from `chain_lengths`' own rule."""
    prefix = hash_tokens((index,))
    right = []
    for _ in range(new_tokens):
        right.append(DRAFT.agrees(prefix))
        prefix = extend(prefix, DRAFT.target(prefix))
    lengths, seconds, at, goes_on = [], [], 0, True
    while at + LOOKAHEAD < new_tokens:
        drafted = right[at : at + LOOKAHEAD - 1] if goes_on else []
        length = drafted.index(False) + 1 if False in drafted else len(drafted) + 1
        lengths.append(length)
        seconds.append(0.04 if goes_on else 0.01)
        at += length
        goes_on = not goes_on or length < LOOKAHEAD or right[at - 1]
    return result(
        index,
        model_times=[[0.001] * 50, seconds],
        accepted_tokens=[lengths],
        total_time=1.0,
        tokens_generated=at + 1,
    )


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder with greedy and chain runs of `DRAFT` and its target."""
    for name, step_s in (("draft", 0.001), ("target", 0.01)):
        texts = [
            result(n, token_times=[], total_time=0.3 + step_s * (count - 1), tokens_generated=count)
            for n, count in enumerate((50, 80, 120))
        ]
        write_run(tmp_path, f"greedy_{name}.json", texts)
    write_run(tmp_path, "chain_draft-target_8.json", [chain_result(n, 1000) for n in range(6)])
    return tmp_path


def test_a_fit_finds_the_process_that_wrote_the_files(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = runs / "emulated.json"
    arguments = [str(runs), "--models", "draft", "target", "--output", str(output)]
    assert main([*arguments, "--num-texts", "2"]) == 0
    draft, target = load_models_config(output)
    assert (draft.name, target.name) == ("emulated-draft", "emulated-target")
    assert draft.emulated is not None and target.emulated is not None
    assert draft.emulated["step_ms"] == {"1": 1.0}
    assert target.emulated["step_ms"] == {"1": 10.0, "2": 40.0, "8": 40.0}
    assert draft.emulated["agreement"]["easy"] == pytest.approx(0.97, abs=0.015)
    assert draft.emulated["agreement"]["hard"] == pytest.approx(0.75, abs=0.12)
    assert draft.emulated["stretches"] == target.emulated["stretches"]
    printed = capsys.readouterr().out.splitlines()
    assert any("distance of the distributions" in line for line in printed)
    assert all("emulated" in line for line in printed if "ms/token" in line)


def test_what_a_chain_run_tells_of_each_position_is_what_the_draft_does(runs: Path) -> None:
    published = read_published(runs, ("draft", "target"))
    num_known = 0
    for text, found in enumerate(observations(published)):
        prefix = hash_tokens((text,))
        for (right,) in found:
            if right is not None:
                assert right == DRAFT.agrees(prefix)
                num_known += 1
            prefix = extend(prefix, DRAFT.target(prefix))
    assert num_known > 5500


def test_a_one_token_step_is_told_from_a_rejected_first_draft_by_its_time() -> None:
    texts = [
        result(0, accepted_tokens=[[3, 3, 1, 3, 1]], model_times=[[], [9, 4, 4, 4, 1]]),
    ]
    run = fit.ChainRun(("draft", "target"), 3, texts)
    seen = fit.agreement(run)[0]
    #        three accepted twice, the bonus token drafted right; then the first draft is wrong;
    assert seen[:7] == [True, True, True, True, True, True, False]
    #        then all right but for the bonus token, on which nothing could be verified
    assert seen[7:] == [True, True, False, None]


def test_a_fit_of_two_states_finds_them_in_a_sequence_that_has_them() -> None:
    prefix, items = hash_tokens((7,)), []
    for _ in range(6000):
        items.append((DRAFT.agrees(prefix),))
        prefix = extend(prefix, DRAFT.target(prefix))
    states = fit_two_states([items], 1)
    easy, hard = states.agreement(0)
    assert easy == pytest.approx(0.97, abs=0.01)
    assert hard == pytest.approx(0.75, abs=0.1)
    assert sum(pair[0] for pair in states.outcomes.values()) == pytest.approx(1.0)


def test_lengths_that_have_nothing_in_common_are_at_distance_one() -> None:
    assert fit.length_distance([1, 2], [3, 3]) == 1.0
    assert fit.length_distance([1, 2, 2, 4], [4, 2, 1, 2]) == 0.0
    assert fit.length_distance([1, 1], [1, 2]) == 0.5


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["--models", "draft"], "--models names 1; it must be two or three"),
        (["--models", "small", "target"], "greedy_small.json: No such file"),
        (["--rank-exponent", "-1"], "--rank-exponent is -1.0"),
        (["--num-texts", "-1"], "--num-texts is -1"),
        (["--output", "/nowhere/emulated.json"], "--output: there is no folder /nowhere"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    runs: Path, changes: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(runs), "--models", "draft", "target", "--output", str(runs / "out.json")]
    assert main([*arguments, "--num-texts", "0", *changes]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


def test_a_folder_without_the_chain_run_is_told(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (runs / "chain_draft-target_8.json").unlink()
    arguments = [str(runs), "--models", "draft", "target", "--output", str(runs / "out.json")]
    assert main(arguments) == 2
    assert "there is no file chain_draft-target_LOOKAHEAD.json" in capsys.readouterr().err
    assert not (runs / "out.json").exists()


# What the shipped configs predict


# ms/token of the original's async-chain runs: total time over tokens, files
# async-chain_*_0.json of BradMcDanel/pipespec (arXiv 2505.01572). Those three wait for 4 drafted
# tokens although they say "lookahead": 0: not one of their 1773 verifications by the 70B is a
# forward over one token (120 ms; the fastest took 424), and most accepted lengths are 5.
ASYNC_MS = {(0, 2): 54.85, (1, 2): 54.52, (0, 1, 2): 48.76}
WAITED_FOR = 4
AS_PUBLISHED = Schedule("pipespec", WAITED_FOR, run_ahead=100)


def predicted_ms(config: str, models: tuple[int, ...], schedule: Schedule, num_texts: int) -> float:
    found = emulations_of(load_models_config(CONFIGS / config))
    used = [found[index] for index in models]
    return predict(used, "async-chain", schedule, Workload(num_texts)).ms_per_token


@pytest.mark.parametrize(("models", "published_ms"), ASYNC_MS.items(), ids=str)
def test_the_70b_config_predicts_the_published_async_runs(
    models: tuple[int, ...], published_ms: float
) -> None:
    predicted = predicted_ms("emulated-llama3-70b.json", models, AS_PUBLISHED, 10)
    assert predicted == pytest.approx(published_ms, rel=0.10)


def test_the_8b_config_predicts_the_best_of_the_published_async_runs() -> None:
    """The original's lookahead 3, which waits for two drafted tokens. (Its lookahead 0, 14.53, is
    missed by a little more: there its handshake after each verification costs the most, and
    PipeSpec has none.)"""
    schedule = Schedule("pipespec", 2, run_ahead=100)
    predicted = predicted_ms("emulated-llama3-8b.json", (0, 1), schedule, 10)
    assert predicted == pytest.approx(13.90, rel=0.10)


@pytest.mark.parametrize(("strategy", "tokens_per_s"), [("greedy", 54.7), ("chain", 161.8)])
def test_the_h100_config_has_the_published_speeds(strategy: str, tokens_per_s: float) -> None:
    """SSD, arXiv 2603.03251; the chain with its best number of draft tokens."""
    models = emulations_of(load_models_config(CONFIGS / "emulated-h100-70b.json"))
    schedule = Schedule(lookahead=7)
    prediction = predict(models, strategy, schedule, Workload(20))
    assert 1e3 / prediction.ms_per_token == pytest.approx(tokens_per_s, rel=0.05)


@needs_published
@pytest.mark.parametrize("models", ASYNC_MS, ids=str)
def test_the_published_async_figures_are_those_of_the_files(models: tuple[int, ...]) -> None:
    """And the files say of themselves that no verification was a forward over one token."""
    names = "-".join(LLAMAS[index] for index in models)
    results = load_results(PUBLISHED / f"async-chain_{names}_0.json").results
    assert summarise(results).ms_per_token == pytest.approx(ASYNC_MS[models], abs=0.006)
    assert min(s for r in results for s in r["metrics"]["model_times"][-1]) > 0.42
    lengths = [k for r in results for k in r["metrics"]["accepted_tokens"][0]]
    assert max(set(lengths), key=lengths.count) == WAITED_FOR + 1


@needs_published
@pytest.mark.parametrize(
    ("config", "models"),
    [("emulated-llama3-70b.json", LLAMAS), ("emulated-llama3-8b.json", LLAMAS[:2])],
)
def test_the_shipped_configs_are_what_the_published_files_give(
    config: str, models: tuple[str, ...], tmp_path: Path
) -> None:
    output = tmp_path / config
    arguments = ["--models", *models, "--output", str(output), "--num-texts", "0"]
    assert main([str(PUBLISHED), *arguments]) == 0
    assert output.read_text() == (CONFIGS / config).read_text()
