"""Logits to token: the noise is a pure function, the draws follow the distribution, and a draft and
its target that share the noise agree as often as the coupling promises.

The slow twin here is plain Python, one token at a time, straight from the papers.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from pipespec.config import SamplingParams
from pipespec.errors import PipeSpecError
from pipespec.sampling import TOKEN_STREAM, draw, gumbel_noise, mask_logits, philox_4x32
from tests.tiny import one_thread  # noqa: F401

# Counter, key and result of Philox-4x32-10, as published with its reference implementation.
ZEROS, ONES = "00000000", "ffffffff"
KNOWN_ANSWERS = [
    (f"{ZEROS} {ZEROS} {ZEROS} {ZEROS}", f"{ZEROS} {ZEROS}", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (f"{ONES} {ONES} {ONES} {ONES}", f"{ONES} {ONES}", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]
MASKED = [
    SamplingParams(temperature=0.7, top_k=5),
    SamplingParams(temperature=1.5, top_p=0.8),
    SamplingParams(temperature=1.0, min_p=0.1),
    SamplingParams(temperature=0.9, top_k=20, top_p=0.9, min_p=0.02),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def slow_philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Ten rounds over Python's integers."""
    (c0, c1, c2, c3), (k0, k1), mask = counter, key, (1 << 32) - 1
    for _ in range(10):
        left, right = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (right >> 32) ^ c1 ^ k0, right & mask, (left >> 32) ^ c3 ^ k1, left & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return [c0, c1, c2, c3]


def slow_noise(seed: int, stream: int, position: int, token: int) -> float:
    mask = (1 << 32) - 1
    block = slow_philox(
        (token // 2, position & mask, position >> 32, stream), (seed & mask, seed >> 32)
    )
    high, low = block[2 * (token % 2) :][:2]
    uniform = (((high << 21) | (low >> 11)) + 1) / 2**53
    return -math.log(-math.log(uniform))


def slow_draw(logits: Sequence[float], position: int, params: SamplingParams) -> int:
    """argmax of logits / T + noise, for params that drop no token."""
    scores = [
        logit / params.temperature + slow_noise(params.seed, TOKEN_STREAM, position, token)
        for token, logit in enumerate(logits)
    ]
    return scores.index(max(scores))


def random_logits(*shape: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * spread


def noise_at(seed: int, stream: int, positions: Sequence[int], tokens: Sequence[int]) -> Tensor:
    return gumbel_noise(seed, stream, torch.tensor(positions), torch.tensor(tokens))


# The generator and the noise


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter: str, key: str, answer: str) -> None:
    low, high = words(key)
    column = torch.tensor(words(counter)).unsqueeze(1)
    assert philox_4x32(column, low | high << 32).flatten().tolist() == words(answer)
    assert slow_philox(words(counter), words(key)) == words(answer)


def test_noise_is_what_the_slow_twin_says_for_every_seed_stream_position_and_token() -> None:
    seeds = (0, 1, 1 << 32, (1 << 63) - 1)
    positions = (0, 5, (1 << 32) - 1, (1 << 32) + 5, 1 << 40)
    tokens = (0, 1, 2, 151_935, (1 << 31) - 1)
    for seed, stream, position, token in itertools.product(seeds, (0, 7), positions, tokens):
        fast = noise_at(seed, stream, [position], [token]).item()
        assert fast == pytest.approx(slow_noise(seed, stream, position, token), rel=1e-12)


def test_noise_of_an_element_does_not_depend_on_what_else_is_asked() -> None:
    tokens, positions = torch.arange(300), torch.arange(4).unsqueeze(1)
    together = gumbel_noise(3, 0, positions, tokens)
    backwards = gumbel_noise(3, 0, positions, tokens.flip(0)).flip(1)
    assert together.shape == (4, 300)
    assert torch.equal(together, backwards)
    assert together[2, 77] == noise_at(3, 0, [2], [77])[0]


def test_noise_changes_with_each_of_its_arguments() -> None:
    arguments = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1 << 40, 0, 0), (0, 0, 1 << 32)]
    tokens = range(64)
    rows = [noise_at(seed, stream, [at] * 64, tokens) for seed, stream, at in arguments]
    for one, other in itertools.combinations(rows, 2):
        assert not torch.isclose(one, other).any()


def test_noise_has_the_mean_and_variance_of_a_gumbel() -> None:
    noise = gumbel_noise(0, 0, torch.arange(200).unsqueeze(1), torch.arange(1000))
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.57722, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.02)


# Drawing


def test_draws_are_the_slow_twins() -> None:
    params = SamplingParams(temperature=0.8, seed=11)
    logits, positions = random_logits(6, 33), [0, 1, 2, 500, 1 << 33, 7]
    expected = [slow_draw(row.tolist(), at, params) for row, at in zip(logits, positions)]
    assert draw(logits, positions, params, 33) == expected


