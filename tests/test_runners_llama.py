"""The lean runners compute what transformers computes, whatever way the tokens are fed.

Logits are compared with the `hf` runner's on tiny random checkpoints in which nothing is zero or
one, so that a forgotten bias, norm or scale shows. Then slots are extended and rolled back at
random: feeding in pieces must equal feeding everything at once.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipespec.config import SamplingParams
from pipespec.errors import PipeSpecError
from pipespec.runners.architecture import read_architecture
from pipespec.runners.base import ModelRunner, Row
from pipespec.runners.hf import HfRunner
from pipespec.runners.llama import LlamaRunner
from pipespec.runners.native import NativeRunner
from pipespec.runners.rows import CHUNK
from pipespec.sampling import draw
from tests.processes import run_python
from tests.tiny import ARCHITECTURES, make_tiny, one_thread  # noqa: F401

GREEDY = SamplingParams()
VOCAB_SIZE, CONTEXT_LENGTH = 128, 64  # of tiny checkpoints
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "llama, ungrouped": {"num_key_value_heads": 4},
    "llama, one key-value head": {"num_key_value_heads": 1},
    "llama, scaled positions": {"rope_parameters": LLAMA3_ROPE},
    "qwen2": {},
    "qwen2, tied": {"tie_word_embeddings": True},
    "qwen2, window in the second layer": {
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
    },
    "qwen3": {},
    "qwen3, biases and another theta": {
        "attention_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "mistral": {"sliding_window": None},
    "mistral, window": {"sliding_window": 8},
}
Make = Callable[..., Path]


@pytest.fixture(scope="module", name="make")
def make_fixture(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Makes the checkpoint of a variant, once."""
    made: dict[str, Path] = {}

    def make_variant(variant: str, **config: Any) -> Path:
        key = f"{variant} {sorted(config.items())}"
        if key not in made:
            folder = tmp_path_factory.mktemp("tiny")
            values = VARIANTS[variant] | config
            made[key] = make_tiny(folder, variant.partition(",")[0], **values)
        return made[key]

    return make_variant


Runner = LlamaRunner | NativeRunner | HfRunner
Loader = partial[LlamaRunner] | partial[NativeRunner] | partial[HfRunner]
lean: Loader = partial(
    LlamaRunner, name="tiny", dtype="float32", device="cpu", vocab_size=VOCAB_SIZE
)
native: Loader = partial(NativeRunner, name="tiny", dtype="float32", vocab_size=VOCAB_SIZE)
plain: Loader = partial(HfRunner, name="tiny", dtype="float32", device="cpu", vocab_size=VOCAB_SIZE)
each_lean = pytest.mark.parametrize("load", [lean, native], ids=["llama", "native"])
each = pytest.mark.parametrize("load", [lean, native, plain], ids=["llama", "native", "hf"])


def random_ids(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(VOCAB_SIZE), k=count)


def feed(runner: Runner, ids: Sequence[int], start: int = 0, slot: int = 0) -> Tensor:
    """The logits after every one of `ids`."""
    return runner.logits(Row(slot, start, ids, len(ids), GREEDY))


def largest(difference: Tensor) -> float:
    return difference.abs().max().item()


# The same logits as transformers


@each_lean
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(make: Make, load: Loader, variant: str) -> None:
    ids = random_ids(CONTEXT_LENGTH)
    reference = feed(plain(make(variant)), ids)
    assert reference.std() > 0.3, "a model whose logits say nothing would agree with any other"
    assert largest(feed(load(make(variant)), ids) - reference) < 1e-4


