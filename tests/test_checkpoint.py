"""Finding models, and what their small files tell about them."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants as hub_constants
from huggingface_hub import errors as hub_errors

from pipespec.checkpoint import (
    CheckpointShape,
    eos_token_ids,
    locate,
    locate_cached,
    locate_tokenizer,
    shipped_models,
)
from pipespec.errors import ModelLoadError

LOCATE = sys.modules["pipespec.checkpoint.locate"]  # the package has a function of that name
TINY = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def write_model(folder: Path, config: dict[str, Any] | None = None, weights: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama", **TINY}))
    (folder / "tokenizer.json").write_text("{}")
    if weights:
        (folder / "pytorch_model.bin").write_bytes(b"")
    return folder


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(ModelLoadError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Local folders and shipped models


def test_a_local_folder_is_found_absolute_and_relative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(tmp_path / "models" / "small")
    assert locate(str(folder)) == folder
    assert locate("small", base=tmp_path / "models") == folder
    monkeypatch.chdir(tmp_path)
    assert locate("models/small") == locate("./models/small") == folder


def test_the_working_directory_comes_before_the_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = write_model(tmp_path / "here" / "small")
    write_model(tmp_path / "base" / "small")
    monkeypatch.chdir(tmp_path / "here")
    assert locate("small", base=tmp_path / "base") == here


@pytest.mark.parametrize("path", ["./none", "/none/at/all", "a/b/c", "~/no/such/folder", ".hidden"])
def test_a_path_that_is_no_hub_name_is_not_looked_up_there(path: str) -> None:
    assert "there is no such folder" in refusal(lambda: locate(path))


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("")
    assert "is a file" in refusal(lambda: locate(str(tmp_path / "weights")))


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_what_a_folder_lacks_is_named(tmp_path: Path, missing: str) -> None:
    folder = write_model(tmp_path / "m", weights=missing == "config.json")
    if missing == "config.json":
        (folder / missing).unlink()
    assert f"has no {missing}" in refusal(lambda: locate(str(folder)))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    shards = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    (folder / "model-1.safetensors").write_bytes(b"")
    assert "has no model-2.safetensors" in refusal(lambda: locate(str(folder)))
    index.write_text("{")
    assert "readable model.safetensors.index.json" in refusal(lambda: locate(str(folder)))


def test_a_tokenizer_needs_no_weights(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", weights=False)
    (folder / "config.json").unlink()
    assert locate_tokenizer(str(folder)) == folder
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in refusal(lambda: locate_tokenizer(str(folder)))


def test_shipped_models_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path / "demo" / "models" / "draft-1M")
    monkeypatch.setattr(LOCATE, "__file__", str(tmp_path / "checkpoint" / "locate.py"))
    assert shipped_models() == {"pipespec:demo/draft-1M": folder}
    assert locate("pipespec:demo/draft-1M") == folder
    assert "did you mean pipespec:demo/draft-1M" in refusal(
        lambda: locate("pipespec:demo/darft-1M")
    )
    assert "ships pipespec:demo/draft-1M" in refusal(lambda: locate("pipespec:zzz"))


# The hub


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and a hub that is not to be asked."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.chdir(tmp_path)
    asked(monkeypatch, lambda name: pytest.fail(f"the hub was asked for {name}"))
    return folder


def asked(monkeypatch: pytest.MonkeyPatch, answer: Callable[[str], Any]) -> None:
    """Makes `answer` the hub's reply to a question about a repository."""
    monkeypatch.setattr(
        huggingface_hub.HfApi, "model_info", lambda _self, name, **_options: answer(name)
    )


def add_to_cache(cache: Path, name: str, **files: bool) -> Path:
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("c0ffee")
    return write_model(repository / "snapshots/c0ffee", **files)


def http_error(kind: type[hub_errors.HfHubHTTPError], status: int) -> hub_errors.HfHubHTTPError:
    response: Any = SimpleNamespace(
        status_code=status, headers={}, request=None, url="https://example.org"
    )
    return kind("401 Client Error.\n\nAccess denied.", response=response)


def test_a_cached_model_is_used_without_asking_the_hub(cache: Path) -> None:
    folder = add_to_cache(cache, "org/small")
    assert locate("org/small").resolve() == folder.resolve()


def test_a_dry_run_needs_only_the_cached_config(cache: Path) -> None:
    folder = add_to_cache(cache, "org/small", weights=False)
    found = locate_cached("org/small")
    assert found is not None
    assert found.resolve() == folder.resolve()
    assert locate_cached("org/other") is None


def test_a_gated_model_names_itself_and_the_token(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gated(_name: str) -> Any:
        raise http_error(hub_errors.GatedRepoError, 403)

    asked(monkeypatch, gated)
    message = refusal(lambda: locate("meta-llama/Big"))
    assert "meta-llama/Big is a gated model" in message
    assert "HF_TOKEN" in message


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (http_error(hub_errors.RepositoryNotFoundError, 404), "neither a local folder nor a model"),
        (http_error(hub_errors.HfHubHTTPError, 401), "does not accept the token in HF_TOKEN"),
        (http_error(hub_errors.HfHubHTTPError, 418), "HTTP status 418"),
        (http_error(hub_errors.HfHubHTTPError, 503), "cannot be downloaded"),
        (
            hub_errors.OfflineModeIsEnabled("offline\nmode"),
            "cannot be downloaded (HF_HUB_OFFLINE is set)",
        ),
        (ConnectionError(), "cannot be downloaded (ConnectionError)"),
    ],
)
def test_each_failure_of_the_hub_is_one_line(
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    error: Exception,
    part: str,
) -> None:
    def fail(_name: str) -> Any:
        raise error

    asked(monkeypatch, fail)
    message = refusal(lambda: locate("org/model"))
    assert message.startswith("org/model")
    assert part in message
    assert capfd.readouterr() == ("", "")


