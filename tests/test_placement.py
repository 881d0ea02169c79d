"""Devices to processes, cores and limits, for machines that are not here."""

from __future__ import annotations

import pytest

from pipespec.config import ModelConfig, find_models_config, load_models_config
from pipespec.errors import ModelLoadError
from pipespec.placement import Machine, StagePlacement, in_process, num_gpus_named, place


def machine(num_gpus: int = 0, num_cores: int = 16, gpu_gib: float = 80.0) -> Machine:
    """Core ids start at 100, so that an id cannot pass for an index."""
    return Machine(
        cores=tuple(range(100, 100 + num_cores)),
        memory_gib=64.0,
        gpu_ids=tuple(f"GPU-{index}" for index in range(num_gpus)),
        gpu_memory_gib=(gpu_gib,) * num_gpus,
    )


def models(*devices: str | tuple[str, ...]) -> tuple[ModelConfig, ...]:
    return tuple(
        ModelConfig(f"family/model-{index}", (d,) if isinstance(d, str) else d)
        for index, d in enumerate(devices)
    )


def shipped(name: str) -> tuple[ModelConfig, ...]:
    return load_models_config(find_models_config(f"configs/models/{name}.json"))


def assert_disjoint(placements: tuple[StagePlacement, ...]) -> None:
    cores = [core for placement in placements for core in placement.cores]
    assert len(cores) == len(set(cores))


# GPUs by number


def test_a_gpu_stage_sees_its_own_gpu_alone_as_cuda_0() -> None:
    first, second = place(models("cuda:0", "cuda:1"), machine(num_gpus=2))
    assert (first.device, first.visible_devices) == ("cuda:0", ("GPU-0",))
    assert (second.device, second.visible_devices) == ("cuda:0", ("GPU-1",))
    assert first.cores == second.cores == ()


def test_the_paper_s_config_spreads_the_target_over_two_gpus() -> None:
    *_, target = place(shipped("llama3"), machine(num_gpus=4))
    assert target.device == "auto"
    assert target.visible_devices == ("GPU-2", "GPU-3")
    assert target.max_memory_gib == {"0": 72.0, "1": 72.0}


def test_eight_gpus_serve_the_eight_gpu_config() -> None:
    placements = place(shipped("llama3-8gpu"), machine(num_gpus=8))
    seen = [gpu for placement in placements for gpu in placement.visible_devices]
    assert seen == [f"GPU-{index}" for index in range(8)]
    assert len(placements[-1].max_memory_gib) == 6


def test_a_set_keeps_the_order_of_the_config() -> None:
    (only,) = place(models(("cuda:3", "cuda:1")), machine(num_gpus=4))
    assert only.visible_devices == ("GPU-3", "GPU-1")


def test_stages_may_share_a_gpu() -> None:
    first, second = place(models("cuda:0", "cuda:0"), machine(num_gpus=1))
    assert first.visible_devices == second.visible_devices == ("GPU-0",)


def test_sets_that_overlap_share_the_memory_by_size() -> None:
    wanted = models(("cuda:0", "cuda:1"), ("cuda:0", "cuda:1"))
    small, large = place(wanted, machine(num_gpus=2), weights_gib=[10.0, 30.0])
    assert small.max_memory_gib == {"0": 18.0, "1": 18.0}
    assert large.max_memory_gib == {"0": 54.0, "1": 54.0}


def test_max_memory_of_the_config_wins() -> None:
    limited = ModelConfig("m/m", ("cuda:0", "cuda:1"), max_memory_gib=40)
    (only,) = place([limited], machine(num_gpus=2))
    assert only.max_memory_gib == {"0": 40.0, "1": 40.0}
    (cpu,) = place([ModelConfig("m/m", ("cpu",), max_memory_gib=4)], machine())
    assert cpu.max_memory_gib == {"cpu": 4.0}