@pytest.mark.parametrize(
    ("load", "dtype"),
    [(lean, "bfloat16"), (lean, "float16"), (native, "bfloat16")],
    ids=["llama-bfloat16", "llama-float16", "native-bfloat16"],
)
@pytest.mark.parametrize("variant", ["llama", "qwen2", "qwen3", "mistral, window"])
def test_half_precision_is_no_further_from_float32_than_transformers_is(
    make: Make, load: Loader, variant: str, dtype: str
) -> None:
    """The two round in different places (norms, rotation and attention are float32 here), so they
    are compared by their distance from float32, with a quarter more allowed."""
    ids = random_ids(CONTEXT_LENGTH)
    exact, folder = feed(plain(make(variant)), ids), make(variant)
    ours = feed(load(folder, dtype=dtype), ids) - exact
    theirs = feed(plain(folder, dtype=dtype), ids) - exact
    assert 0.0 < ours.std() < 1.25 * theirs.std()
    assert largest(ours) < (0.2 if dtype == "bfloat16" else 0.03)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_is_honoured_exactly(make: Make, dtype: str) -> None:
    """Weights stored as float32 are rounded once; stored in the dtype they give the same logits."""
    rounded = make("llama", dtype=dtype)
    runner = lean(make("llama"), dtype=dtype)
    assert runner.info.dtype == dtype
    bytes_each = torch.finfo(getattr(torch, dtype)).bits // 8
    norm_bytes = 5 * 48 * 4  # norms are float32 whatever the dtype
    norms = 5 * 48
    assert runner.info.weight_bytes == (runner.info.num_parameters - norms) * bytes_each + (
        norm_bytes
    )
    ids = random_ids(20)
    if dtype == "float32":
        assert torch.equal(feed(runner, ids), feed(lean(rounded), ids))
    else:
        assert largest(feed(runner, ids) - feed(lean(rounded, dtype=dtype), ids)) < 0.05


