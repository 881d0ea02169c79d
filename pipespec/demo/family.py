"""Trains the whole family: tokenizer, target, the target's opinions, then the smaller models.

Every stage leaves its result in the work folder and is skipped when it is already there. The
smaller models are trained side by side in processes of their own, each with its share of threads.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import multiprocessing.queues
import platform
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import GenerationConfig, LlamaForCausalLM

from pipespec.data.arithmetic import arithmetic_text
from pipespec.demo.batches import TokenStreams, build_streams, require_length
from pipespec.demo.corpus import SourceFile, is_held_out
from pipespec.demo.distill import open_shards, teacher_shards
from pipespec.demo.learner import Learner, TrainingRecord
from pipespec.demo.progress import Progress, Report
from pipespec.demo.settings import FamilyPlan, ModelPlan
from pipespec.demo.tokenizer import END_OF_TEXT_ID, save_tokenizer, train_tokenizer
from pipespec.errors import StageError, UsageError

# Shares of the time guard; the rest is for the target's opinions and for start-up.
TARGET_TIME_SHARE = 0.60
DRAFT_TIME_SHARE = 0.20
POLL_S = 0.5

_Messages = multiprocessing.queues.SimpleQueue[Progress | TrainingRecord]


def train_family(
    plan: FamilyPlan,
    files: Sequence[SourceFile],
    packages: Sequence[SourceFile],
    out: Path,
    work: Path,
    limit_s: float,
    num_threads: int,
    report: Report,
) -> list[TrainingRecord]:
    """Train everything that `out` is to hold and has not been trained in `work` yet.

    `files` are the train side of the standard library; a held-out module among them or `packages`
    is a bug, not a user's error. Returns what each model's training took, target first.
    """
    assert not any(is_held_out(file.module_name) for file in (*files, *packages))
    torch.set_num_threads(num_threads)
    _claim(work, plan, (*files, *packages))
    tokenizer = _tokenizer(plan, files, work)
    streams = _streams(plan, tokenizer, files, packages, work)
    require_length(streams, plan.long_length)
    target, record = _train_one(plan.target, plan, work, out, limit_s * TARGET_TIME_SHARE, report)
    teacher_shards(target.eval(), streams, plan, work / "teacher", report)
    limit_s *= DRAFT_TIME_SHARE
    return [record, *_train_drafts(plan, out, work, limit_s, num_threads, report)]


def save_records(records: Sequence[TrainingRecord], path: Path) -> None:
    """Write what the training took, with the loss on its way, as JSON."""
    content = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "models": [asdict(record) for record in records],
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def export(model: LlamaForCausalLM, tokenizer: Tokenizer, plan: FamilyPlan, folder: Path) -> None:
    """Write one model's folder, weights as bfloat16; it appears complete or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config = model.config.to_dict()
    model.config.__class__.from_dict(
        {**config, "dtype": "bfloat16", "architectures": ["LlamaForCausalLM"]}
    ).save_pretrained(partial)
    GenerationConfig(eos_token_id=END_OF_TEXT_ID, pad_token_id=END_OF_TEXT_ID).save_pretrained(
        partial
    )
    weights = {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embeddings
    }
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(tokenizer, partial, plan.max_positions)
    for file in partial.iterdir():
        file.chmod(0o644)  # safetensors writes files that only their owner may read
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _claim(work: Path, plan: FamilyPlan, files: Sequence[SourceFile]) -> None:
    """Tie a work folder to one plan and one corpus, so that no cache of another is used."""
    corpus = hashlib.blake2b(digest_size=16)
    for file in files:
        corpus.update(f"{file.module_name} {file.path.stat().st_size}\n".encode())
    claim = f"{plan!r}\ncorpus {corpus.hexdigest()}\n"
    path = work / "run.txt"
    if not path.exists():
        path.write_text(claim, encoding="utf-8")
    elif path.read_text(encoding="utf-8") != claim:
        raise UsageError(
            f"{work} holds a run with other settings or another standard library; choose an empty "
            "--work-dir or repeat the settings"
        )