def test_a_hub_that_never_answers_is_given_up(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LOCATE, "ANSWER_TIMEOUT_S", 0.2)
    released = threading.Event()
    asked(monkeypatch, lambda _name: released.wait(60))
    start_s = time.monotonic()
    message = refusal(lambda: locate("org/model"))
    released.set()
    assert time.monotonic() - start_s < 30
    assert "no answer within 0.2 s" in message
    assert "hf download org/model" in message


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["config.json", "model.safetensors", "pytorch_model.bin"], "*.safetensors"),
        (["config.json", "pytorch_model.bin"], "*.bin"),
    ],
)
def test_weights_are_fetched_in_one_format(
    cache: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], expected: str
) -> None:
    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files])
    asked(monkeypatch, lambda _name: info)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_args, **_options: None)
    patterns: list[str] = []

    def download(name: str, *, local_files_only: bool = False, **options: Any) -> str:
        if local_files_only:
            raise hub_errors.LocalEntryNotFoundError("not here")
        patterns.extend(options["allow_patterns"])
        return str(write_model(cache / "fetched"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert locate("org/model") == cache / "fetched"
    assert [name for name in patterns if name in ("*.safetensors", "*.bin")] == [expected]


# Shapes


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Llama", {}),
        ("Llama", {"tie_word_embeddings": True, "head_dim": 16}),
        ("Llama", {"attention_bias": True, "mlp_bias": True}),
        ("Mistral", {"head_dim": 8}),
        ("Qwen2", {"tie_word_embeddings": True}),
        ("Qwen3", {"head_dim": 16}),
    ],
)
def test_parameters_from_config_alone_equal_those_of_the_model(
    tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    import transformers

    config = getattr(transformers, f"{kind}Config")(**TINY, **options)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    formula = CheckpointShape.from_config(values, "test")
    assert formula.is_exact
    assert formula.num_parameters == sum(weight.numel() for weight in model.parameters())
    headers = CheckpointShape.read(tmp_path)
    assert headers.num_parameters == formula.num_parameters
    assert headers.num_quantizable == formula.num_quantizable
    assert headers.weight_bytes("float32") == 4 * formula.num_parameters
    assert headers.architecture == f"{kind}ForCausalLM"


def test_memory_follows_from_dtype_and_quantization() -> None:
    shape = CheckpointShape.from_config({"model_type": "llama", **TINY}, "test")
    per_layer = 2 * 32 * (32 + 16) + 3 * 32 * 48
    assert shape.num_quantizable == 2 * per_layer
    assert shape.weight_bytes("float16") * 2 == shape.weight_bytes("float32")
    kept = 2 * (shape.num_parameters - shape.num_quantizable)
    assert shape.weight_bytes("float16", "8bit") == kept + shape.num_quantizable
    assert shape.weight_bytes("float16", "4bit") == kept + shape.num_quantizable * 9 // 16
    # keys and values, 2 layers, 2 heads of 8, two bytes each
    assert shape.kv_bytes_per_token("bfloat16") == 2 * 2 * 2 * 8 * 2


def test_another_architecture_is_an_estimate() -> None:
    gpt2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257,
            "n_positions": 1024}  # fmt: skip
    shape = CheckpointShape.from_config(gpt2, "test")
    assert not shape.is_exact
    assert (shape.num_layers, shape.context_length, shape.head_dim) == (12, 1024, 64)
    assert 100e6 < shape.num_parameters < 200e6


def test_sizes_of_a_multimodal_config_are_its_text_model_s() -> None:
    values = {"model_type": "some_vl", "text_config": TINY, "vision_config": {"hidden_size": 9}}
    assert CheckpointShape.from_config(values, "test").hidden_size == 32


def test_a_quantized_checkpoint_weighs_what_its_files_weigh(tmp_path: Path) -> None:
    quantized = {"model_type": "llama", **TINY, "quantization_config": {"bits": 4}}
    folder = write_model(tmp_path / "m", quantized)
    header = json.dumps({"w": {"dtype": "I32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(16)
    (folder / "model.safetensors").write_bytes(data)
    assert CheckpointShape.read(folder).weight_bytes("float16") == len(data)


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"model_type": "llama"}, 'lacks "hidden_size"'),
        ({**TINY, "num_hidden_layers": "two"}, "\"num_hidden_layers\" is 'two'"),
        ({**TINY, "num_attention_heads": 0}, '"num_attention_heads" is 0'),
    ],
)
def test_a_config_without_sizes_is_refused(
    tmp_path: Path, values: dict[str, Any], part: str
) -> None:
    folder = write_model(tmp_path / "m", values)
    message = refusal(lambda: CheckpointShape.read(folder))
    assert part in message
    assert "config.json" in message


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "model.safetensors").write_bytes(b"\xff" * 32)
    assert "safetensors files are damaged" in refusal(lambda: CheckpointShape.read(folder))
    (folder / "config.json").write_text("[")
    assert "no readable config.json" in refusal(lambda: CheckpointShape.read(folder))


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [3, 1, 3]}, {"eos_token_id": 7}, (3, 1)),
        ({"eos_token_id": 3}, {"eos_token_id": 7}, (3,)),
        ({"eos_token_id": None}, {"eos_token_id": 7}, (7,)),
        (None, {"eos_token_id": [7, 8]}, (7, 8)),
        (None, {"text_config": {"eos_token_id": 9}}, (9,)),
        (None, {"eos_token_id": "</s>"}, ()),
        (None, None, ()),
    ],
)
def test_end_tokens_come_from_the_generation_config_first(
    tmp_path: Path, generation: Any, config: Any, expected: tuple[int, ...]
) -> None:
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert eos_token_ids(tmp_path) == expected
