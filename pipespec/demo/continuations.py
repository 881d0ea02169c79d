"""Texts that a model writes, many at once, and what another model would have drafted for them.

Tokens are chosen by `pipespec.sampling`, so a draft and its target meet the same noise at the same
position, as in a run of PipeSpec. Models are transformers' own; prompts of different lengths share
a batch by padding on the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Final

import torch
from transformers import DynamicCache, LlamaForCausalLM

from pipespec.config import SamplingParams
from pipespec.demo.measures import Continuation
from pipespec.demo.tokenizer import END_OF_TEXT_ID
from pipespec.sampling import TOKEN_STREAM, draw, gumbel_noise

BATCH_SIZE: Final = 64


def continue_texts(
    model: LlamaForCausalLM,
    prompts: Sequence[Sequence[int]],
    sampling: Sequence[SamplingParams],
    num_tokens: int,
) -> list[Continuation]:
    """Each prompt's continuation, of `num_tokens` or to and including end of text."""
    # Neighbours of like lengths need little padding.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    texts: dict[int, Continuation] = {}
    for start in range(0, len(order), BATCH_SIZE):
        batch = order[start : start + BATCH_SIZE]
        rows = [prompts[index] for index in batch]
        written = _continue_batch(model, rows, [sampling[index] for index in batch], num_tokens)
        for index, row, tokens in zip(batch, rows, written, strict=True):
            texts[index] = Continuation(tuple(row), tuple(tokens))
    return [texts[index] for index in range(len(prompts))]


@torch.inference_mode()
def draft_ranks(
    drafts: Sequence[LlamaForCausalLM], text: Continuation, sampling: SamplingParams
) -> list[list[int]]:
    """For each draft, the rank that it gives to each token of the text; 1 is its own choice.

    sampling: what the text was chosen with: a temperature and a seed. Above temperature 0 the rank
    is that of the logits with their noise, which is the order in which the draft would choose.
    """
    assert (sampling.top_p, sampling.top_k, sampling.min_p) == (1.0, 0, 0.0)
    ids = torch.tensor(text.prompt + text.tokens)
    first = len(text.prompt)
    chosen = ids[first:, None]  # [tokens, 1]
    noise: torch.Tensor | None = None
    ranks: list[list[int]] = []
    for draft in drafts:
        logits = draft(input_ids=ids[None, :-1], use_cache=False).logits[0, first - 1 :]
        if not sampling.is_greedy:
            if noise is None:
                positions = torch.arange(first, len(ids))[:, None]
                vocabulary = torch.arange(logits.shape[1])
                noise = gumbel_noise(sampling.seed, TOKEN_STREAM, positions, vocabulary)
            logits = logits.double() / sampling.temperature + noise
        own = logits.gather(1, chosen)
        # Among equals the lowest id is chosen first.
        before = (logits == own) & (torch.arange(logits.shape[1]) < chosen)
        ranks.append((1 + (logits > own).sum(1) + before.sum(1)).tolist())
    return ranks


@torch.inference_mode()
def _continue_batch(
    model: LlamaForCausalLM,
    prompts: Sequence[Sequence[int]],
    sampling: Sequence[SamplingParams],
    num_tokens: int,
) -> list[list[int]]:
    longest = max(map(len, prompts))
    padded = [[END_OF_TEXT_ID] * (longest - len(row)) + list(row) for row in prompts]
    fed = torch.tensor(padded)  # [rows, tokens]
    lengths = torch.tensor([len(row) for row in prompts])[:, None]
    mask = (torch.arange(longest) >= longest - lengths).long()  # [rows, tokens so far]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache = DynamicCache()
    texts: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # those that go on
    for _ in range(num_tokens):
        output = model(
            input_ids=fed,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        positions = positions[:, -1:] + 1
        fed = _draw(output.logits[:, -1], positions, [sampling[row] for row in rows])
        for row, token in zip(rows, fed[:, 0].tolist(), strict=True):
            texts[row].append(token)
        going_on = (fed[:, 0] != END_OF_TEXT_ID).nonzero()[:, 0]
        if len(going_on) == 0:
            break
        if len(going_on) < len(rows):
            cache.batch_select_indices(going_on)
            fed, mask, positions = fed[going_on], mask[going_on], positions[going_on]
            rows = [rows[index] for index in going_on.tolist()]
        mask = torch.cat((mask, mask.new_ones(len(rows), 1)), dim=1)
    return texts


def _draw(
    logits: torch.Tensor, positions: torch.Tensor, sampling: Sequence[SamplingParams]
) -> torch.Tensor:
    """The next tokens [rows, 1], from logits [rows, vocab]; rows of equal sampling go together."""
    chosen = torch.empty_like(positions)
    for params in dict.fromkeys(sampling):
        rows = [row for row, other in enumerate(sampling) if other == params]
        at = chain.from_iterable(positions[rows].tolist())
        chosen[rows, 0] = torch.tensor(draw(logits[rows], list(at), params, logits.shape[1]))
    return chosen