def _tokenizer(plan: FamilyPlan, files: Sequence[SourceFile], work: Path) -> Tokenizer:
    path = _tokenizer_path(work)
    if not path.exists():
        problems = arithmetic_text(plan.num_problems // 10, plan.seed)
        texts = chain((file.text() for file in files), problems)
        tokenizer = train_tokenizer(texts, plan.vocab_size)
        partial = path.with_name(path.name + ".partial")
        tokenizer.save(str(partial))
        partial.replace(path)
    return Tokenizer.from_file(str(path))


def _streams(
    plan: FamilyPlan,
    tokenizer: Tokenizer,
    files: Sequence[SourceFile],
    packages: Sequence[SourceFile],
    work: Path,
) -> TokenStreams:
    folder = work / "tokens"
    return build_streams(tokenizer, files, packages, folder, plan.num_problems, plan.seed)


def _tokenizer_path(work: Path) -> Path:
    return work / "tokenizer.json"


def _train_one(
    model_plan: ModelPlan, plan: FamilyPlan, work: Path, out: Path, limit_s: float, report: Report
) -> tuple[LlamaForCausalLM, TrainingRecord]:
    tokenizer = Tokenizer.from_file(str(_tokenizer_path(work)))
    streams = _streams(plan, tokenizer, (), (), work)
    needs_target = any(phase.from_target for phase in model_plan.phases)
    shards = open_shards(plan, work / "teacher") if needs_target else None
    name = model_plan.shape.name
    learner = Learner(model_plan, plan, streams, shards, work / "checkpoints" / f"{name}.pt")

    def save(model: LlamaForCausalLM) -> None:
        export(model, tokenizer, plan, out / name)

    record = learner.run(limit_s, report, on_checkpoint=save)
    save(learner.model)
    return learner.model, record


def _train_drafts(
    plan: FamilyPlan, out: Path, work: Path, limit_s: float, num_threads: int, report: Report
) -> list[TrainingRecord]:
    share = num_threads // max(1, len(plan.drafts))
    if share == 0 or len(plan.drafts) == 1:
        limit_s /= len(plan.drafts)
        return [_train_one(draft, plan, work, out, limit_s, report)[1] for draft in plan.drafts]
    context = multiprocessing.get_context("spawn")
    messages: _Messages = context.SimpleQueue()
    processes = [
        context.Process(
            target=_draft_process,
            args=(draft, plan, work, out, limit_s, share, messages),
            name=draft.shape.name,
        )
        for draft in plan.drafts
    ]
    records: list[TrainingRecord] = []
    try:
        for process in processes:
            process.start()
        while len(records) < len(processes):
            # The children's state first: a message sent before a clean exit is then still read.
            ended = [process for process in processes if process.exitcode is not None]
            while not messages.empty():
                message = messages.get()
                if isinstance(message, TrainingRecord):
                    records.append(message)
                else:
                    report(message)
            failed = [process for process in ended if process.exitcode]
            if failed:
                raise StageError(f"training {failed[0].name} failed, see the traceback above")
            time.sleep(POLL_S)
    finally:
        for process in processes:
            if process.is_alive() and len(records) < len(processes):
                process.terminate()
        for process in processes:
            process.join(timeout=30)
    order = [draft.shape.name for draft in plan.drafts]
    return sorted(records, key=lambda record: order.index(record.name))


def _draft_process(
    draft: ModelPlan,
    plan: FamilyPlan,
    work: Path,
    out: Path,
    limit_s: float,
    num_threads: int,
    messages: _Messages,
) -> None:
    torch.set_num_threads(num_threads)
    try:
        _, record = _train_one(draft, plan, work, out, limit_s, messages.put)
    except KeyboardInterrupt:
        # Ctrl-C reaches the parent too, and the parent says so.
        raise SystemExit(130) from None
    messages.put(record)
