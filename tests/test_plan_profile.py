"""A profile comes back as it was written, and one of something else is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipespec.config import GenerationParams, ModelConfig, SamplingParams
from pipespec.errors import DataError
from pipespec.placement import Machine
from pipespec.planning.profile import Profile, identity_of, read_profile, write_profile

MODELS = (ModelConfig("a/draft", ("cpu:0",)), ModelConfig("a/target", ("cpu:1",)))
MACHINE = Machine(cores=(0, 1), memory_gib=8.0)
ENVIRONMENT: dict[str, Any] = {
    "cpu": "A processor",
    "pipespec_version": "1.0",
    "versions": {"torch": "2.13", "transformers": "5.1", "python": "3.12"},
}


def identity(**changes: Any) -> dict[str, Any]:
    values = {
        "models": MODELS,
        "prompts": [(1, 2)],
        "generation": GenerationParams(),
        "machine": MACHINE,
        "environment": ENVIRONMENT,
    }
    return identity_of(**{**values, **changes})


def half_profile() -> Profile:
    """Whatever its parts are, as long as they are plain values."""
    parts = {"text/0": {"prompt": [1, 2], "tokens": [3]}, "beside/0/1": [1.0, 1.25]}
    return Profile(identity(), parts, measuring_s=12.5)


def test_a_profile_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    write_profile(path, half_profile())
    assert read_profile(path, identity()) == half_profile()
    assert [item.name for item in tmp_path.iterdir()] == ["profile.json"]


def test_without_a_file_there_is_no_profile(tmp_path: Path) -> None:
    assert read_profile(tmp_path / "none.json", identity()) is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"models": MODELS[:1]}, "another models config;"),
        ({"prompts": [(1, 3)]}, "another prompts;"),
        (
            {"generation": GenerationParams(sampling=SamplingParams(temperature=0.5))},
            "another settings of the text (temperature: 0.0 there, 0.5 now);",
        ),
        (
            {"generation": GenerationParams(max_new_tokens=9)},
            "another settings of the text (max_new_tokens: 128 there, 9 now);",
        ),
        ({"machine": Machine((0,), 8.0)}, "another machine (cores: [0, 1] there, [0] now);"),
        (
            {"environment": {**ENVIRONMENT, "pipespec_version": "2.0"}},
            "another versions (pipespec: 1.0 there, 2.0 now);",
        ),
    ],
)
def test_a_profile_of_something_else_is_refused_by_what_differs(
    changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    path = tmp_path / "profile.json"
    write_profile(path, half_profile())
    with pytest.raises(DataError) as caught:
        read_profile(path, identity(**changes))
    message = str(caught.value)
    assert message.startswith(f"--profile: {path} was measured with {told}")
    assert "remove it" in message and "\n" not in message


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a profile of this version"),
        ('{"pipespec_profile": 99}', "is not a profile of this version"),
    ],
)
def test_what_is_no_profile_is_refused(content: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(content)
    with pytest.raises(DataError, match=told):
        read_profile(path, identity())


def test_a_damaged_profile_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    write_profile(path, half_profile())
    values = json.loads(path.read_text())
    values["parts"]["beside/0/1"] = 5
    path.write_text(json.dumps(values))
    with pytest.raises(DataError, match="is damaged; remove it"):
        read_profile(path, identity())


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"--profile: .*profile.json: "):
        write_profile(tmp_path / "file" / "profile.json", half_profile())
