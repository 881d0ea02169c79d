"""What the smaller models learn from the target: its likeliest tokens, written down once.

The target reads train text and its own continuations of train text; the `top` log-probabilities of
every position go to disk, so that the smaller models never wait for the target. The rest of the
vocabulary is kept as one bucket, so the loss is a Kullback-Leibler divergence over `top + 1`
outcomes (up to the target's entropy, which is constant). It is sequence-level distillation by
samples (Kim and Rush, 2016) mixed with word-level distillation on text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import LlamaForCausalLM

from pipespec.demo.batches import TokenStreams, save_array, step_rng
from pipespec.demo.own_text import continue_windows
from pipespec.demo.progress import Progress, Report
from pipespec.demo.settings import FamilyPlan, Shares, TeacherPlan

Array = npt.NDArray[np.generic]

OPINION_TOKENS = 16384  # in one forward of the target over windows


@dataclass(frozen=True, slots=True)
class Shard:
    """Windows with the target's opinion at every position.

    `tokens` [windows, length]; `top_ids` and `top_log_probs` [windows, length, top].
    """

    tokens: Array
    top_ids: Array
    top_log_probs: Array

    def rows(self, rng: np.random.Generator, num_rows: int) -> tuple[torch.Tensor, ...]:
        """Random rows as int64 tokens, int64 ids and float32 log-probabilities."""
        picked = np.sort(rng.integers(0, len(self.tokens), num_rows))
        return (
            torch.from_numpy(self.tokens[picked].astype(np.int64)),
            torch.from_numpy(self.top_ids[picked].astype(np.int64)),
            torch.from_numpy(self.top_log_probs[picked].astype(np.float32)),
        )


@dataclass(frozen=True, slots=True)
class TeacherShards:
    """The three kinds of windows: short text, long text, and the target's own continuations."""

    short: Shard
    long: Shard
    generated: Shard
    short_length: int
    generated_share: float

    def batch(
        self, rng: np.random.Generator, num_windows: int, length: int
    ) -> tuple[torch.Tensor, ...]:
        """A batch for one step; short ones mix text with the target's own continuations."""
        if length != self.short_length:
            return self.long.rows(rng, num_windows)
        num_generated = round(num_windows * self.generated_share)
        parts = (
            self.generated.rows(rng, num_generated),
            self.short.rows(rng, num_windows - num_generated),
        )
        return tuple(torch.cat(pair) for pair in zip(*parts, strict=True))


def distillation_loss(
    logits: torch.Tensor, top_ids: torch.Tensor, top_log_probs: torch.Tensor
) -> torch.Tensor:
    """Mean cross-entropy in nats of draft logits `[batch, length, vocab]` under the target.

    The target is given by its `top` tokens `[batch, length, top]`; the others form one bucket.
    """
    draft = torch.log_softmax(logits.float(), dim=-1).gather(-1, top_ids)
    target = top_log_probs.exp()
    target_rest = (1.0 - target.sum(-1)).clamp_min(0.0)
    draft_rest = (1.0 - draft.exp().sum(-1)).clamp_min(1e-6)
    return -((target * draft).sum(-1) + target_rest * draft_rest.log()).mean()


def teacher_shards(
    target: LlamaForCausalLM, streams: TokenStreams, plan: FamilyPlan, folder: Path, report: Report
) -> TeacherShards:
    """The target's shards; those that an earlier run has finished are read, the others made."""
    teacher = plan.teacher
    target.set_attn_implementation("sdpa")  # the fastest without a backward pass

    def text(name: str, num_windows: int, length: int, shares: Shares) -> Shard:
        rng = step_rng(plan.seed, f"teacher {name}", 0)
        return _shard(
            folder,
            name,
            lambda: streams.windows(rng, num_windows, length, shares),
            target,
            plan,
            report,
        )

    def continuations() -> torch.Tensor:
        rng = step_rng(plan.seed, "teacher generated", 0)
        prompts = streams.prompts(
            rng,
            teacher.num_generated_windows,
            teacher.prompt_length,
            teacher.beginning_shares,
            teacher.long_shares,
        )
        mixed = prompts[torch.from_numpy(rng.permutation(len(prompts)))]
        return generate(target, mixed, plan.short_length, teacher, plan.seed, report)

    return TeacherShards(
        short=text("short", teacher.num_short_windows, plan.short_length, teacher.short_shares),
        long=text("long", teacher.num_long_windows, plan.long_length, teacher.long_shares),
        generated=_shard(folder, "generated", continuations, target, plan, report),
        short_length=plan.short_length,
        generated_share=teacher.generated_share,
    )


