"""The picture of a training run, from its training.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from viz.training_curves import draw, main, read_curves


def write_record(folder: Path) -> Path:
    """Two models, three points each."""
    models = [
        {"name": name, "curve": [[1e6 * n, 8.0 / n] for n in range(1, last + 1)]}
        for name, last in (("large", 3), ("small", 2))
    ]
    path = folder / "training.json"
    path.write_text(json.dumps({"models": models}))
    return path


def test_each_model_has_a_line_through_its_points(tmp_path: Path) -> None:
    curves = read_curves(write_record(tmp_path))
    (axes,) = draw(curves).axes
    lines = {str(line.get_label()): line.get_xydata().tolist() for line in axes.get_lines()}
    assert lines == {
        "large": [[1.0, 8.0], [2.0, 4.0], [3.0, pytest.approx(8 / 3)]],
        "small": [[1.0, 8.0], [2.0, 4.0]],
    }


def test_the_command_writes_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "loss.png"
    assert main([str(write_record(tmp_path)), "--output", str(picture)]) == 0
    assert capsys.readouterr().out == f"2 models: {picture}\n"
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("content", ["", "[]", '{"models": 3}', '{"models": [{"name": "a"}]}'])
def test_a_file_of_another_kind_is_named(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    assert main([str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "other.json is not the training.json of a training run" in line


def test_a_missing_file_and_a_wrong_format_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = str(write_record(tmp_path))
    for flags, named in (
        ([str(tmp_path / "none.json")], "cannot read"),
        ([record, "--output", "loss.bmp"], "must end in .png"),
    ):
        assert main(flags) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert named in line
