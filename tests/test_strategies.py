"""Every strategy writes exactly what the target writes: real models, real processes.

The reference is transformers' own greedy decoding in float32, and plain sampling by the target
alone. Where two texts part, the target's logits there must be closer than 1e-4, and the test prints
how close: a forward over one token and one over several add in another order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tiny import one_thread  # noqa: F401

from pipespec.commands.equality import NEAR_TIE, first_divergence, with_margins
from pipespec.config import GenerationParams, ModelConfig, SamplingParams, Schedule
from pipespec.data.stdlib import stdlib_prompts
from pipespec.decoding import (
    AsyncChainSpeculativeDecoder,
    ChainSpeculativeDecoder,
    Decoder,
    GreedyDecoder,
    Hierarchy,
    load,
    open_hierarchy,
)
from pipespec.errors import DataError

DRAFT, MIDDLE, TARGET = (f"pipespec:demo/{n}" for n in ("draft-1M", "middle-2M", "target-12M"))
SHORT = GenerationParams(max_new_tokens=48)
SAMPLED = [
    SamplingParams(temperature=1.0, seed=1),
    SamplingParams(temperature=0.7, top_k=40, seed=2),
    SamplingParams(temperature=0.9, top_p=0.9, seed=3),
    SamplingParams(temperature=1.3, min_p=0.05, seed=4),
]


def hierarchy_of(*paths: str, dtype: str = "float32") -> Hierarchy:
    last = len(paths) - 1
    models = [ModelConfig(path, (f"cpu:{int(i == last)}",), dtype) for i, path in enumerate(paths)]
    return open_hierarchy(models)


@pytest.fixture(scope="module")
def pair() -> Hierarchy:
    return hierarchy_of(DRAFT, TARGET)


@pytest.fixture(scope="module")
def greedy(pair: Hierarchy) -> Iterator[GreedyDecoder]:
    with GreedyDecoder(pair) as decoder:
        yield decoder


@pytest.fixture(scope="module")
def pipeline(pair: Hierarchy) -> Iterator[AsyncChainSpeculativeDecoder]:
    with AsyncChainSpeculativeDecoder(pair) as decoder:
        yield decoder


@pytest.fixture(scope="module")
def three() -> Hierarchy:
    return hierarchy_of(DRAFT, MIDDLE, TARGET)


@pytest.fixture(scope="module")
def chain_of_three(three: Hierarchy) -> Iterator[ChainSpeculativeDecoder]:
    with ChainSpeculativeDecoder(three) as decoder:
        yield decoder


@pytest.fixture(scope="module")
def decoders(
    greedy: GreedyDecoder,
    chain_of_three: ChainSpeculativeDecoder,
    pipeline: AsyncChainSpeculativeDecoder,
) -> dict[str, Decoder]:
    """By strategy, all with the same target."""
    return {"greedy": greedy, "chain": chain_of_three, "async-chain": pipeline}


@pytest.fixture(scope="module")
def prompts(pair: Hierarchy) -> list[tuple[int, ...]]:
    """Held-out functions of the standard library, as token ids."""
    return [tuple(pair.tokenizer.encode(prompt.text)) for prompt in stdlib_prompts()[:6]]


def chain_or_pipeline(strategy: str, hierarchy: Hierarchy, schedule: Schedule) -> Any:
    made: type[Any] = ChainSpeculativeDecoder
    if strategy == "async-chain":
        made = AsyncChainSpeculativeDecoder
    return made(hierarchy, schedule)


def assert_same(
    expected: Sequence[int], found: Sequence[int], prompt: Sequence[int], hierarchy: Hierarchy
) -> None:
    """Equal, or a shown near-tie."""
    divergence = first_divergence(0, prompt, expected, found)
    if divergence is not None:
        (divergence,) = with_margins([divergence], hierarchy, SamplingParams())
        print(divergence.describe("float32"))
        assert divergence.margin is not None and divergence.margin < NEAR_TIE, divergence


@cache
def transformers_model(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@cache
def transformers_greedy(prompt: tuple[int, ...], folder: Path) -> list[int]:
    """What `generate` of transformers writes, as long as `SHORT`."""
    import torch

    ids = torch.tensor([prompt])
    with torch.inference_mode():
        output = transformers_model(folder).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=SHORT.max_new_tokens,
            pad_token_id=0,
        )
    written: list[int] = output[0, len(prompt) :].tolist()
    return written


# -- greedy text ------------------------------------------------------------------------------


def assert_writes_what_transformers_writes(
    decoder: Decoder, prompts: Sequence[tuple[int, ...]]
) -> None:
    hierarchy = decoder.hierarchy
    folder = hierarchy.folders[-1]
    assert folder is not None
    for prompt in prompts:
        expected = transformers_greedy(prompt, folder)
        assert_same(expected, decoder.generate(prompt, SHORT).token_ids, prompt, hierarchy)


@pytest.mark.parametrize("strategy", ["chain", "async-chain"])
def test_three_models_write_what_transformers_writes_with_the_target_alone(
    strategy: str, three: Hierarchy, prompts: list[tuple[int, ...]]
) -> None:
    with chain_or_pipeline(strategy, three, Schedule()) as decoder:
        assert_writes_what_transformers_writes(decoder, prompts[:4])


def test_two_models_write_what_transformers_writes_with_the_target_alone(
    pair: Hierarchy, pipeline: AsyncChainSpeculativeDecoder, prompts: list[tuple[int, ...]]
) -> None:
    assert_writes_what_transformers_writes(pipeline, prompts[:4])
    with ChainSpeculativeDecoder(pair) as chain:
        assert_writes_what_transformers_writes(chain, prompts[:4])


def test_prepared_outcomes_and_trees_leave_the_text_as_it_is(
    three: Hierarchy, greedy: GreedyDecoder, prompts: list[tuple[int, ...]]
) -> None:
    num_hits = 0
    with AsyncChainSpeculativeDecoder(three, Schedule(outcomes=3, tree=4)) as decoder:
        for prompt, sampling in zip(prompts, (SamplingParams(), *SAMPLED[:2])):
            params = replace(SHORT, sampling=sampling)
            expected = greedy.generate(prompt, params).token_ids
            generation = decoder.generate(prompt, params)
            assert_same(expected, generation.token_ids, prompt, three)
            num_hits += generation.counts[0]["num_outcome_hits"]
    assert num_hits > 0, "no verdict was foreseen: nothing was tested"


def test_greedy_writes_what_transformers_writes(
    greedy: GreedyDecoder, prompts: list[tuple[int, ...]]
) -> None:
    assert_writes_what_transformers_writes(greedy, prompts)


@pytest.mark.parametrize(
    ("strategy", "schedule"),
    [
        ("chain", Schedule(lookahead=1)),
        ("chain", Schedule(lookahead=7)),
        ("async-chain", Schedule(lookahead=7)),
        ("async-chain", Schedule("pipespec", 0)),
        ("async-chain", Schedule(run_ahead=1)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.policy}-{value.lookahead}",
)
def test_the_schedule_does_not_change_the_text(
    strategy: str,
    schedule: Schedule,
    pair: Hierarchy,
    greedy: GreedyDecoder,
    prompts: list[tuple[int, ...]],
) -> None:
    with chain_or_pipeline(strategy, pair, schedule) as decoder:
        for prompt in prompts[:2]:
            expected = greedy.generate(prompt, SHORT).token_ids
            assert_same(expected, decoder.generate(prompt, SHORT).token_ids, prompt, pair)


def test_forty_requests_one_after_the_other(
    greedy: GreedyDecoder,
    pipeline: AsyncChainSpeculativeDecoder,
    prompts: list[tuple[int, ...]],
) -> None:
    """What one request leaves behind would show in the next: prompts of all lengths alternate."""
    for index in range(40):
        prompt = prompts[index % len(prompts)][: 1 + 7 * index % 60]
        params = GenerationParams(max_new_tokens=1 + index % 9)
        expected = greedy.generate(prompt, params).token_ids
        found = pipeline.generate(prompt, params).token_ids
        assert_same(expected, found, prompt, pipeline.hierarchy)


def test_every_drafted_token_is_accounted_for(
    pipeline: AsyncChainSpeculativeDecoder, prompts: list[tuple[int, ...]]
) -> None:
    output = pipeline.generate(prompts[0], SHORT)
    draft, target = output.counts
    written = len(output.token_ids)
    assert sum(target["emitted"]) == target["num_drafted"] - 1 == written - 1
    assert target["num_rolled_back"] == 0
    assert sum(target["offered"]) >= sum(target["accepted"]) > 0
    # What the draft drew was accepted or corrected, rolled back, or lay beyond the end.
    assert draft["num_drafted"] >= sum(target["accepted"])
    assert draft["num_rolled_back"] + draft["num_past_end"] <= draft["num_drafted"]
    assert sum(count for _, count in output.arrivals) == len(output.token_ids)


# -- sampled text -----------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", SAMPLED, ids=["plain", "top-k", "top-p", "min-p"])
def test_sampled_text_is_the_same_from_every_strategy(
    sampling: SamplingParams, decoders: dict[str, Decoder], prompts: list[tuple[int, ...]]
) -> None:
    params = GenerationParams(40, sampling)
    texts = set()
    for prompt in prompts[:3]:
        (text,) = {decoder.generate(prompt, params).token_ids for decoder in decoders.values()}
        texts.add(text)
    assert len(texts) == 3


def test_another_seed_is_another_text(
    pipeline: AsyncChainSpeculativeDecoder, prompts: list[tuple[int, ...]]
) -> None:
    outputs = {
        pipeline.generate(prompts[0], GenerationParams(24, SamplingParams(1.0, seed=s))).token_ids
        for s in range(4)
    }
    assert len(outputs) == 4


# -- where a text ends ------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["greedy", "chain", "async-chain"])
def test_the_text_ends_at_the_first_of_several_end_tokens(
    strategy: str,
    decoders: dict[str, Any],
    prompts: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both end tokens, and the first of them twice, lie within what is drafted at once."""
    written = decoders["greedy"].generate(prompts[1], SHORT).token_ids
    place = next(i for i in range(8, len(written)) if written[i] not in written[:i])
    ends = (written[place], written[min(place + 2, len(written) - 1)])
    first = next(i for i, token in enumerate(written) if token in ends)
    decoder = decoders[strategy]
    monkeypatch.setattr(decoder, "hierarchy", replace(decoder.hierarchy, eos=ends))
    output = decoder.generate(prompts[1], SHORT)
    assert output.token_ids == written[: first + 1]
    assert output.finish_reason == "eos"


