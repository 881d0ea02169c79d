"""Texts that the target writes itself, and a loss that teaches it not to go round in loops.

Small models loop when they decode greedily. The cure is sequence-level unlikelihood training
(Welleck et al., "Neural Text Generation with Unlikelihood Training", arXiv 1908.04319): the model
writes greedy continuations, and each token that repeats what the text already holds is made less
likely. Decoding stays as it is.
"""

from __future__ import annotations

import copy
from itertools import takewhile

import torch
from transformers import LlamaForCausalLM, StaticCache

from pipespec.demo.measures import repeats
from pipespec.demo.tokenizer import END_OF_TEXT_ID

MOST_LIKELY = 1.0 - 1e-4  # keeps log(1 - p) finite


@torch.no_grad()
def continue_windows(
    model: LlamaForCausalLM,
    prompts: torch.Tensor,
    length: int,
    temperature: float = 0.0,
    rng: torch.Generator | None = None,
) -> torch.Tensor:
    """Continue prompts `[n, p]` to `[n, length]`, past an end of text as well.

    temperature 0 takes the likeliest token; above it, `rng` draws. Runs in bfloat16.
    """
    # One cast of the weights; autocast would repeat it for every token.
    writer = copy.deepcopy(model).to(torch.bfloat16).eval()
    # A cache that grows is copied whole for every token, which takes longer than the model.
    writer.set_attn_implementation("sdpa")
    cache = StaticCache(config=writer.config, max_cache_len=length)
    fed = tokens = prompts
    while tokens.shape[1] < length:
        output = writer(input_ids=fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits = output.logits[:, -1].float()
        if temperature == 0.0:
            fed = logits.argmax(-1, keepdim=True)
        else:
            probs = torch.softmax(logits / temperature, dim=-1)
            fed = torch.multinomial(probs, 1, generator=rng)
        tokens = torch.cat((tokens, fed), dim=1)
    return tokens


def repeating(texts: torch.Tensor, prompt_length: int, ngram: int) -> torch.Tensor:
    """Which tokens of `[n, length]` are to become less likely, as a bool tensor of that shape.

    Those after the prompt, up to the end of text, that end an `ngram`-gram which the row has had.
    """
    marks = torch.zeros(texts.shape, dtype=torch.bool)
    for row, text in enumerate(texts.tolist()):
        written = list(takewhile(END_OF_TEXT_ID.__ne__, text[prompt_length:]))
        flags = repeats(text[:prompt_length] + written, ngram)
        marks[row, prompt_length : len(flags)] = torch.tensor(flags[prompt_length:])
    return marks


def unlikelihood_loss(
    logits: torch.Tensor, following: torch.Tensor, marks: torch.Tensor
) -> torch.Tensor:
    """-log(1 - p) of the marked tokens, in nats, summed and divided by the number of all tokens.

    logits `[n, length, vocab]` predict `following` `[n, length]`; `marks` has that shape. Divided
    by all, it fades as the loops do.
    """
    log_probs = torch.log_softmax(logits.float(), dim=-1).gather(-1, following[..., None])[..., 0]
    unlikely = -torch.log1p(-log_probs.exp().clamp(max=MOST_LIKELY))
    return (unlikely * marks).sum() / marks.numel()
