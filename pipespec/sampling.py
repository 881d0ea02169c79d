"""Logits to token: one rule for every stage, with or without randomness.

The token at absolute position n is

    argmax_v( logits'_v / T + G(seed, stream, n, v) )

where logits' has the tokens that top-k, top-p and min-p drop at -inf and G is Gumbel noise. For
independent G this draws from softmax(logits' / T) exactly. G is a *pure function* of its four
arguments, so a draft and its target meet the same noise at the same position: they draw the same
token with probability at least (1 - TV) / (1 + TV), and verification is plain equality. At T = 0
there is no noise: the most likely token, the lowest id among equals.

Gumbel coupling: Daliri, Musco, Suresh, "Coupling without Communication and Drafter-Invariant
Speculative Decoding", arXiv 2408.07978. Counter-based generator: Philox-4x32-10, Salmon et al.,
"Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.

The generator is integer arithmetic, equal on every device; what follows it is float64, equal up to
the last bit of `log`. This module knows no model, cache or request.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from pipespec.config import SamplingParams
from pipespec.errors import PipeSpecError

TOKEN_STREAM: Final = 0  # the noise that chooses tokens; other uses take another stream

_MASK32: Final = 0xFFFFFFFF
_MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS: Final = (0x9E3779B9, 0xBB67AE85)
_NUM_ROUNDS: Final = 10
_NUCLEUS_GUESS: Final = 256  # tokens that hold top_p of most distributions


def draw(
    logits: Tensor, positions: Sequence[int], params: SamplingParams, vocab_size: int
) -> list[int]:
    """The token of each row.

    logits: [n, width], any float dtype; columns from `vocab_size` on (a padded head) are ignored.
    positions: n absolute positions, of the tokens being chosen. Rows do not influence each other.

    Raises:
        PipeSpecError: a row without a finite maximum (NaN, +inf, or -inf everywhere).
    """
    logits, highest, ids = _most_likely(logits, positions, vocab_size)
    if params.temperature > 0.0:
        ids = _perturbed(logits, highest, positions, params).argmax(dim=-1)
    chosen: list[int] = ids.tolist()
    return chosen


def keeps_all(params: SamplingParams) -> bool:
    """Whether `params` drops no token: what `draw_on_device` can do."""
    return params.top_k == 0 and params.top_p == 1.0 and params.min_p == 0.0


def draw_on_device(
    logits: Tensor, positions: Tensor, temperature: Tensor, constants: Tensor | None
) -> Tensor:
    """`draw` without a look at any value on the host, so that a CUDA graph can hold it: [n] int64,
    -1 for a row without a finite maximum.

    logits: [n, vocab]. positions: [n] int64, of the tokens being chosen. temperature: [] float64.
    constants: of the seed, see `philox_constants`; None takes the most likely token. All on one
    device.
    """
    highest, ids = logits.max(dim=-1)
    if constants is not None:
        scores = _scale(logits, highest, temperature)
        scores += _noise_of_all(constants, TOKEN_STREAM, positions.unsqueeze(1), scores.shape[1])
        ids = scores.argmax(dim=-1)
    return ids.masked_fill_(highest.isfinite().logical_not_(), -1)


def damaged_logits() -> PipeSpecError:
    """The error for logits without a finite maximum."""
    return PipeSpecError(
        "the model's logits are NaN or infinite: its weights are damaged or overflow in this "
        "dtype; try dtype float32 or bfloat16 in the models config"
    )


def rank(
    logits: Tensor, positions: Sequence[int], params: SamplingParams, vocab_size: int, count: int
) -> list[tuple[int, ...]]:
    """For each row the `count` tokens that come first (all, of a smaller vocabulary): the one that
    `draw` draws, then those that would be drawn if it were not there, best first.

    Arguments and errors as of `draw`. Above temperature 0 the order is that of the perturbed
    logits: the same noise decides at the next stage.
    """
    scores, highest, ids = _most_likely(logits, positions, vocab_size)
    if params.temperature > 0.0:
        scores = _perturbed(scores, highest, positions, params)
        ids = scores.argmax(dim=-1)
    best = scores.topk(min(count, scores.shape[1]), dim=-1).indices.tolist()
    return [
        (token, *[other for other in row if other != token][: count - 1])
        for token, row in zip(ids.tolist(), best, strict=True)
    ]


def _most_likely(
    logits: Tensor, positions: Sequence[int], vocab_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The columns that count, and each row's maximum with its first id.

    Raises:
        PipeSpecError: a row without a finite maximum.
    """
    assert len(positions) == len(logits)
    if logits.shape[-1] > vocab_size:
        logits = logits[:, :vocab_size]
    highest, ids = logits.max(dim=-1)  # the first of equal maxima, like argmax but faster
    if not all(map(math.isfinite, highest.tolist())):
        raise damaged_logits()
    return logits, highest, ids