@each_lean
def test_a_checkpoint_in_several_files_is_read_like_one(
    make: Make, load: Loader, tmp_path: Path
) -> None:
    sharded = make_tiny(tmp_path, "llama", max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ids = random_ids(10)
    assert torch.equal(feed(load(sharded), ids), feed(load(make("llama")), ids))


def test_older_configs_say_the_same_in_other_words(make: Make, tmp_path: Path) -> None:
    """`rope_scaling` and a top-level `rope_theta`, as the checkpoints of Llama 3 have them."""
    folder = make("llama, scaled positions")
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_architecture(tmp_path) == read_architecture(folder)


def test_older_configs_say_by_number_which_layers_have_a_window(make: Make, tmp_path: Path) -> None:
    folder = make("qwen2, window in the second layer")
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("layer_types") == ["full_attention", "sliding_attention"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_architecture(tmp_path) == read_architecture(folder)
    assert read_architecture(folder).windows == (None, 8)


@each_lean
@pytest.mark.parametrize("variant", ["llama", "mistral, window"])
@pytest.mark.parametrize("length", [63, 65, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5])
def test_long_prompts_are_fed_in_chunks_that_do_not_show(
    make: Make, load: Loader, variant: str, length: int
) -> None:
    folder = make(variant, max_position_embeddings=1100)
    ids = random_ids(length)
    reference, runner = feed(plain(folder), ids), load(folder)
    assert largest(feed(runner, ids) - reference) < 1e-4
    for num_draws in (1, 3, length - CHUNK):
        if 1 <= num_draws <= length:
            wanted = runner.logits(Row(0, 0, ids, num_draws, GREEDY))
            assert wanted.shape == (num_draws, VOCAB_SIZE)
            assert largest(wanted - reference[-num_draws:]) < 1e-4
    rest = feed(runner, ids[37:], start=37)  # chunks begin elsewhere, the logits stay
    assert largest(rest - reference[37:]) < 1e-4


@each_lean
@pytest.mark.parametrize("variant", ["llama", "mistral, window"])
def test_short_steps_go_on_as_the_text_grows(make: Make, load: Loader, variant: str) -> None:
    """Masks of short steps are cut from a table that must grow with the text and the query."""
    folder = make(variant, max_position_embeddings=1100)
    ids = random_ids(1000)
    reference, runner = feed(plain(folder), ids), load(folder)
    for start, count in ((0, 3), (3, 250), (250, 5), (255, 4), (259, 17), (276, 640), (916, 60)):
        logits = feed(runner, ids[start : start + count], start=start)
        assert largest(logits - reference[start : start + count]) < 1e-4


# Rollback and slots


@each_lean
@pytest.mark.parametrize("variant", ["llama", "llama, ungrouped", "qwen3", "mistral, window"])
@pytest.mark.parametrize("query_length", range(1, 18))
def test_every_query_length_continues_a_prefix_as_if_all_were_fed_at_once(
    make: Make, load: Loader, variant: str, query_length: int
) -> None:
    ids, runner = random_ids(40), load(make(variant))
    at_once = feed(runner, ids)
    runner.release(0)
    feed(runner, ids[:20])
    in_pieces = feed(runner, ids[20 : 20 + query_length], start=20)
    assert largest(in_pieces - at_once[20 : 20 + query_length]) < 1e-4


@each
@pytest.mark.parametrize("variant", ["llama", "qwen2, window in the second layer", "mistral"])
@pytest.mark.parametrize("seed", range(3))
def test_slots_that_are_extended_and_rolled_back_at_random_equal_fresh_ones(
    make: Make, load: Loader, variant: str, seed: int
) -> None:
    """Three requests interleaved in one runner; each step extends one of them by 1 to 17 tokens
    from where it ends or, as after a rejected draft, from any earlier position."""
    print(f"seed {seed}")
    choice = random.Random(seed)
    options = {} if load is plain else {"num_slots": 4}
    runner, held = load(make(variant), **options), {slot: list[int]() for slot in range(3)}
    for _ in range(30):
        slot = choice.randrange(3)
        start = choice.choice([len(held[slot]), choice.randint(0, len(held[slot]))])
        count = min(choice.randint(1, 17), CONTEXT_LENGTH - start)
        if count == 0:
            runner.release(slot)
            held[slot] = []
            continue
        new, num_draws = choice.choices(range(VOCAB_SIZE), k=count), choice.randint(1, count)
        logits = runner.logits(Row(slot, start, new, num_draws, GREEDY))
        held[slot] = held[slot][:start] + new
        fresh = feed(runner, held[slot], slot=99)
        runner.release(99)
        assert largest(logits - fresh[-num_draws:]) < 1e-4


@each_lean
def test_rows_of_one_forward_are_served_one_after_another(make: Make, load: Loader) -> None:
    one, other = random_ids(9), random_ids(12, seed=1)
    alone = load(make("llama"))
    expected = [
        alone.forward([Row(0, 0, one, 4, GREEDY)])[0],
        alone.forward([Row(0, 0, other, 2, GREEDY)])[0],
    ]
    together = load(make("llama"), num_slots=2)
    rows = [Row(7, 0, one, 4, GREEDY), Row(3, 0, other, 2, GREEDY)]
    assert together.forward(rows) == expected


@each
def test_sampled_tokens_depend_on_their_position_and_not_on_the_step_that_drew_them(
    make: Make, load: Loader
) -> None:
    """The draw after the token at position n takes the noise of position n + 1."""
    ids, runner = random_ids(30), load(make("llama"))
    params = SamplingParams(temperature=2.0, seed=3)
    [at_once] = runner.forward([Row(0, 0, ids, 30, params)])
    one_by_one = [runner.forward([Row(0, at, ids[at : at + 1], 1, params)])[0] for at in range(30)]
    assert at_once == draw(feed(runner, ids), range(1, 31), params, VOCAB_SIZE)
    assert [[token] for token in at_once] == one_by_one


@each
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_text_is_what_transformers_generates(
    make: Make, load: Loader, architecture: str
) -> None:
    from transformers import AutoModelForCausalLM

    folder, prompt = make(architecture), random_ids(7, seed=2)
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = model.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=40, eos_token_id=None
    )[0].tolist()
    assert prompt + generate(load(folder), prompt, 40) == expected


def generate(runner: ModelRunner, prompt: Sequence[int], count: int) -> list[int]:
    tokens = runner.forward([Row(0, 0, prompt, 1, GREEDY)])[0]
    while len(tokens) < count:
        at = len(prompt) + len(tokens) - 1
        tokens += runner.forward([Row(0, at, tokens[-1:], 1, GREEDY)])[0]
    return tokens


# What may not be drawn or fed


@each
@pytest.mark.parametrize("variant", ["llama", "llama, tied"])
def test_ids_beyond_the_tokenizer_are_never_drawn(make: Make, load: Loader, variant: str) -> None:
    """Fed they may be: a padded embedding has rows for them."""
    ids, runner = random_ids(60), load(make(variant), vocab_size=10)
    assert runner.info.vocab_size == 10
    assert feed(runner, ids).shape == (60, 10)
    for params in (GREEDY, SamplingParams(temperature=50.0)):
        [draws] = runner.forward([Row(0, 0, ids, 60, params)])
        assert max(draws) < 10
    assert largest(feed(runner, ids) - feed(load(make(variant)), ids)[:, :10]) < 1e-4


@each
def test_a_full_context_is_served_and_one_token_more_is_refused(make: Make, load: Loader) -> None:
    ids, runner = random_ids(CONTEXT_LENGTH), load(make("llama"))
    assert runner.info.context_length == CONTEXT_LENGTH
    runner.forward([Row(0, 0, ids, 5, GREEDY)])
    last = runner.forward([Row(0, CONTEXT_LENGTH - 1, ids[-1:], 1, GREEDY)])
    message = r"^tiny: position 64 is beyond the context of 64 tokens; shorten[^\n]*$"
    with pytest.raises(PipeSpecError, match=message):
        runner.forward([Row(0, CONTEXT_LENGTH, [1], 1, GREEDY)])
    with pytest.raises(PipeSpecError, match=message):
        runner.forward([Row(0, 0, [*ids, 1], 1, GREEDY)])
    assert runner.forward([Row(0, CONTEXT_LENGTH - 1, ids[-1:], 1, GREEDY)]) == last


@each
def test_a_context_may_be_shorter_than_the_checkpoints_but_not_longer(
    make: Make, load: Loader
) -> None:
    runner = load(make("llama"), context_length=16)
    assert runner.info.context_length == 16
    assert load(make("llama"), context_length=9999).info.context_length == CONTEXT_LENGTH
    with pytest.raises(PipeSpecError, match="beyond the context of 16"):
        runner.forward([Row(0, 0, random_ids(17), 1, GREEDY)])


@each
@pytest.mark.parametrize("unknown", [-1, VOCAB_SIZE])
def test_an_id_that_the_model_does_not_know_is_refused(
    make: Make, load: Loader, unknown: int
) -> None:
    message = rf"^tiny: token id {unknown} is outside its vocabulary of 128; [^\n]*$"
    with pytest.raises(PipeSpecError, match=message):
        load(make("llama")).forward([Row(0, 0, [5, unknown, 7], 1, GREEDY)])


@each
def test_weights_that_give_nan_are_an_error_and_not_a_token(tmp_path: Path, load: Loader) -> None:
    from safetensors.torch import load_file, save_file

    file = make_tiny(tmp_path) / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(PipeSpecError, match="NaN or infinite"):
        load(tmp_path).forward([Row(0, 0, [1, 2], 1, GREEDY)])


@each
def test_a_released_slot_is_empty(make: Make, load: Loader) -> None:
    runner = load(make("llama"))
    feed(runner, [1, 2, 3])
    runner.release(0)
    with pytest.raises(AssertionError):
        feed(runner, [4], start=3)


@each
def test_a_runner_can_be_closed_twice_and_serves_no_more(make: Make, load: Loader) -> None:
    runner = load(make("llama"))
    runner.forward([Row(0, 0, [1], 1, GREEDY)])
    runner.close()
    runner.close()
    with pytest.raises(AssertionError):
        runner.forward([Row(0, 0, [1], 1, GREEDY)])


@pytest.mark.parametrize("name", ["native", "llama"])
def test_a_worker_with_a_lean_runner_does_not_import_transformers(make: Make, name: str) -> None:
    code = f"""
import sys
import pipespec.worker
from pathlib import Path
from pipespec.config import ModelConfig, SamplingParams
from pipespec.placement import StagePlacement
from pipespec.runners.base import Row
from pipespec.runners.factory import load_runner
model = ModelConfig("tiny", ("cpu",), "float32", runner={name!r})
runner = load_runner(model, StagePlacement("cpu"), Path({str(make("llama"))!r}), 128)
runner.forward([Row(0, 0, [1, 2], 2, SamplingParams(temperature=1.0, top_p=0.9))])
print(runner.info.runner, "transformers" in sys.modules)
"""
    run = run_python(code)
    assert run.stdout.split() == [name, "False"], run.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_gpu_gives_the_logits_that_the_cpu_gives(make: Make, variant: str) -> None:
    ids, device = random_ids(40), lean(make(variant), device="cuda:0")
    reference = feed(lean(make(variant)), ids)
    assert largest(feed(device, ids).cpu() - reference) < 1e-3
    for start, stop in ((0, 20), (20, 21), (15, 18), (18, 35)):
        pieces = feed(device, ids[start:stop], start=start).cpu()
        assert largest(pieces - reference[start:stop]) < 1e-3