@pytest.mark.parametrize("strategy", ["greedy", "async-chain"])
def test_the_text_ends_before_a_stop_text_that_spans_tokens(
    strategy: str, decoders: dict[str, Decoder], prompts: list[tuple[int, ...]]
) -> None:
    decoder = decoders[strategy]
    whole = decoder.generate(prompts[2], SHORT)
    middle = len(whole.text) // 2
    stop = whole.text[middle : middle + 5]
    pieces: list[str] = []
    params = GenerationParams(SHORT.max_new_tokens, stop=("never written", stop))
    output = decoder.generate(prompts[2], params, pieces.append)
    assert output.finish_reason == "stop"
    assert output.text == "".join(pieces) == whole.text[: whole.text.index(stop)]
    assert output.token_ids == whole.token_ids[: len(output.token_ids)]
    assert stop not in decoder.hierarchy.tokenizer.decode(output.token_ids[:-1])


def test_one_new_token_and_one_token_prompts(
    greedy: GreedyDecoder, pipeline: AsyncChainSpeculativeDecoder
) -> None:
    for num_new in (1, 2, 3, 17):
        params = GenerationParams(max_new_tokens=num_new)
        expected = greedy.generate([42], params)
        output = pipeline.generate([42], params)
        assert output.token_ids == expected.token_ids
        assert len(output.token_ids) == num_new
        assert output.finish_reason == "length"