def _perturbed(
    logits: Tensor, highest: Tensor, positions: Sequence[int], params: SamplingParams
) -> Tensor:
    """(logits - highest) / T plus noise, float64; -inf for tokens that `params` drops."""
    scaled = _scale(logits, highest, params.temperature)
    at = torch.tensor(positions, device=logits.device).unsqueeze(1)
    keep = _survivors(scaled, params)
    if keep is None:
        constants = philox_constants(params.seed).to(logits.device)
        scaled += _noise_of_all(constants, TOKEN_STREAM, at, scaled.shape[1])
    else:
        rows, tokens = keep.nonzero(as_tuple=True)
        noise = gumbel_noise(params.seed, TOKEN_STREAM, at[rows, 0], tokens)
        noise += scaled[rows, tokens]
        scaled.fill_(-math.inf)[rows, tokens] = noise
    return scaled


def mask_logits(logits: Tensor, params: SamplingParams) -> Tensor:
    """`logits` [n, vocab] with the tokens that `params` drops at -inf; a new tensor, same dtype.

    What remains is the support of the distribution that `draw` draws from; its probabilities are
    softmax(result / T). At temperature 0 only the chosen token remains.
    """
    highest, ids = logits.max(dim=-1, keepdim=True)
    if params.temperature == 0.0:
        only = torch.full_like(logits, -math.inf)
        return only.scatter_(1, ids, highest)
    keep = _survivors(_scale(logits, highest[:, 0], params.temperature), params)
    return logits.clone() if keep is None else logits.masked_fill(~keep, -math.inf)