@pytest.mark.parametrize("num_tokens", [2, 3, 1000, 4096, 151_936])
def test_drawing_over_all_tokens_equals_drawing_token_by_token(num_tokens: int) -> None:
    """Without a mask one generator block serves two tokens; with one, each survivor has its own."""
    logits, positions = random_logits(4, num_tokens, spread=1.0), [3, 4, 5, 1 << 35]
    free = SamplingParams(temperature=1.2, seed=5)
    keeps_all = SamplingParams(temperature=1.2, seed=5, min_p=1e-300)
    assert draw(logits, positions, free, num_tokens) == draw(
        logits, positions, keeps_all, num_tokens
    )


@pytest.mark.parametrize("params", [SamplingParams(temperature=0.8), *MASKED], ids=str)
def test_draws_follow_the_softmax_of_what_the_mask_leaves(params: SamplingParams) -> None:
    num_draws = 20_000
    logits = random_logits(1, 24, seed=2, spread=1.5)
    probs = torch.softmax(mask_logits(logits, params)[0] / params.temperature, dim=-1)
    tokens = draw(logits.expand(num_draws, -1), range(num_draws), params, 24)
    counts = Counter(tokens)
    likely = [token for token in range(24) if probs[token] > 0]
    assert set(counts) <= set(likely)
    observed = [counts[token] for token in likely]
    test = chisquare(observed, (probs[likely] * num_draws).tolist())
    assert test.pvalue > 1e-3, (observed, probs)


def test_seeds_and_positions_draw_independently() -> None:
    """Pairs of draws at neighbouring positions follow the product of the two distributions."""
    num_pairs, params = 10_000, SamplingParams(temperature=1.0, seed=9)
    logits = torch.tensor([[0.0, 0.5, 1.0]], dtype=torch.float64)
    probs = torch.softmax(logits[0], dim=-1)
    tokens = draw(logits.expand(2 * num_pairs, -1), range(2 * num_pairs), params, 3)
    pairs = Counter(zip(tokens[::2], tokens[1::2]))
    cells = list(itertools.product(range(3), repeat=2))
    expected = [num_pairs * (probs[one] * probs[two]).item() for one, two in cells]
    assert chisquare([pairs[cell] for cell in cells], expected).pvalue > 1e-3
    other_seed = SamplingParams(temperature=1.0, seed=10)
    assert draw(logits.expand(100, -1), range(100), other_seed, 3) != tokens[:100]


def test_temperature_zero_takes_the_lowest_of_the_most_likely_ids() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0], [2.0, 2.0, 2.0, 2.0], [-9.0, -8.0, -7.0, -6.0]])
    assert draw(logits, [0, 1, 2], SamplingParams(), 4) == [1, 0, 3]
    only = mask_logits(logits, SamplingParams())
    assert only.isfinite().int().tolist() == [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 1e-3])
def test_a_temperature_near_zero_draws_the_most_likely_token(temperature: float) -> None:
    logits = torch.tensor([[0.0, 5.0, 4.0]])
    assert draw(logits, [0], SamplingParams(temperature=temperature), 3) == [1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_of_the_logits_changes_nothing_but_their_rounding(dtype: torch.dtype) -> None:
    rounded = random_logits(8, 50).to(torch.bfloat16).to(dtype)
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=1)
    assert draw(rounded, range(8), params, 50) == draw(rounded.double(), range(8), params, 50)


@pytest.mark.parametrize("params", [SamplingParams(temperature=1.0), *MASKED], ids=str)
def test_drawing_leaves_the_logits_as_they_were(params: SamplingParams) -> None:
    logits = random_logits(3, 50)
    before = logits.clone()
    draw(logits, range(3), params, 50)
    mask_logits(logits, params)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("params", [SamplingParams(temperature=1.0), *MASKED], ids=str)
def test_rows_do_not_influence_each_other(params: SamplingParams) -> None:
    flat, steep = random_logits(3, 200, spread=0.1), random_logits(3, 200, seed=1, spread=9.0)
    logits, positions = torch.cat((flat, steep)), [4, 9, 2, 4, 9, 2]
    alone = [draw(logits[row : row + 1], [positions[row]], params, 200)[0] for row in range(6)]
    assert draw(logits, positions, params, 200) == alone
    masks = torch.cat([mask_logits(logits[row : row + 1], params) for row in range(6)])
    assert torch.equal(mask_logits(logits, params), masks)


@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(temperature=2.0), *MASKED], ids=str
)
def test_columns_beyond_the_vocabulary_are_never_drawn(params: SamplingParams) -> None:
    """A padded head, as Qwen's, may hold anything there, NaN included."""
    logits, padding = random_logits(40, 10), torch.full((40, 6), 1e4, dtype=torch.float64)
    padding[::2] = math.nan
    padded = torch.cat((logits, padding), dim=1)
    assert draw(padded, range(40), params, 10) == draw(logits, range(40), params, 10)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error_and_not_a_token(
    bad: float, temperature: float
) -> None:
    logits = torch.zeros(3, 5)
    logits[1, 2] = bad
    with pytest.raises(PipeSpecError, match=r"^[^\n]*NaN or infinite[^\n]*dtype[^\n]*$"):
        draw(logits, range(3), SamplingParams(temperature=temperature), 5)


