"""What a models config may say, and the one line that answers a wrong one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from pipespec.config import (
    GenerationParams,
    ModelConfig,
    SamplingParams,
    Schedule,
    config_digest,
    find_models_config,
    load_models_config,
    model_to_json,
)
from pipespec.errors import ConfigError, UsageError

REPOSITORY = Path(__file__).resolve().parents[1]
SHIPPED = sorted((REPOSITORY / "configs/models").glob("*.json"))


def entry(**changes: Any) -> dict[str, Any]:
    return {"path": "some/model", "devices": "cpu", "dtype": "float32", **changes}


def write(folder: Path, content: Any) -> Path:
    path = folder / "models.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def refusal(path: Path) -> str:
    """The message of the error, checked to be one line that names the file."""
    with pytest.raises(ConfigError) as caught:
        load_models_config(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert caught.value.exit_code == 2
    return message


def test_the_original_s_keys_load_with_devices_as_text_or_list(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        [
            {"path": "a/draft", "devices": "cuda:0", "dtype": "float16"},
            {
                "path": "b/big",
                "devices": ["cuda:1", "cuda:2"],
                "dtype": "float16",
                "quantize": "4bit",
            },
        ],
    )
    draft, target = load_models_config(path)
    assert draft == ModelConfig("a/draft", ("cuda:0",), "float16")
    assert target == ModelConfig("b/big", ("cuda:1", "cuda:2"), "float16", quantize="4bit")
    assert (draft.name, target.name) == ("draft", "big")


def test_our_optional_keys_load(tmp_path: Path) -> None:
    keys = {"runner": "emulated", "threads": 3, "max_memory_gib": 7.5, "tokenizer": "t/t"}
    (model,) = load_models_config(write(tmp_path, [entry(**keys, emulated={"a": 1})]))
    assert (model.runner, model.threads, model.max_memory_gib) == ("emulated", 3, 7.5)
    assert (model.tokenizer, model.emulated) == ("t/t", {"a": 1})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_dtype_is_kept_exactly(tmp_path: Path, dtype: str) -> None:
    (model,) = load_models_config(write(tmp_path, [entry(dtype=dtype)]))
    assert model.dtype == dtype


@pytest.mark.parametrize(
    "devices",
    ["auto", "cpu", "cpu:0", "cuda", "cuda:12", ["cpu:0", "cpu:1"], ["cuda:0", "cuda:1"], ["cpu"]],
)
def test_every_documented_form_of_devices_loads(tmp_path: Path, devices: str | list[str]) -> None:
    (model,) = load_models_config(write(tmp_path, [entry(devices=devices)]))
    assert list(model.devices) == ([devices] if isinstance(devices, str) else devices)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"dtype": "bf16"}, ('"dtype" is "bf16"', "float32, bfloat16, float16")),
        ({"dtype": "auto"}, ('"dtype" is "auto"', "one of")),
        ({"dtype": None}, ('"dtype" is null',)),
        ({"dtype": "float61"}, ('did you mean "float16"',)),
        ({"quantize": "3bit"}, ('"quantize" is "3bit"', "8bit, 4bit")),
        ({"quantize": True}, ('"quantize" is true',)),
        ({"runner": "lama"}, ('"runner" is "lama"', 'did you mean "llama"')),
        ({"runner": "emulated"}, ('needs the key "emulated"',)),
        ({"emulated": {}, "runner": "hf"}, ('does not go with "runner": "hf"',)),
        ({"emulated": [1]}, ('"emulated" is [1]', "an object")),
        ({"devices": "tpu:0"}, ('"devices" is "tpu:0"', "cuda:0")),
        ({"devices": "cuda:-1"}, ('"devices" is "cuda:-1"',)),
        ({"devices": "cuda:01"}, ('"devices" is "cuda:01"',)),
        ({"devices": "CUDA:0"}, ('"devices" is "CUDA:0"',)),
        ({"devices": ""}, ('"devices" is ""',)),
        ({"devices": []}, ('"devices" is empty',)),
        ({"devices": [0]}, ('"devices" is 0',)),
        ({"devices": {"a": 1}}, ('"devices" is {"a": 1}',)),
        ({"devices": ["cuda:0", "cuda:0"]}, ("names cuda:0 twice",)),
        ({"devices": ["cuda:0", "cpu:0"]}, ("mixes cpu and cuda",)),
        ({"devices": ["cuda", "cuda:0"]}, ('"cuda" stands alone',)),
        ({"devices": ["auto", "cpu:0"]}, ('"auto" stands alone',)),
        ({"threads": 0}, ('"threads" is 0', "from 1")),
        ({"threads": 1.5}, ('"threads" is 1.5',)),
        ({"threads": True}, ('"threads" is true',)),
        ({"max_memory_gib": -1}, ('"max_memory_gib" is -1',)),
        ({"max_memory_gib": "40GiB"}, ('"max_memory_gib" is "40GiB"', "a number")),
        ({"tokenizer": 7}, ('"tokenizer" is 7',)),
        ({"path": ""}, ('"path" is ""',)),
        ({"path": 5}, ('"path" is 5',)),
        ({"path": ".."}, ("must end in the name of a model folder",)),
        ({"dtpye": "float32"}, ('unknown key "dtpye"', 'did you mean "dtype"')),
        ({"zzz": 1}, ('unknown key "zzz"', "the keys are path, devices, dtype")),
    ],
)
def test_a_wrong_value_is_named_with_entry_and_key(
    tmp_path: Path, changes: dict[str, Any], parts: tuple[str, ...]
) -> None:
    message = refusal(write(tmp_path, [entry(), entry(**changes)]))
    assert "entry 1" in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize("key", ["path", "devices"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    incomplete = entry()
    del incomplete[key]
    assert f'entry 0{"" if key == "path" else " (some/model)"}: the key "{key}" is missing' in (
        refusal(write(tmp_path, [incomplete]))
    )


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("", "is not JSON (line 1 column 1"),
        ('[{"path": "a",\n "devices" "cpu"}]', "is not JSON (line 2"),
        ('[{"path": "a", "path": "b"}]', 'key "path" is given twice'),
        ("[" * 100_000, "is not JSON"),
        ("[]", "empty array"),
        ('{"path": "a"}', "must hold an array"),
        ("[1]", "entry 0 must be an object"),
        ('[["a"]]', "entry 0 must be an object"),
        ('[{"path": "a", "devices": "cpu", "max_memory_gib": NaN}]', '"max_memory_gib" is NaN'),
    ],
)
def test_a_file_that_is_no_array_of_models_is_refused(
    tmp_path: Path, content: str, part: str
) -> None:
    assert part in refusal(write(tmp_path, content))


def test_a_file_of_other_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "models.json"
    path.write_bytes(b"\xff\xfe\x00[")
    assert "is not JSON" in refusal(path)


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "models.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([entry()]).encode())
    assert len(load_models_config(path)) == 1


def test_a_folder_or_missing_file_is_refused(tmp_path: Path) -> None:
    assert "is a folder" in refusal(tmp_path)
    assert "No such file" in refusal(tmp_path / "none.json")


def test_a_config_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_models_config("configs/models/demo.json").read_text().startswith("[")
    own = write(tmp_path, [entry()])
    assert find_models_config("models.json").resolve() == own


def test_a_missing_config_is_answered_with_the_shipped_ones() -> None:
    with pytest.raises(ConfigError, match=r"configs/models/demo\.json") as caught:
        find_models_config("configs/models/dmeo.json")
    assert "--models-config-path" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_a_shipped_config_loads(path: Path) -> None:
    assert len(load_models_config(path)) >= 2


def test_the_shipped_configs_are_the_promised_ones() -> None:
    demos, llamas = {"demo", "demo-3", "demo-mid"}, {"llama2", "llama3", "llama3-8b", "llama3-8gpu"}
    emulated = {"emulated-llama3-70b", "emulated-llama3-8b", "emulated-h100-70b"}
    names = demos | llamas | emulated | {"qwen3"}
    assert {path.stem for path in SHIPPED} == names
    by_name = {path.stem: load_models_config(path) for path in SHIPPED}
    assert [m.devices for m in by_name["llama3"]] == [
        ("cuda:0",),
        ("cuda:1",),
        ("cuda:2", "cuda:3"),
    ]
    assert by_name["llama3"][2].quantize == "4bit"
    assert {m.dtype for m in by_name["demo"]} == {"bfloat16"}
    assert len(by_name["demo"]) == 2
    assert len(by_name["demo-3"]) == 3


def test_results_hold_a_model_in_the_original_s_shape() -> None:
    model = ModelConfig("a/b", ("cuda:0",), "float16", quantize="4bit")
    assert model_to_json(model) == {
        "path": "a/b", "devices": ["cuda:0"], "dtype": "float16", "quantize": "4bit",
    }  # fmt: skip
    plain = ModelConfig("a/b", ("cpu",), "bfloat16", threads=2)
    assert model_to_json(plain) == {
        "path": "a/b", "devices": ["cpu"], "dtype": "bfloat16", "threads": 2,
    }  # fmt: skip


def test_a_model_survives_the_way_through_results(tmp_path: Path) -> None:
    models = tuple(model for path in SHIPPED for model in load_models_config(path))
    again = load_models_config(write(tmp_path, [model_to_json(model) for model in models]))
    assert again == models


def test_the_digest_sees_every_field_and_the_order() -> None:
    one, other = ModelConfig("a/b", ("cpu",)), ModelConfig("a/c", ("cpu",))
    digests = [
        config_digest([one, other]),
        config_digest([other, one]),
        config_digest([one, ModelConfig("a/c", ("cpu",), "float32")]),
        config_digest([one, other], schedule=Schedule()),
        config_digest([one, other], schedule=Schedule(lookahead=3)),
        config_digest([one, ModelConfig("a/c", ("cpu",), emulated={"x": 1})]),
    ]
    assert len(set(digests)) == len(digests)
    assert config_digest([one, other]) == digests[0]


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 1.0},
        {"seed": -1},
    ],
)
def test_sampling_out_of_range_names_its_flag(values: dict[str, Any]) -> None:
    (name,) = values
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} is"):
        SamplingParams(**values)


def test_generation_limits_are_checked() -> None:
    with pytest.raises(UsageError, match="--max-new-tokens is 0"):
        GenerationParams(max_new_tokens=0)
    with pytest.raises(UsageError, match="a stop text is empty"):
        GenerationParams(stop=("",))
    with pytest.raises(UsageError, match="65 stop texts"):
        GenerationParams(stop=("x",) * 65)
    with pytest.raises(UsageError, match="a tuple of texts"):
        GenerationParams(stop="END")  # type: ignore[arg-type]


def test_a_schedule_out_of_range_names_its_flag() -> None:
    with pytest.raises(UsageError, match="--policy is greedy"):
        Schedule(policy="greedy")
    with pytest.raises(UsageError, match="--lookahead is -1"):
        Schedule(lookahead=-1)
    assert Schedule(lookahead=0).lookahead == 0