@pytest.mark.parametrize("num_left", [0, 1, 5])
def test_a_text_that_fills_the_context_ends_with_its_last_token(
    num_left: int, greedy: GreedyDecoder, pipeline: AsyncChainSpeculativeDecoder
) -> None:
    """The last token drawn is never fed, so a full context still yields one."""
    context = pipeline.hierarchy.context_length
    prompt = [7 + index % 300 for index in range(context - num_left)]
    expected = greedy.generate(prompt, SHORT)
    output = pipeline.generate(prompt, SHORT)
    assert len(output.token_ids) == num_left + 1
    assert_same(expected.token_ids, output.token_ids, prompt, pipeline.hierarchy)


def test_a_prompt_that_does_not_fit_is_refused_and_the_next_one_is_served(
    pipeline: AsyncChainSpeculativeDecoder,
) -> None:
    context = pipeline.hierarchy.context_length
    for prompt, named in (([7] * (context + 1), "context"), ([], "empty"), ([1 << 20], "outside")):
        with pytest.raises(DataError, match=named):
            pipeline.generate(prompt)
    assert len(pipeline.generate([7] * 5, GenerationParams(3)).token_ids) == 3


# -- how it comes -----------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["greedy", "chain", "async-chain"])
def test_the_pieces_of_a_stream_are_the_text(
    strategy: str, decoders: dict[str, Decoder], prompts: list[tuple[int, ...]]
) -> None:
    expected = decoders["greedy"].generate(prompts[3], SHORT).text
    pieces = list(decoders[strategy].stream(prompts[3], SHORT))
    assert "".join(pieces) == expected
    assert len(pieces) > 3


