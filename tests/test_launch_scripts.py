"""The scripts in launch/ start what they say, with the flags that they are given."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from emulated import write_emulated, write_prompts

from pipespec.results import load_results
from pipespec.trace.check import check_trace

LAUNCH = Path(__file__).resolve().parents[1] / "launch"


def run_script(script: str, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(LAUNCH / script), *flags],
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_local_explains_itself() -> None:
    run = run_script("local.sh", "--help")
    assert run.returncode == 0, run.stderr
    assert "Usage: launch/local.sh [MODELS_CONFIG] [FLAG...]" in run.stdout


def test_local_runs_all_strategies_over_a_models_config(tmp_path: Path) -> None:
    config, data = write_emulated(tmp_path), write_prompts(tmp_path, ["one", "two"])
    flags = ["--dataset", data, "--max-new-tokens", "12", "--output-dir", str(tmp_path / "out")]
    run = run_script("local.sh", config, *flags)
    assert run.returncode == 0, run.stderr
    names = ["async-chain_draft-target_auto", "chain_draft-target_auto", "greedy_target"]
    files = sorted((tmp_path / "out").iterdir())
    assert [path.stem for path in files] == names
    assert all(len(load_results(path).results) == 2 for path in files)


def test_local_passes_on_how_the_benchmark_ended() -> None:
    run = run_script("local.sh", "nowhere.json")
    assert run.returncode == 2
    assert "there is no file nowhere.json" in run.stderr


def test_reproduce_paper_explains_itself() -> None:
    run = run_script("reproduce_paper.sh", "--help")
    assert run.returncode == 0, run.stderr
    assert "Usage: launch/reproduce_paper.sh [emulated|real] [70b|8b|all] [FLAG...]" in run.stdout
    wrong = run_script("reproduce_paper.sh", "13b")
    assert wrong.returncode == 2
    assert wrong.stderr == (
        "error: 13b is neither emulated, real, 70b, 8b, all nor a flag; see --help\n"
    )


def test_reproduce_paper_prints_the_published_table_beside_ours(tmp_path: Path) -> None:
    data, output = write_prompts(tmp_path, ["one"]), tmp_path / "out"
    flags = ["--dataset", data, "--max-new-tokens", "4"]
    run = run_script("reproduce_paper.sh", "emulated", "8b", *flags, OUTPUT_DIR=str(output))
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("EMULATED 8b: published, and ours\n")
    rows = [line.split() for line in run.stdout.splitlines() if " 1B > 8B " in line]
    assert [row[0] for row in rows] == ["chain", "async-chain", "async-chain"]
    assert not [row for row in rows if "-" in row], "a run is missing"
    assert len(list(output.glob("*.json"))) == 6

    again = run_script("reproduce_paper.sh", "emulated", "8b", *flags, OUTPUT_DIR=str(output))
    assert again.stderr.count("done before") == 6
    assert again.stdout == run.stdout


def test_reproduce_paper_ends_with_a_run_that_fails(tmp_path: Path) -> None:
    flags = ["--dataset", str(tmp_path / "nowhere.jsonl")]
    run = run_script("reproduce_paper.sh", "emulated", "8b", *flags, OUTPUT_DIR=str(tmp_path))
    assert run.returncode == 2
    assert "nowhere.jsonl" in run.stderr
    assert run.stdout == ""


def test_nsys_explains_itself_and_says_what_is_missing() -> None:
    run = run_script("nsys.sh", "--help")
    assert run.returncode == 0, run.stderr
    assert "Usage: launch/nsys.sh [MODELS_CONFIG] [FLAG...]" in run.stdout
    without = run_script("nsys.sh", NSYS="no-such-nsys")
    assert without.returncode == 2
    assert without.stderr == (
        "error: there is no no-such-nsys; install NVIDIA Nsight Systems, or name it with "
        "NSYS=PATH\n"
    )


def test_nsys_profiles_a_traced_benchmark(tmp_path: Path) -> None:
    """With an `nsys` that notes its options and runs its command here."""
    nsys, report = tmp_path / "nsys", tmp_path / "report"
    nsys.write_text(
        '#!/bin/bash\nwhile [[ $1 == profile || $1 == -* ]]; do echo "$1"; shift; done\nexec "$@"\n'
    )
    nsys.chmod(0o755)
    config, data = write_emulated(tmp_path), write_prompts(tmp_path, ["one"])
    flags = ["--dataset", data, "--max-new-tokens", "5", "--output-dir", str(tmp_path / "out")]
    run = run_script("nsys.sh", config, *flags, NSYS=str(nsys), REPORT=str(report))
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("profile\n--trace=cuda,nvtx,osrt\n")
    assert f"--output={report}\n" in run.stdout
    assert check_trace(tmp_path / "report.trace.json") == []


def test_the_slurm_job_runs_the_benchmark_as_a_job_step(tmp_path: Path) -> None:
    """With an `srun` that notes that it was asked and runs its command here."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in (
        ("srun", 'echo "srun was asked"; exec "$@"'),
        ("python", f'exec "{sys.executable}" "$@"'),
    ):
        (programs / name).write_text(f"#!/bin/sh\n{body}\n")
        (programs / name).chmod(0o755)
    run = run_script(
        "slurm/benchmark.sbatch",
        "--max-new-tokens",
        "5",
        PATH=f"{programs}{os.pathsep}{os.environ['PATH']}",
        SLURM_SUBMIT_DIR=str(LAUNCH.parent),
        MODELS_CONFIG=write_emulated(tmp_path),
        DATASET=write_prompts(tmp_path, ["one"]),
        OUTPUT_DIR=str(tmp_path / "out"),
        STRATEGY="greedy",
        VENV=str(tmp_path / "none"),
    )
    assert run.returncode == 0, run.stderr
    assert "srun was asked" in run.stdout
    (path,) = (tmp_path / "out").iterdir()
    assert load_results(path).results[0]["metrics"]["tokens_generated"] == 5
