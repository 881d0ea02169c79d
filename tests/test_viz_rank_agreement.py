"""The picture of what outcomes gain by rank agreement: what is simulated, and what is drawn."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from emulated import write_emulated

from pipespec.config import load_models_config
from pipespec.simulate.prediction import Workload
from viz import rank_agreement
from viz.rank_agreement import SCHEDULES, Panel, Point, draw, main, simulate

ROOT = Path(__file__).resolve().parents[1]
SHORT = Workload(num_texts=1, prompt_tokens=5, new_tokens=150)
DEMO = "configs/models/demo.json"


def test_more_second_choices_are_more_hits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_agreement, "SHARES", (0.1, 0.9))
    monkeypatch.setattr(rank_agreement, "CHAIN_LOOKAHEADS", (3,))
    models = load_models_config(Path(write_emulated(tmp_path, agreement=0.6)))
    panel = simulate("x", models, SHORT)
    assert panel == simulate("x", models, SHORT), "deterministic"
    assert set(panel.curves) == set(SCHEDULES)
    assert panel.chain > 0
    for rare, often in panel.curves.values():
        assert (rare.share, often.share) == (0.1, 0.9)
        assert rare.hit_rate is not None and often.hit_rate is not None
        assert often.hit_rate > rare.hit_rate + 0.3
        assert often.speed_up > panel.no_outcomes


def test_each_schedule_has_its_line_and_ranks_matter_to_no_other() -> None:
    points = (Point(0.1, 1.5, 0.2), Point(0.9, 2.0, 0.8))
    panel = Panel("config", 1.2, 1.4, dict.fromkeys(SCHEDULES, points))
    figure = draw([panel, panel], SHORT)
    speeds, _, hits, _ = figure.axes
    lines = {str(line.get_label()): line.get_ydata() for line in speeds.get_lines()}
    for label in SCHEDULES:
        assert list(lines[label]) == [1.5, 2.0]  # type: ignore[arg-type]
    assert list(lines["no outcomes"]) == [1.4, 1.4]  # type: ignore[arg-type]
    assert list(lines["the best chain"]) == [1.2, 1.2]  # type: ignore[arg-type]
    assert [list(line.get_ydata()) for line in hits.get_lines()][:3] == [[0.2, 0.8]] * 3  # type: ignore[arg-type]
    title = figure.get_suptitle()
    assert title.startswith("SIMULATED, EMULATED") and "1 texts of 150 tokens" in title


def test_the_command_draws_without_torch(tmp_path: Path) -> None:
    picture = tmp_path / "ranks.png"
    given = ["--models-config-path", write_emulated(tmp_path), "--output", str(picture)]
    given += ["--num-texts", "1", "--new-tokens", "20"]
    code = (
        "import sys; from viz.rank_agreement import main\n"
        f"assert main({given!r}) == 0\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"emulated, emulated and simulated: {picture}\n"
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (["--num-texts", "0"], "--num-texts is 0; it must be a positive integer"),
        (["--output", "x.bmp"], "must end in .png"),
        (["--output", "/nowhere/x.png"], "--output: there is no folder /nowhere"),
        (["--models-config-path", DEMO], "draft-1M is not emulated"),
        (
            ["--models-config-path", "configs/models/emulated-h100-70b.json", DEMO],
            "draft-1M is not emulated",
        ),
    ],
)
def test_wrong_input_is_one_line(
    given: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--models-config-path", write_emulated(tmp_path), *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line


def test_a_target_alone_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--models-config-path", write_emulated(tmp_path, 1)]) == 2
    assert "emulated has no draft, so nothing is corrected" in capsys.readouterr().err