def gumbel_noise(seed: int, stream: int, positions: Tensor, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise, float64, of the broadcast shape of the two int64 tensors.

    positions, token_ids: same device; 0 <= position < 2**63, 0 <= token id < 2**32. An element is
    a function of (seed, stream, position, token id) and of nothing else.
    """
    token_ids, positions = torch.broadcast_tensors(token_ids, positions)  # type: ignore[no-untyped-call]
    constants = philox_constants(seed).to(positions.device)
    words = _philox_words(constants, stream, positions, token_ids >> 1)
    odd = (token_ids & 1).bool()
    return _gumbel(torch.where(odd, words[2], words[0]), torch.where(odd, words[3], words[1]))


def philox_4x32(counter: Tensor, seed: int) -> Tensor:
    """Philox-4x32-10 of `counter` under the 64-bit key `seed`.

    counter: [4, ...] int64, each a 32-bit word, word 0 first. Returns four such words.
    """
    return _philox(counter, philox_constants(seed).to(counter.device))


def philox_constants(seed: int) -> Tensor:
    """[11, 2] int64 on the CPU: the keys of each round under the 64-bit key `seed`, and the
    multipliers."""
    keys = [
        [
            ((seed >> 32 * half) + index * step) & _MASK32
            for half, step in ((0, _KEY_STEPS[0]), (1, _KEY_STEPS[1]))
        ]
        for index in range(_NUM_ROUNDS)
    ]
    return torch.tensor([*keys, _MULTIPLIERS])


def _philox(counter: Tensor, constants: Tensor) -> Tensor:
    """`philox_4x32` with the constants of a seed, on the counter's device."""
    trailing = [1] * (counter.dim() - 1)
    *keys, multipliers = constants.view(_NUM_ROUNDS + 1, 2, *trailing).unbind()
    even, odd = counter[0::2], counter[1::2]
    for key in keys:
        # 32 x 32 -> 64 bits: int64 wraps, and the bit pattern is that of the unsigned product.
        # Its low half is masked only where it is used: one round later, or at the end.
        swapped = (even * multipliers).flip(0)
        even = (swapped >> 32).bitwise_xor_(odd).bitwise_xor_(key).bitwise_and_(_MASK32)
        odd = swapped
    odd = odd & _MASK32
    return torch.stack((even[0], odd[0], even[1], odd[1]))


def _scale(logits: Tensor, highest: Tensor, temperature: float | Tensor) -> Tensor:
    """(logits - highest) / T in float64: 0 for the most likely token, at any T."""
    return (logits - highest.double().unsqueeze(1)).div_(temperature)


def _survivors(scaled: Tensor, params: SamplingParams) -> Tensor | None:
    """Which tokens are kept, [n, vocab] bool, or None for all: top-k, then top-p, then min-p.

    scaled: what `_scale` returns.
    """
    keep: Tensor | None = None
    if 0 < params.top_k < scaled.shape[1]:
        kth = scaled.topk(params.top_k, dim=-1).values[:, -1:]
        keep = scaled >= kth  # all that equal the k-th: no tie is broken by a sort's whim
    if params.top_p < 1.0:
        keep = _nucleus(
            scaled if keep is None else scaled.masked_fill(~keep, -math.inf), params.top_p
        )
    if params.min_p > 0.0:
        likely = scaled >= math.log(params.min_p)
        keep = likely if keep is None else keep.logical_and_(likely)
    return keep


def _nucleus(scaled: Tensor, top_p: float) -> Tensor:
    """The smallest set of most likely tokens that reaches top_p; among equals, lower ids first."""
    probs = torch.softmax(scaled, dim=-1)
    vocab_size, num_top = probs.shape[1], _NUCLEUS_GUESS
    while True:
        num_top = min(num_top, vocab_size)
        top, ids = probs.topk(num_top, dim=-1)
        inside = (top.cumsum(dim=-1).sub_(top) < top_p).logical_and_(top > 0.0)
        # Sorting the whole vocabulary is slow, and needed only where a nucleus may reach beyond
        # the tokens looked at: to others as likely as the last of them.
        if num_top == vocab_size or not (inside & (top == top[:, -1:])).any():
            break
        num_top *= 4
    ids = ids.sort(dim=-1).values
    order = probs.gather(1, ids).sort(dim=-1, descending=True, stable=True).indices
    keep = torch.zeros_like(scaled, dtype=torch.bool)
    return keep.scatter_(1, ids.gather(1, order), inside)


def _noise_of_all(constants: Tensor, stream: int, positions: Tensor, num_tokens: int) -> Tensor:
    """`gumbel_noise` of the tokens 0 to num_tokens - 1: [n, num_tokens] for positions [n, 1].

    Half the work: one generator block serves an even token and the odd one after it.
    """
    blocks = torch.arange((num_tokens + 1) // 2, device=positions.device)
    shape = (len(positions), len(blocks))
    words = _philox_words(constants, stream, positions.expand(shape), blocks.expand(shape))
    noise = _gumbel(words[0::2], words[1::2])  # [2, n, blocks]: even tokens, odd tokens
    return noise.movedim(0, -1).flatten(1)[:, :num_tokens]


def _philox_words(constants: Tensor, stream: int, positions: Tensor, blocks: Tensor) -> Tensor:
    """The generator's four words for each (position, block of two tokens): [4, ...] int64."""
    streams = torch.full_like(blocks, stream)
    return _philox(torch.stack((blocks, positions & _MASK32, positions >> 32, streams)), constants)


def _gumbel(high: Tensor, low: Tensor) -> Tensor:
    """-log(-log(u)) for the 53-bit uniform u in (0, 1) that two 32-bit words make."""
    bits = (high << 21).bitwise_or_(low >> 11)
    # (bits + 1) / 2**53; the topmost value would round to u = 1, whose noise is infinite.
    uniform = bits.clamp_(max=(1 << 53) - 2).add_(1).double().mul_(2.0**-53)
    return uniform.log_().neg_().log_().neg_()
