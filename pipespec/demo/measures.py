"""Figures about a draft and a target on the same tokens; no model is loaded here.

Speculation is scored teacher-forced: the draft's likeliest token after every prefix of the target's
greedy text. For greedy decoding that is exact, because an accepted prefix is the target's text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache, LlamaForCausalLM

from pipespec.demo.tokenizer import END_OF_TEXT_ID

NGRAM = 4


@dataclass(frozen=True, slots=True)
class Continuation:
    """Tokens of a prompt and of a greedy continuation of it."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]

    def repeated(self) -> list[bool]:
        """For each token: does it end a 4-gram that the prompt or the text before it contains?"""
        text = self.prompt + self.tokens
        seen: set[tuple[int, ...]] = set()
        flags: list[bool] = []
        for end in range(1, len(text) + 1):
            ngram = text[max(0, end - NGRAM) : end]
            flags.append(ngram in seen)
            if len(ngram) == NGRAM:
                seen.add(ngram)
        return flags[len(self.prompt) :]


@torch.inference_mode()
def greedy(model: LlamaForCausalLM, prompt: Sequence[int], num_tokens: int) -> Continuation:
    """The model's likeliest continuation, up to `num_tokens` or to and including end of text."""
    cache = DynamicCache()
    tokens: list[int] = []
    fed = torch.tensor([prompt])
    while len(tokens) < num_tokens:
        logits = model(input_ids=fed, past_key_values=cache, use_cache=True).logits
        tokens.append(int(logits[0, -1].argmax()))
        if tokens[-1] == END_OF_TEXT_ID:
            break
        fed = torch.tensor([tokens[-1:]])
    return Continuation(tuple(prompt), tuple(tokens))


@torch.inference_mode()
def agreement(draft: LlamaForCausalLM, continuation: Continuation) -> list[bool]:
    """For each token of a continuation: is it what the draft would have proposed there?"""
    text = torch.tensor([continuation.prompt + continuation.tokens])
    proposed = draft(input_ids=text[:, :-1], use_cache=False).logits[0].argmax(-1)
    start = len(continuation.prompt) - 1
    flags: list[bool] = (proposed[start:] == text[0, start + 1 :]).tolist()
    return flags


def accepted_per_round(agrees: Sequence[bool], lookahead: int) -> list[int]:
    """Drafts accepted in each verification round of a text; an unfinished last round is left out.

    After `accepted` drafts comes the correction or bonus token, so a round covers one token more.
    """
    accepted: list[int] = []
    position = 0
    while position + lookahead < len(agrees):
        run = agrees[position : position + lookahead]
        accepted.append(run.index(False) if False in run else lookahead)
        position += accepted[-1] + 1
    return accepted


@torch.inference_mode()
def bits_and_choices(
    model: LlamaForCausalLM, windows: torch.Tensor, num_context: int
) -> tuple[float, torch.Tensor]:
    """Bits spent on each window's tokens after `num_context`, and the likeliest tokens there.

    `windows` is `[n, length]`; the choices are `[n, length - num_context]`.
    """
    bits, choices = 0.0, []
    for window in torch.split(windows, 8):
        logits = model(input_ids=window[:, :-1], use_cache=False).logits[:, num_context - 1 :]
        log_probs = torch.log_softmax(logits.float(), dim=-1)
        scored = log_probs.gather(-1, window[:, num_context:, None])
        bits -= scored.double().sum().item() / float(torch.log(torch.tensor(2.0)))
        choices.append(log_probs.argmax(-1))
    return bits, torch.cat(choices)
