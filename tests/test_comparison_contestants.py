"""Who races on which hardware, for machines that are not here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from pipespec.comparison.contestants import (
    Choices,
    Contestant,
    chosen,
    line_up,
    playing_grounds,
    seen_by_process,
)
from pipespec.comparison.own import check_branches
from pipespec.comparison.specification import environment_of, specification
from pipespec.config import ModelConfig, SamplingParams, Schedule
from pipespec.decoding import Hierarchy
from pipespec.errors import ModelLoadError, UsageError
from pipespec.placement import Machine, place
from pipespec.tokenizer.plain import ByteTokenizer


def hierarchy(*devices: str | tuple[str, ...], num_cores: int = 2, num_gpus: int = 0) -> Hierarchy:
    """Models without files on a machine whose core ids start at 100."""
    models = tuple(
        ModelConfig(f"family/model-{index}", (d,) if isinstance(d, str) else d)
        for index, d in enumerate(devices)
    )
    return hierarchy_of(models, num_cores, num_gpus)


def hierarchy_of(models: tuple[ModelConfig, ...], num_cores: int, num_gpus: int) -> Hierarchy:
    machine = Machine(
        cores=tuple(range(100, 100 + num_cores)),
        memory_gib=64.0,
        gpu_ids=tuple(f"GPU-{index}" for index in range(num_gpus)),
        gpu_memory_gib=(80.0,) * num_gpus,
    )
    none = (None,) * len(models)
    return Hierarchy(
        models=models,
        folders=none,
        tokenizer_folders=none,
        placements=place(models, machine),
        machine=machine,
        tokenizer=ByteTokenizer(),
        vocab_size=257,
        context_length=64,
        eos=(256,),
    )


def by_key(contestants: Sequence[Contestant]) -> dict[str, Contestant]:
    found = {contestant.key: contestant for contestant in contestants}
    assert len(found) == len(contestants)
    return found


TWO_CORES = hierarchy("cpu:0", "cpu:1")
TWO_GPUS = hierarchy("cuda:0", "cuda:1", num_gpus=2)


def test_on_cores_everyone_has_the_target_s_core_and_then_all_cores() -> None:
    contestants, left_out = line_up(TWO_CORES, Choices())
    assert left_out == []
    racing = by_key(contestants)
    for name in ("greedy", "chain", "transformers", "transformers-assisted"):
        device, total = racing[f"{name}@device"], racing[f"{name}@total"]
        assert (device.cores, device.tables) == ((101,), ("device",))
        assert (total.cores, total.tables) == ((100, 101), ("total",))
        assert {place.threads for place in device.places} == {1}
        assert {place.threads for place in total.places} == {2}


def test_a_small_draft_in_a_process_with_all_cores_has_no_more_threads_than_it_can_use(
    tmp_path: Path,
) -> None:
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128}
    sizes |= {"num_attention_heads": 4, "vocab_size": 257, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    small = replace(TWO_CORES, folders=(tmp_path, None))
    draft, target = playing_grounds(small)["total"]
    assert draft.cores == target.cores == (100, 101)
    assert (draft.threads, target.threads) == (1, 2)


def test_async_chain_has_its_own_places_and_stands_in_both_tables() -> None:
    racing = by_key(line_up(TWO_CORES, Choices(outcomes=(2, 4)))[0])
    names = [key for key in racing if key.startswith("async")]
    assert names == [
        *("async-chain", "async-chain-pipespec"),
        *("async-chain-outcomes-2", "async-chain-outcomes-4"),
    ]
    for name in names:
        assert racing[name].tables == ("device", "total")
        assert racing[name].places == TWO_CORES.placements


def test_on_gpus_the_first_table_has_all_models_on_the_target_s() -> None:
    racing = by_key(line_up(TWO_GPUS, Choices())[0])
    assert {p.visible_devices for p in racing["chain@device"].places} == {("GPU-1",)}
    draft, target = racing["chain@total"].places
    assert (draft.visible_devices, target.visible_devices) == (("GPU-0",), ("GPU-1",))


def test_who_loads_the_target_alone_has_no_use_for_a_second_gpu() -> None:
    racing = by_key(line_up(TWO_GPUS, Choices())[0])
    for name in ("greedy", "transformers", "transformers-lookup"):
        assert racing[name].tables == ("device", "total")
        assert f"{name}@total" not in racing


def test_drafts_beside_a_spread_target_stand_on_its_first_gpu() -> None:
    spread = hierarchy("cuda:0", ("cuda:1", "cuda:2"), num_gpus=3)
    draft, target = playing_grounds(spread)["device"]
    assert (draft.device, draft.visible_devices) == ("cuda:0", ("GPU-1",))
    assert (target.device, target.visible_devices) == ("auto", ("GPU-1", "GPU-2"))
    assert not draft.max_memory_gib


def test_a_peer_s_process_sees_its_gpus_alone_and_counts_them_from_0() -> None:
    assisted = by_key(line_up(TWO_GPUS, Choices())[0])["transformers-assisted@device"]
    places, visible = seen_by_process(assisted.places, TWO_GPUS.machine)
    assert visible == ("GPU-1",)
    assert [place.device for place in places] == ["cuda:0", "cuda:0"]
    variables = environment_of(assisted, TWO_GPUS, {"CUDA_VISIBLE_DEVICES": "GPU-0,GPU-1"})
    assert variables["CUDA_VISIBLE_DEVICES"] == "GPU-1"


def test_our_own_process_sees_the_machine_because_a_config_counts_its_gpus() -> None:
    chain = by_key(line_up(TWO_GPUS, Choices())[0])["chain@device"]
    inherited = {"CUDA_VISIBLE_DEVICES": "GPU-0,GPU-1"}
    assert environment_of(chain, TWO_GPUS, inherited)["CUDA_VISIBLE_DEVICES"] == "GPU-0,GPU-1"
    assert "CUDA_VISIBLE_DEVICES" not in environment_of(chain, TWO_GPUS, {})


def test_thread_pools_are_sized_before_a_process_starts() -> None:
    racing = by_key(line_up(TWO_CORES, Choices())[0])
    for table, threads in (("device", "1"), ("total", "2")):
        variables = environment_of(racing[f"transformers@{table}"], TWO_CORES, {})
        assert variables["OMP_NUM_THREADS"] == variables["MKL_NUM_THREADS"] == threads


def test_there_is_one_table_where_the_target_has_all_hardware() -> None:
    contestants, _ = line_up(hierarchy("cpu", "cpu", num_cores=1), Choices())
    assert {contestant.tables for contestant in contestants} == {("device",)}
    assert "greedy" in by_key(contestants)


def test_one_table_can_be_chosen() -> None:
    contestants, _ = line_up(TWO_CORES, Choices(), ("total",))
    assert {contestant.tables for contestant in contestants} == {("total",)}


def test_emulated_models_leave_transformers_out_and_have_one_table() -> None:
    values = {"step_ms": {"1": 1.0}}
    models = tuple(ModelConfig(f"emulated/{n}", ("cpu",), emulated=values) for n in "ab")
    contestants, left_out = line_up(hierarchy_of(models, 2, 0), Choices())
    assert {contestant.tables for contestant in contestants} == {("device",)}
    assert [x.name for x in left_out] == [
        *("transformers", "transformers-assisted", "transformers-lookup")
    ]
    assert all("no weights" in x.why for x in left_out)


def test_a_target_alone_races_against_what_needs_no_draft() -> None:
    contestants, left_out = line_up(hierarchy("cpu:0", num_cores=1), Choices())
    assert [c.name for c in contestants] == ["greedy", "transformers", "transformers-lookup"]
    assert {x.why for x in left_out} == {
        "it needs a draft, and the models config has a target only"
    }


def test_the_smallest_draft_assists() -> None:
    three = hierarchy("cpu:0", "cpu:1", "cpu:2", num_cores=3)
    assisted = by_key(line_up(three, Choices())[0])["transformers-assisted@device"]
    spec = specification(assisted, three, base=Path(), sampling=SamplingParams(), timeout_s=1.0)
    assert [model["path"] for model in spec["models"]] == ["family/model-0", "family/model-2"]


def test_an_async_chain_that_prepares_no_outcomes_does_not_race_as_one_that_does() -> None:
    can, cannot = {"num_tail_rows": 64}, {"num_tail_rows": 0}
    check_branches(Schedule(outcomes=2), [can, cannot])
    check_branches(Schedule(outcomes=0), [cannot, cannot])
    with pytest.raises(ModelLoadError, match="the runners of its drafts prepare no outcomes"):
        check_branches(Schedule(outcomes=2), [cannot, can])
    check_branches(Schedule(tree=2), [can, can])
    with pytest.raises(ModelLoadError, match="the runners after its first draft verify no trees"):
        check_branches(Schedule(tree=2), [can, cannot])


def test_variants_are_of_one_process() -> None:
    choices = Choices(chain_lookaheads=(3, 5), assistant_tokens=("heuristic", "8"))
    racing = by_key(line_up(TWO_CORES, choices)[0])
    assert [v.label for v in racing["chain@device"].variants] == ["lookahead 3", "lookahead 5"]
    assisted = racing["transformers-assisted@device"].variants
    assert [v.label for v in assisted] == ["heuristic", "8 tokens"]


def test_names_and_patterns_choose() -> None:
    names = ["greedy", "chain", "chain-auto", "transformers", "transformers-lookup"]
    assert chosen(names, ["chain*", "greedy"], None) == {"greedy", "chain", "chain-auto"}
    assert chosen(names, None, ["transformers*"]) == {"greedy", "chain", "chain-auto"}
    assert chosen(names, ["chain*"], ["chain"]) == {"chain-auto"}
    with pytest.raises(UsageError, match=r"^--skip: nobody is called vllm; there are greedy, "):
        chosen(names, None, ["vllm"])
    with pytest.raises(UsageError, match="leave nobody"):
        chosen(names, ["greedy"], ["g*"])


def test_a_command_must_not_take_the_name_of_another() -> None:
    choices = Choices(commands=(("chain", "run {prompts}"),))
    with pytest.raises(UsageError, match=r"^--command: the name chain is taken"):
        line_up(TWO_CORES, choices)