@pytest.mark.parametrize(
    ("num_gpus", "devices", "parts"),
    [
        (0, "cuda:0", ("wants cuda:0", "no GPU")),
        (0, "cuda", ("wants a GPU", "no GPU")),
        (1, "cuda:1", ("wants cuda:1", "shows 1 GPU ")),
        (2, ("cuda:1", "cuda:2"), ("wants cuda:2", "shows 2 GPUs")),
    ],
)
def test_a_missing_gpu_is_one_line_with_the_model(
    num_gpus: int, devices: str | tuple[str, ...], parts: tuple[str, ...]
) -> None:
    with pytest.raises(ModelLoadError) as caught:
        place(models(devices), machine(num_gpus))
    message = str(caught.value)
    assert "\n" not in message
    assert "family/model-0" in message
    for part in parts:
        assert part in message


# GPUs of PipeSpec's choice


def test_auto_takes_gpus_where_there_are_some_and_cores_where_not() -> None:
    assert place(models("auto"), machine(num_gpus=1))[0].device == "cuda:0"
    assert place(models("auto"), machine())[0].device == "cpu"


def test_auto_stages_get_a_gpu_each_with_the_drafts_first() -> None:
    placements = place(models("auto", "auto", "cuda"), machine(3), weights_gib=[2, 15, 60])
    assert [p.visible_devices for p in placements] == [("GPU-0",), ("GPU-1",), ("GPU-2",)]


def test_the_target_keeps_its_gpu_to_itself_when_gpus_are_few() -> None:
    draft, middle, target = place(models("auto", "auto", "auto"), machine(num_gpus=2))
    assert draft.visible_devices == middle.visible_devices == ("GPU-0",)
    assert target.visible_devices == ("GPU-1",)


def test_one_gpu_holds_all_auto_stages() -> None:
    placements = place(models("auto", "auto", "auto"), machine(num_gpus=1))
    assert {p.visible_devices for p in placements} == {("GPU-0",)}
    assert {p.device for p in placements} == {"cuda:0"}


def test_a_large_model_gets_as_many_of_eight_gpus_as_hold_it() -> None:
    placements = place(models("auto", "auto", "auto"), machine(8), weights_gib=[2.3, 15, 131])
    assert [len(p.visible_devices) for p in placements] == [1, 1, 3]
    seen = [gpu for placement in placements for gpu in placement.visible_devices]
    assert len(seen) == len(set(seen))


def test_a_model_that_fits_nowhere_gets_all_gpus() -> None:
    (only,) = place(models("auto"), machine(num_gpus=2), weights_gib=[1000.0])
    assert only.visible_devices == ("GPU-0", "GPU-1")


def test_a_target_of_unknown_size_gets_the_gpus_that_are_left() -> None:
    draft, target = place(models("cuda:0", "auto"), machine(num_gpus=8))
    assert draft.visible_devices == ("GPU-0",)
    assert target.visible_devices == tuple(f"GPU-{index}" for index in range(1, 8))


def test_auto_avoids_the_gpus_that_others_name() -> None:
    placements = place(models("auto", "cuda:1"), machine(num_gpus=2), weights_gib=[2.0, 15.0])
    assert placements[0].visible_devices == ("GPU-0",)


# Cores


def test_numbered_cores_are_pinned_one_thread_each() -> None:
    first, second = place(models("cpu:0", ("cpu:1", "cpu:3")), machine())
    assert (first.device, first.cores, first.threads) == ("cpu", (100,), 1)
    assert (second.cores, second.threads) == ((101, 103), 2)
    assert first.visible_devices == second.visible_devices == ()


def test_threads_of_the_config_win() -> None:
    (only,) = place([ModelConfig("m/m", ("cpu:0",), threads=4)], machine())
    assert (only.cores, only.threads) == ((100,), 4)


def test_the_demo_runs_on_two_cores_apart() -> None:
    placements = place(shipped("demo"), machine(num_cores=2))
    assert [p.cores for p in placements] == [(100,), (101,)]
    assert not any(p.note for p in placements)


def test_the_three_stage_demo_runs_on_two_cores() -> None:
    placements = place(shipped("demo-3"), machine(num_cores=2))
    assert [p.cores for p in placements] == [(100,), (100,), (101,)]


