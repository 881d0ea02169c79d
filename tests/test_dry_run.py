"""Memory and placement of runs that are not started."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from pipespec.config import ModelConfig, find_models_config, load_models_config
from pipespec.dry_run import (
    KNOWN_CONFIGS,
    DryRun,
    dry_run_report,
    format_bytes,
    format_count,
    render,
)
from pipespec.errors import ModelLoadError
from pipespec.placement import Machine

LAPTOP = Machine(cores=(0, 1), memory_gib=16.0)
GIB = 1 << 30


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def node(num_gpus: int, gpu_gib: float) -> Machine:
    names = tuple(map(str, range(num_gpus)))
    return Machine(tuple(range(64)), 512.0, names, (gpu_gib,) * num_gpus)


def shipped(name: str) -> tuple[ModelConfig, ...]:
    return load_models_config(find_models_config(f"configs/models/{name}.json"))


def printed(report: DryRun, width: int = 100) -> str:
    out = io.StringIO()
    Console(width=width, file=out).print(render(report))
    return out.getvalue()


def write_model(folder: Path, **sizes: int) -> Path:
    folder.mkdir(parents=True)
    config = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "vocab_size": 100, "max_position_embeddings": 256, **sizes,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("path", "published"),
    [
        ("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400),
        ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248),
        ("meta-llama/Meta-Llama-3.1-70B-Instruct", 70_553_706_496),
        ("JackFram/llama-68m", 68_030_208),
        ("meta-llama/Llama-2-7b-chat-hf", 6_738_415_616),
        ("meta-llama/Llama-2-13b-chat-hf", 13_015_864_320),
        ("Qwen/Qwen3-0.6B", 596_049_920),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("Qwen/Qwen3-32B", 32_762_123_264),
    ],
)
def test_the_table_s_shapes_have_the_published_number_of_parameters(
    path: str, published: int
) -> None:
    report = dry_run_report([ModelConfig(path, ("cpu",))], LAPTOP, 1)
    shape = report.stages[0].shape
    assert shape is not None
    assert shape.num_parameters == published


def test_the_table_holds_every_hub_model_of_the_shipped_configs() -> None:
    for name in ("llama3", "llama3-8b", "llama3-8gpu", "llama2", "qwen3"):
        assert {model.path for model in shipped(name)} <= set(KNOWN_CONFIGS)


def test_the_paper_s_run_is_planned_on_a_laptop_without_a_network() -> None:
    report = dry_run_report(shipped("llama3"), LAPTOP, context_length=8192)
    assert [stage.devices for stage in report.stages] == [
        ("cuda:0",), ("cuda:1",), ("cuda:2", "cuda:3"),
    ]  # fmt: skip
    assert report.fits is None
    assert report.notes[0] == "not on this machine: needs 4 GPUs, has 0"
    assert "PipeSpec's table" in report.notes[1]
    middle = report.stages[1]
    assert middle.weight_bytes == 2 * 8_030_261_248
    assert middle.kv_bytes == 8192 * 2 * 32 * 8 * 128 * 2
    assert 38 * GIB < report.stages[2].weight_bytes < 42 * GIB


def test_a_node_with_enough_memory_fits_and_a_smaller_one_does_not() -> None:
    assert dry_run_report(shipped("llama3"), node(4, 40.0), 8192).fits is True
    small = dry_run_report(shipped("llama3"), node(4, 16.0), 8192)
    assert small.fits is False
    assert [device.fits for device in small.devices] == [True, False, False, False]


def test_more_requests_need_more_kv_cache_only() -> None:
    one = dry_run_report(shipped("llama3"), node(4, 80.0), 8192)
    four = dry_run_report(shipped("llama3"), node(4, 80.0), 8192, num_slots=4)
    for before, after in zip(one.stages, four.stages, strict=True):
        assert after.kv_bytes == 4 * before.kv_bytes
        assert after.weight_bytes == before.weight_bytes


def test_the_context_is_at_most_the_model_s() -> None:
    draft, *_ = dry_run_report(shipped("llama2"), LAPTOP, 8192).stages
    assert draft.num_positions == 2048
    draft, *_ = dry_run_report(shipped("llama2"), LAPTOP, None).stages
    assert draft.num_positions == 2048


def test_stages_on_one_device_add_up(tmp_path: Path) -> None:
    paths = [write_model(tmp_path / name) for name in ("draft", "target")]
    models = [ModelConfig(str(path), ("cpu:0",), "float32") for path in paths]
    report = dry_run_report(models, LAPTOP, 128)
    (cpu,) = report.devices
    assert (cpu.label, cpu.stages) == ("cpu", ("draft", "target"))
    assert cpu.needed_bytes == report.total_bytes == 2 * report.stages[0].total_bytes
    assert report.fits is True
    assert report.notes == ()


def test_a_local_config_comes_before_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "Qwen" / "Qwen3-8B")
    monkeypatch.chdir(tmp_path)
    report = dry_run_report([ModelConfig("Qwen/Qwen3-8B", ("cpu",))], LAPTOP, None)
    assert report.stages[0].num_positions == 256


def test_an_unknown_hub_model_leaves_the_verdict_open() -> None:
    report = dry_run_report([ModelConfig("org/secret", ("cuda:0",))], node(1, 80.0), 1024)
    assert report.stages[0].shape is None
    assert report.fits is None
    assert "org/secret: size unknown" in report.notes[0]


def test_emulated_models_need_nothing() -> None:
    model = ModelConfig("a100/70B", ("cpu",), runner="emulated", emulated={"x": 1})
    report = dry_run_report([model], LAPTOP, 1024)
    assert (report.total_bytes, report.fits) == (0, True)
    assert report.notes == ("a100/70B: emulated, holds no weights",)


def test_an_architecture_that_is_not_known_exactly_says_so(tmp_path: Path) -> None:
    path = write_model(tmp_path / "other")
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**values, "model_type": "phi"}))
    report = dry_run_report([ModelConfig(str(path), ("cpu",))], LAPTOP, 128)
    assert "size estimated" in report.notes[0]


def test_a_local_path_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ModelLoadError, match="there is no such folder"):
        dry_run_report([ModelConfig("./none/at/all", ("cpu",))], LAPTOP, 128)


@pytest.mark.parametrize("width", [80, 120])
def test_the_report_names_every_stage_device_and_note(width: int) -> None:
    text = printed(dry_run_report(shipped("llama3-8gpu"), LAPTOP, 8192), width)
    joined = " ".join(text.split())
    for part in ("8.03B", "15.0 GiB", "131 GiB", "1.0 GiB at 8192", "cuda:7", "2,3,4,5,6,7"):
        assert part in joined
    assert "not on this machine: needs 8 GPUs, has 0" in joined
    assert "whether it fits is not known" in joined
    assert max(map(len, text.splitlines())) <= width


def test_the_demo_s_placement_shows_cores_and_its_warning(tmp_path: Path) -> None:
    paths = [write_model(tmp_path / name) for name in ("draft", "[target]")]
    models = [ModelConfig(str(path), (f"cpu:{i}",)) for i, path in enumerate(paths)]
    text = printed(dry_run_report(models, LAPTOP, 128))
    assert "[target]" in text
    assert "it fits" in text
    one_core = printed(dry_run_report(models, Machine((5,), 8.0), 128))
    assert "share a core" in " ".join(one_core.split())


def test_sizes_read_well() -> None:
    assert [format_bytes(n) for n in (0, 5 << 20, 200 << 20, GIB, 131 * GIB)] == [
        "0.0 MiB", "5.0 MiB", "200 MiB", "1.0 GiB", "131 GiB",
    ]  # fmt: skip
    assert [format_count(n) for n in (999, 1500, 5_120_000, 70_553_706_496)] == [
        "999", "1.50K", "5.12M", "70.6B",
    ]  # fmt: skip