def open_shards(plan: FamilyPlan, folder: Path) -> TeacherShards:
    """The shards that `teacher_shards` has written, mapped rather than read."""
    return TeacherShards(
        short=_open(folder, "short"),
        long=_open(folder, "long"),
        generated=_open(folder, "generated"),
        short_length=plan.short_length,
        generated_share=plan.teacher.generated_share,
    )


def generate(
    target: LlamaForCausalLM,
    prompts: torch.Tensor,
    length: int,
    teacher: TeacherPlan,
    seed: int,
    report: Report,
) -> torch.Tensor:
    """Continue prompts `[n, p]` to `[n, length]`: even batches greedily, odd ones by sampling."""
    rng = torch.Generator().manual_seed(seed)
    rows: list[torch.Tensor] = []
    for index, batch in enumerate(torch.split(prompts, teacher.batch_size)):
        temperature = teacher.temperature if index % 2 else 0.0
        rows.append(continue_windows(target, batch, length, temperature, rng))
        done = min((index + 1) * teacher.batch_size, len(prompts))
        report(Progress("target's own continuations", done, len(prompts)))
    return torch.cat(rows)


def _shard(
    folder: Path,
    name: str,
    make_tokens: Callable[[], torch.Tensor],
    target: LlamaForCausalLM,
    plan: FamilyPlan,
    report: Report,
) -> Shard:
    if not _path(folder, name, "top_log_probs").exists():
        tokens = make_tokens()
        top_ids = np.empty((*tokens.shape, plan.teacher.top), dtype=np.uint16)
        top_log_probs = np.empty(top_ids.shape, dtype=np.float16)
        batch_size = max(1, OPINION_TOKENS // tokens.shape[1])
        for start in range(0, len(tokens), batch_size):
            rows = slice(start, start + batch_size)
            top_log_probs[rows], top_ids[rows] = _opinion(target, tokens[rows], plan.teacher.top)
            done = min(rows.stop, len(tokens))
            report(Progress(f"target's opinion on {name} windows", done, len(tokens)))
        save_array(_path(folder, name, "tokens"), tokens.numpy().astype(np.uint16))
        save_array(_path(folder, name, "top_ids"), top_ids)
        # Written last: its presence is what says that the shard is complete.
        save_array(_path(folder, name, "top_log_probs"), top_log_probs)
    return _open(folder, name)


@torch.inference_mode()
def _opinion(
    target: LlamaForCausalLM, tokens: torch.Tensor, top: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    with torch.autocast("cpu", torch.bfloat16):
        logits = target(input_ids=tokens, use_cache=False).logits.float()
    # Top logits first: a log-softmax over the whole vocabulary would be written out for nothing.
    values, ids = logits.topk(top, dim=-1)
    values = values - logits.logsumexp(-1, keepdim=True)
    return values.numpy(), ids.numpy()


def _open(folder: Path, name: str) -> Shard:
    tokens, top_ids, top_log_probs = (
        np.load(_path(folder, name, part), mmap_mode="r")
        for part in ("tokens", "top_ids", "top_log_probs")
    )
    return Shard(tokens, top_ids, top_log_probs)


def _path(folder: Path, name: str, part: str) -> Path:
    return folder / f"{name}-{part}.npy"