def test_the_demo_wraps_onto_the_only_core_and_says_so() -> None:
    draft, target = place(shipped("demo"), machine(num_cores=1))
    assert draft.cores == target.cores == (100,)
    assert draft.note == ""
    assert "1 core" in target.note


def test_a_core_list_on_fewer_cores_holds_each_core_once() -> None:
    (only,) = place(models(("cpu:0", "cpu:1", "cpu:2")), machine(num_cores=2))
    assert (only.cores, only.threads) == ((100, 101), 2)
    assert "2 cores" in only.note


@pytest.mark.parametrize(
    ("devices", "num_cores"), [(("cpu:0", "cpu:99"), 16), (("cpu:1",), 1), (("cpu:0", "cpu:2"), 2)]
)
def test_a_core_that_is_not_there_is_an_error(devices: tuple[str, ...], num_cores: int) -> None:
    with pytest.raises(
        ModelLoadError, match=r'wants cpu:\d+, but PipeSpec may use \d+ core.*"cpu"'
    ):
        place(models(*devices), machine(num_cores=num_cores))


def test_unnumbered_stages_share_the_cores_without_overlap() -> None:
    placements = place(models("cpu", "auto", "cpu"), machine(num_cores=16))
    assert [p.threads for p in placements] == [5, 5, 6]
    assert_disjoint(placements)


def test_one_unnumbered_stage_has_all_cores() -> None:
    (only,) = place(models("cpu"), machine(num_cores=16))
    assert (only.threads, len(only.cores)) == (16, 16)


def test_two_cores_go_to_two_stages() -> None:
    assert [p.cores for p in place(models("cpu", "cpu"), machine(num_cores=2))] == [(100,), (101,)]


@pytest.mark.parametrize("num_cores", [1, 2])
def test_more_stages_than_cores_are_left_unpinned(num_cores: int) -> None:
    placements = place(models("cpu", "cpu", "cpu"), machine(num_cores=num_cores))
    assert [(p.cores, p.threads) for p in placements] == [((), 1)] * 3


def test_unnumbered_stages_keep_off_pinned_cores() -> None:
    pinned, free = place(models("cpu:0", "cpu"), machine(num_cores=4))
    assert (pinned.cores, free.cores) == ((100,), (101, 102, 103))


def test_larger_models_get_more_cores_and_tiny_ones_no_more_than_they_use() -> None:
    placements = place(models("cpu", "cpu"), machine(num_cores=16), weights_gib=[0.25, 1.0])
    assert placements[0].threads < placements[1].threads
    assert sum(p.threads for p in placements) == 16
    assert_disjoint(placements)
    tiny = place(models("cpu", "cpu"), machine(num_cores=16), weights_gib=[0.001, 0.01])
    assert [p.threads for p in tiny] == [1, 1]


def test_gpu_and_cpu_stages_mix() -> None:
    cpu, gpu = place(models("cpu:0", "cuda:0"), machine(num_gpus=1))
    assert (cpu.device, gpu.device) == ("cpu", "cuda:0")
    assert 1 <= gpu.threads <= 4


# Helpers


def test_a_placement_is_renamed_for_a_process_that_sees_all_gpus() -> None:
    here = machine(num_gpus=4)
    draft, target = place(models("cuda:1", ("cuda:2", "cuda:3")), here)
    assert in_process(draft, here).device == "cuda:1"
    renamed = in_process(target, here)
    assert renamed.device == "auto"
    assert renamed.visible_devices == here.gpu_ids
    assert set(renamed.max_memory_gib) == {"2", "3"}
    (cpu,) = place(models("cpu:0"), here)
    assert in_process(cpu, here) == cpu


def test_the_gpus_that_a_config_names_are_counted() -> None:
    assert num_gpus_named(shipped("llama3")) == 4
    assert num_gpus_named(shipped("demo")) == 0
    assert num_gpus_named(models("cuda", "auto")) == 1