def test_a_row_that_forbids_every_token_is_an_error() -> None:
    with pytest.raises(PipeSpecError, match="infinite"):
        draw(torch.full((1, 5), -math.inf), [0], SamplingParams(temperature=1.0), 5)


def test_tokens_that_the_model_forbids_are_not_drawn() -> None:
    logits = torch.tensor([[0.0, -math.inf, 0.0]]).expand(200, -1)
    params = SamplingParams(temperature=1e4)
    assert set(draw(logits, range(200), params, 3)) == {0, 2}


# Masks


def transformers_support(logits: Tensor, params: SamplingParams) -> Tensor:
    """Which tokens transformers' own warpers keep, in the order that `generate` applies them."""
    ids = torch.zeros(len(logits), 1, dtype=torch.long)
    scores: Tensor = logits / params.temperature
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(ids, scores)
    if params.top_p < 1.0:
        scores = TopPLogitsWarper(params.top_p)(ids, scores)
    if params.min_p:
        scores = MinPLogitsWarper(params.min_p)(ids, scores)
    return scores.isfinite()


@pytest.mark.parametrize("spread", [0.3, 2.0, 6.0])
@pytest.mark.parametrize(
    "params",
    [
        *MASKED,
        SamplingParams(temperature=1.0, top_k=1),
        SamplingParams(temperature=1.0, top_k=5000),
        SamplingParams(temperature=1.0, top_p=1e-6),
        SamplingParams(temperature=1.0, top_p=0.999),
        SamplingParams(temperature=0.3, min_p=0.9),
        SamplingParams(temperature=3.0, top_k=50, top_p=0.5),
    ],
    ids=str,
)
def test_masks_keep_what_transformers_keeps(params: SamplingParams, spread: float) -> None:
    """Without ties: transformers leaves those to its sort; here the tests below settle them."""
    logits = random_logits(20, 1000, seed=3, spread=spread)
    kept = mask_logits(logits, params)
    assert torch.equal(kept.isfinite(), transformers_support(logits, params))
    assert torch.equal(kept[kept.isfinite()], logits[kept.isfinite()])


def test_top_k_keeps_all_that_equal_the_kth() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 0.0, 1.0]])
    kept = mask_logits(logits, SamplingParams(temperature=1.0, top_k=2))
    assert kept.isfinite().tolist() == [[True, True, True, False, True]]


def test_top_p_prefers_the_lower_of_equal_ids() -> None:
    logits = torch.zeros(1, 8)
    kept = mask_logits(logits, SamplingParams(temperature=1.0, top_p=0.375))
    assert kept.isfinite().tolist() == [[True] * 3 + [False] * 5]


def slow_nucleus(logits: Sequence[float], top_p: float) -> set[int]:
    """Most likely tokens first, lower ids first among equals, until their sum reaches top_p."""
    weights = [math.exp(logit) for logit in logits]
    order = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
    before = itertools.accumulate((weights[token] / sum(weights) for token in order), initial=0.0)
    return {token for token, reached in zip(order, before) if reached < top_p}


@pytest.mark.parametrize("num_tokens", [3, 256, 257, 700, 1100])
@pytest.mark.parametrize("top_p", [0.03, 0.31, 0.77, 0.97])
def test_top_p_keeps_what_the_slow_twin_keeps_even_among_many_ties(
    num_tokens: int, top_p: float
) -> None:
    """Nuclei smaller and larger than the tokens that are looked at first."""
    logits = torch.stack(
        [(random_logits(num_tokens, seed=row, spread=row + 0.2)).round() for row in range(4)]
    )
    kept = mask_logits(logits, SamplingParams(temperature=1.0, top_p=top_p)).isfinite()
    for row, expected in zip(kept, logits.tolist()):
        assert set(row.nonzero().flatten().tolist()) == slow_nucleus(expected, top_p)


# The coupling


@pytest.mark.parametrize("distance", [0.2, 1.0, 3.0])
def test_a_draft_matches_its_target_as_often_as_the_coupling_promises(distance: float) -> None:
    """Pr[match] >= (1 - TV) / (1 + TV), Daliri et al.; independent draws fall far short of it."""
    num_draws, num_tokens = 20_000, 16
    target_logits = random_logits(1, num_tokens, seed=4)
    draft_logits = target_logits + random_logits(1, num_tokens, seed=5, spread=distance)
    params = SamplingParams(temperature=1.0, seed=6)
    target, draft = (
        torch.tensor(draw(logits.expand(num_draws, -1), range(num_draws), params, num_tokens))
        for logits in (target_logits, draft_logits)
    )
    target_probs, draft_probs = (torch.softmax(x[0], -1) for x in (target_logits, draft_logits))
    variation = (target_probs - draft_probs).abs().sum().item() / 2
    match_rate = (target == draft).double().mean().item()
    sampling_error = 3 * 0.5 / math.sqrt(num_draws)
    assert match_rate >= (1 - variation) / (1 + variation) - sampling_error
    assert match_rate <= 1 - variation + sampling_error  # no coupling can do better
    assert match_rate > (target_probs * draft_probs).sum().item() + 0.05
