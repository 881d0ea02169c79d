"""Trains one model of the family, resumably.

Matrices are trained with Muon (Jordan et al., 2024), embeddings and norms with AdamW. A checkpoint
holds the weights, both optimizers and the step; windows are drawn by step number, so a run that was
killed and started again takes the same steps as one that was not. That holds bit for bit on one
machine at one thread count, as long as the wall-clock guard does not cut the schedule short.
"""

from __future__ import annotations

import math
import multiprocessing
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipespec.demo.batches import TokenStreams, step_rng
from pipespec.demo.distill import TeacherShards, distillation_loss
from pipespec.demo.own_text import continue_windows, repeating, unlikelihood_loss
from pipespec.demo.progress import Progress, Report
from pipespec.demo.settings import FamilyPlan, LoopCure, ModelPlan, ModelShape, Phase
from pipespec.demo.tokenizer import END_OF_TEXT_ID
from pipespec.errors import UsageError

CHECKPOINT_EVERY_S = 60.0
REPORT_EVERY_S = 1.0
CURVE_POINTS = 100
# The backward pass of torch's fused attention on CPUs costs more than plain matrix products do
# until the scores outgrow the cache; measured here on windows of 256, 512 and 1024 tokens.
LONGEST_PLAIN_ATTENTION = 256


@dataclass(frozen=True, slots=True)
class TrainingRecord:
    """What one model's training took: steps and tokens done, mean recent loss, seconds.

    curve: tokens seen and the mean recent loss, about a hundred times on the way. The loss is in
    nats a token: on text or, in distillation, against the target's distribution.
    """

    name: str
    num_steps: int
    num_tokens: int
    loss: float
    elapsed_s: float
    cut_short: bool
    curve: tuple[tuple[int, float], ...]


def new_model(shape: ModelShape, plan: FamilyPlan) -> LlamaForCausalLM:
    """A freshly initialized model in float32; the seed and the model's name decide the weights."""
    config = LlamaConfig(
        vocab_size=plan.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=plan.max_positions,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=None,
    )
    torch.manual_seed(int(step_rng(plan.seed, shape.name, 0).integers(2**31)))
    return LlamaForCausalLM(config)