def test_a_stream_that_nobody_reads_on_makes_room_for_the_next_request(
    pipeline: AsyncChainSpeculativeDecoder,
    greedy: GreedyDecoder,
    prompts: list[tuple[int, ...]],
) -> None:
    long = GenerationParams(max_new_tokens=400)
    for prompt in prompts[:3]:
        with closing(pipeline.stream(prompt, long)) as pieces:  # type: ignore[type-var]
            next(iter(pieces))
        expected = greedy.generate(prompt, SHORT).token_ids
        found = pipeline.generate(prompt, SHORT).token_ids
        assert_same(expected, found, prompt, pipeline.hierarchy)


def test_the_readme_quickstart_streams_text() -> None:
    with load("configs/models/demo.json", strategy="chain") as decoder:
        text = "".join(decoder.stream("def mean(values):", GenerationParams(24)))
    assert text.strip()


def test_tcp_carries_the_same_text(
    pair: Hierarchy, greedy: GreedyDecoder, prompts: list[tuple[int, ...]]
) -> None:
    with AsyncChainSpeculativeDecoder(pair, transport="tcp") as decoder:
        found = decoder.generate(prompts[0], SHORT).token_ids
    assert_same(greedy.generate(prompts[0], SHORT).token_ids, found, prompts[0], pair)


# -- 16 bits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["chain", "async-chain"])
def test_in_bfloat16_texts_part_only_at_near_ties(
    strategy: str, prompts: list[tuple[int, ...]]
) -> None:
    """Kernels for one row and for several round differently; what they decide must be close."""
    hierarchy = hierarchy_of(DRAFT, TARGET, dtype="bfloat16")
    with GreedyDecoder(hierarchy) as alone:
        expected = [alone.generate(prompt, SHORT).token_ids for prompt in prompts]
    with chain_or_pipeline(strategy, hierarchy, Schedule()) as decoder:
        found = [decoder.generate(prompt, SHORT).token_ids for prompt in prompts]
    parted = [
        divergence
        for index, prompt in enumerate(prompts)
        if (divergence := first_divergence(index, prompt, expected[index], found[index]))
    ]
    for divergence in with_margins(parted, hierarchy, SamplingParams()):
        print(divergence.describe("bfloat16"))
        # Logits of these models stay below 32, where neighbouring bfloat16 are 1/8 apart.
        assert divergence.margin is not None and divergence.margin <= 0.5, divergence