class Learner:
    """One model on its way through its plan; `run` takes it to the end."""

    def __init__(
        self,
        model_plan: ModelPlan,
        plan: FamilyPlan,
        streams: TokenStreams,
        shards: TeacherShards | None,
        checkpoint: Path,
    ) -> None:
        self._model_plan = model_plan
        self._plan = plan
        self._streams = streams
        self._shards = shards
        self._checkpoint = checkpoint
        self.model = new_model(model_plan.shape, plan)
        self._optimizers = _optimizers(self.model, model_plan, plan)
        self._step = 0
        self._elapsed_s = 0.0
        self._loss = math.nan
        self._curve: list[tuple[int, float]] = []
        self._text_loss = self._compiled(self._text_loss_of)
        self._loop_loss = self._compiled(self._loop_loss_of)
        self._target_loss = self._compiled(self._target_loss_of)
        if checkpoint.exists():
            self._load()

    def run(
        self,
        limit_s: float,
        report: Report,
        on_checkpoint: Callable[[LlamaForCausalLM], None] | None = None,
        checkpoint_every_s: float = CHECKPOINT_EVERY_S,
    ) -> TrainingRecord:
        """Train to the plan's end or until `limit_s` seconds of training have gone by.

        The limit does not cut the cosine off: it hurries through the schedule, so that the model
        is an annealed one either way.
        """
        parent = multiprocessing.parent_process()
        saved = reported = time.monotonic()
        report(self._progress(limit_s))
        while not self._finished(limit_s):
            # A killed parent must not leave children that go on writing its checkpoints.
            if parent is not None and not parent.is_alive():
                raise SystemExit(1)
            started = time.monotonic()
            self._take_step(self._place(limit_s))
            now = time.monotonic()
            self._elapsed_s += now - started
            if now - reported >= REPORT_EVERY_S:
                reported = now
                report(self._progress(limit_s))
            if now - saved >= checkpoint_every_s:
                saved = now
                self._save()
                if on_checkpoint is not None:
                    on_checkpoint(self.model)
        self._save()
        report(self._progress(limit_s))
        return self.record()

    def record(self) -> TrainingRecord:
        """What the training has taken so far."""
        return TrainingRecord(
            name=self._model_plan.shape.name,
            num_steps=self._step,
            num_tokens=self._num_tokens,
            loss=self._loss,
            elapsed_s=self._elapsed_s,
            cut_short=self._step < self._model_plan.num_steps,
            curve=tuple(self._curve),
        )

    @property
    def _num_tokens(self) -> int:
        return self._step * self._model_plan.tokens_per_step

    def _place(self, limit_s: float) -> int:
        """Where in the schedule the next step is: its number, or further on when time is short."""
        by_time = int(self._elapsed_s / limit_s * self._model_plan.num_steps)
        return max(self._step, by_time)

    def _finished(self, limit_s: float) -> bool:
        return self._place(limit_s) >= self._model_plan.num_steps

    def _take_step(self, place: int) -> None:
        phase = self._model_plan.phase_at(place)
        rng = step_rng(self._plan.seed, self._model_plan.shape.name, self._step)
        is_short = phase.window_length <= LONGEST_PLAIN_ATTENTION
        self.model.set_attn_implementation("eager" if is_short else "sdpa")
        loss = self._loss_of(phase, rng)
        torch.autograd.backward(loss)
        if phase.loop_cure is not None:
            cure = phase.loop_cure
            torch.autograd.backward(cure.weight * self._loss_on_own_text(cure, rng))
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * self._learning_rate_share(place, phase)
            optimizer.step()
            optimizer.zero_grad()
        value = loss.item()
        self._loss = value if math.isnan(self._loss) else 0.98 * self._loss + 0.02 * value
        self._step += 1
        if self._step % max(1, self._model_plan.num_steps // CURVE_POINTS) == 0:
            self._curve.append((self._num_tokens, self._loss))

    def _loss_of(self, phase: Phase, rng: np.random.Generator) -> torch.Tensor:
        num_windows = max(1, self._model_plan.tokens_per_step // phase.window_length)
        if phase.from_target:
            assert self._shards is not None
            return self._target_loss(*self._shards.batch(rng, num_windows, phase.window_length))
        windows = self._streams.windows(rng, num_windows, phase.window_length + 1, phase.shares)
        return self._text_loss(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())

    def _loss_on_own_text(self, cure: LoopCure, rng: np.random.Generator) -> torch.Tensor:
        prompts = self._streams.prompts(
            rng, cure.num_texts, cure.prompt_length, cure.beginning_shares, cure.shares
        )
        texts = continue_windows(self.model, prompts, cure.text_length)
        return self._loop_loss(texts, repeating(texts, cure.prompt_length, cure.ngram))

    def _learning_rate_share(self, place: int, phase: Phase) -> float:
        if phase.learning_rate_share is not None:
            return phase.learning_rate_share
        warmup = min(1.0, (self._step + 1) / self._plan.warmup_steps)
        final = self._plan.final_learning_rate_share
        cosine = 0.5 * (1.0 + math.cos(math.pi * place / self._model_plan.num_steps))
        return warmup * (final + (1.0 - final) * cosine)

    def _logits(self, tokens: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self._plan.bf16):
            logits: torch.Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits

    def _text_loss_of(self, tokens: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
        logits = self._logits(tokens).float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten())

    def _loop_loss_of(self, texts: torch.Tensor, marks: torch.Tensor) -> torch.Tensor:
        return unlikelihood_loss(self._logits(texts[:, :-1]), texts[:, 1:], marks[:, 1:])

    def _target_loss_of(
        self, tokens: torch.Tensor, top_ids: torch.Tensor, top_log_probs: torch.Tensor
    ) -> torch.Tensor:
        return distillation_loss(self._logits(tokens), top_ids, top_log_probs)

    def _compiled(self, loss: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        if not self._plan.compile:
            return loss
        compiled: Callable[..., torch.Tensor] = torch.compile(loss, dynamic=False)
        return compiled

    def _progress(self, limit_s: float) -> Progress:
        num_steps = self._model_plan.num_steps
        phase = self._model_plan.phase_at(min(self._place(limit_s), num_steps - 1)).name
        speed = self._num_tokens / max(self._elapsed_s, 1e-9)
        note = f"{phase}, loss {self._loss:.3f}, {self._elapsed_s:.0f} s, {speed:,.0f} tokens/s"
        return Progress(self._model_plan.shape.name, self._step, num_steps, note)

    def _fingerprint(self) -> str:
        return repr((self._model_plan, self._plan))

    def _save(self) -> None:
        self._checkpoint.parent.mkdir(parents=True, exist_ok=True)
        partial = self._checkpoint.with_name(self._checkpoint.name + ".partial")
        state: dict[str, Any] = {
            "fingerprint": self._fingerprint(),
            "step": self._step,
            "elapsed_s": self._elapsed_s,
            "loss": self._loss,
            "curve": self._curve,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
        }
        torch.save(state, partial)
        partial.replace(self._checkpoint)

    def _load(self) -> None:
        try:
            state = torch.load(self._checkpoint, weights_only=True)
            fingerprint = state["fingerprint"]
        except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
            raise UsageError(
                f"{self._checkpoint} is not a readable checkpoint; delete it or choose another "
                "--work-dir"
            ) from error
        if fingerprint != self._fingerprint():
            raise UsageError(
                f"{self._checkpoint} belongs to a run with other settings; choose an empty "
                "--work-dir or repeat the settings"
            )
        self._step, self._elapsed_s = state["step"], state["elapsed_s"]
        self._loss, self._curve = state["loss"], state["curve"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def _optimizers(
    model: LlamaForCausalLM, model_plan: ModelPlan, plan: FamilyPlan
) -> tuple[torch.optim.Optimizer, ...]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = torch.optim.Muon(
        matrices,
        lr=model_plan.matrix_learning_rate,
        weight_decay=plan.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    adam = torch.optim.AdamW(
        others,
        lr=model_plan.embedding_learning_rate,
        betas=(0.9, 0.95),
        weight_decay=0.0,
    )
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return muon, adam
