"""The demo's training, with models and a corpus small enough for seconds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from pipespec.checkpoint import shipped_models
from pipespec.demo import family, train
from pipespec.demo.batches import TokenStreams
from pipespec.demo.corpus import SourceFile, is_held_out, source_files
from pipespec.demo.distill import distillation_loss
from pipespec.demo.family import train_family
from pipespec.demo.functions import function_texts
from pipespec.demo.learner import Learner
from pipespec.demo.progress import Progress
from pipespec.demo.settings import (
    FUNCTIONS,
    FamilyPlan,
    LoopCure,
    ModelPlan,
    ModelShape,
    Phase,
    TeacherPlan,
)
from pipespec.demo.tokenizer import SPECIAL_TOKENS, train_tokenizer
from pipespec.errors import UsageError
from viz.training_curves import read_curves

FOREVER = float("inf")
ROOT = Path(__file__).resolve().parents[1]


def micro_plan() -> FamilyPlan:
    """Two models of a few thousand parameters that take a few steps in every kind of phase."""
    return FamilyPlan(
        target=ModelPlan(
            ModelShape("target", 32, 2, 32, 16),
            (
                Phase("text", 5, 16),
                Phase("long text", 2, 32, FUNCTIONS),
                Phase("own text", 1, 16, loop_cure=LoopCure(2, 4, 12), learning_rate_share=0.05),
            ),
            tokens_per_step=64,
        ),
        drafts=(
            ModelPlan(
                ModelShape("draft", 16, 1, 16, 16),
                (
                    Phase("text", 2, 16),
                    Phase("distillation", 2, 16, from_target=True),
                    Phase("long distillation", 1, 32, from_target=True),
                ),
                tokens_per_step=64,
            ),
        ),
        teacher=TeacherPlan(
            top=4,
            num_short_windows=8,
            num_long_windows=4,
            num_generated_windows=8,
            prompt_length=4,
            batch_size=4,
        ),
        vocab_size=300,
        max_positions=32,
        short_length=16,
        long_length=32,
        num_problems=50,
        warmup_steps=2,
        compile=False,
    )


def same_streams(tokens: npt.NDArray[np.uint16]) -> TokenStreams:
    """The same tokens under every name."""
    names = ("library", "other", "packages", "functions", "package_functions", "arithmetic")
    return TokenStreams(dict.fromkeys(names, tokens))


def ignore(progress: Progress) -> None:
    """A report that nobody reads."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[SourceFile]:
    """Train-side sources of both kinds, and no test of theirs needs the standard library."""
    folder = tmp_path_factory.mktemp("sources")
    names = [f"{kind}{n}" for kind in ("module", "test_module") for n in range(8)]
    for name in names:
        lines = [f"def {name}_{n}(a):\n    b = a + {n}\n    return b\n" for n in range(40)]
        (folder / f"{name}.py").write_text("\n".join(lines), encoding="utf-8")
    return [file for file in source_files(folder) if not is_held_out(file.module_name)]


@pytest.fixture(scope="module")
def trained(files: list[SourceFile], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A trained micro family."""
    num_threads = torch.get_num_threads()
    out = tmp_path_factory.mktemp("family")
    train_family(micro_plan(), files, files, out, _folder(out.parent / "work"), FOREVER, 1, ignore)
    yield out
    torch.set_num_threads(num_threads)


def test_a_trained_family_loads_as_any_other_model(trained: Path) -> None:
    for name in ("target", "draft"):
        model = AutoModelForCausalLM.from_pretrained(trained / name)
        tokenizer = AutoTokenizer.from_pretrained(trained / name)
        assert isinstance(model, LlamaForCausalLM)
        assert model.dtype == torch.bfloat16
        assert model.config.eos_token_id == tokenizer.eos_token_id == 0
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert model.config.max_position_embeddings == tokenizer.model_max_length == 32


def test_any_text_round_trips_through_the_tokenizer(trained: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained / "draft")
    for text in ("def f(x):\n\treturn  x\r\n", "naïve \U0001f600 \x00", "  leading, trailing  "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_come_first_and_are_never_split(trained: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained / "draft")
    assert tokenizer("".join(SPECIAL_TOKENS))["input_ids"] == [0, 1, 2]


def test_the_chat_template_renders_turns_and_opens_the_answer(trained: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained / "draft")
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=False, add_generation_prompt=True
    )
    assert rendered == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


def test_the_vocabulary_has_exactly_the_size_asked_for(files: list[SourceFile]) -> None:
    assert train_tokenizer((file.text() for file in files), 300).get_vocab_size() == 300


def test_held_out_modules_never_reach_the_tokenizer(
    files: list[SourceFile], tmp_path: Path
) -> None:
    name = next(f"module{n}" for n in range(1000) if is_held_out(f"module{n}"))
    path = tmp_path / f"{name}.py"
    path.write_text("x = 1\n", encoding="utf-8")
    with pytest.raises(AssertionError):
        train_family(
            micro_plan(),
            [*files, SourceFile(name, path)],
            (),
            tmp_path,
            tmp_path,
            FOREVER,
            1,
            ignore,
        )


class Killed(Exception):
    """Stands in for the end of the process."""


def test_a_killed_run_that_is_started_again_ends_with_the_same_weights(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 300, 4000).astype(np.uint16)
    streams = same_streams(tokens)
    plan = micro_plan()

    def learner(name: str) -> Learner:
        return Learner(plan.target, plan, streams, None, tmp_path / f"{name}.pt")

    def run(name: str, kill_after: int | None = None) -> dict[str, torch.Tensor]:
        """Checkpoint after every step; a kill comes one step after the last one that counts."""
        num_checkpoints = 0

        def on_checkpoint(model: LlamaForCausalLM) -> None:
            nonlocal num_checkpoints
            num_checkpoints += 1
            if num_checkpoints == kill_after:
                raise Killed

        trained = learner(name)
        trained.run(FOREVER, ignore, on_checkpoint, checkpoint_every_s=0.0)
        return dict(trained.model.state_dict())

    whole = run("whole")
    for kill_after in (3, 2):
        with pytest.raises(Killed):
            run("killed", kill_after)
    resumed = run("killed")
    assert learner("killed").record().num_steps == plan.target.num_steps
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_windows_come_from_the_streams_in_their_shares() -> None:
    streams = TokenStreams({"a": np.full(50, 7, np.uint16), "b": np.full(50, 9, np.uint16)})
    rows = streams.windows(np.random.default_rng(0), 400, 5, (("a", 3.0), ("b", 1.0)))
    assert rows.shape == (400, 5)
    assert 0.65 < (rows == 7).float().mean() < 0.85
    assert set(rows.unique().tolist()) == {7, 9}


def test_beginnings_are_where_documents_begin() -> None:
    tokens = np.array([5, 1, 1, 0, 6, 2, 2, 2, 0, 8, 3, 3, 0, 4], np.uint16)
    streams = TokenStreams({"a": tokens})
    rows = streams.beginnings(np.random.default_rng(0), 50, 2, (("a", 1.0),))
    assert {tuple(row) for row in rows.tolist()} == {(6, 2), (8, 3)}


def test_functions_become_documents_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "@cache\ndef outer(a):\n    b = a\n    return b\n\nclass C:\n    def method(self):\n"
        "        x = 1\n        return x\n    def tiny(self): pass\n",
        encoding="utf-8",
    )
    broken = tmp_path / "broken.py"
    broken.write_text("def (:\n", encoding="utf-8")
    files = [SourceFile("module", path), SourceFile("broken", broken), SourceFile("module", path)]
    assert list(function_texts(files)) == [
        "def outer(a):\n    b = a\n    return b\n",
        "    def method(self):\n        x = 1\n        return x\n",
    ]


def test_a_finished_family_is_not_trained_again(files: list[SourceFile], trained: Path) -> None:
    weights = (trained / "target" / "model.safetensors").read_bytes()
    records = train_family(
        micro_plan(), files, files, trained, trained.parent / "work", FOREVER, 1, ignore
    )
    assert [record.num_steps for record in records] == [8, 5]
    assert [len(record.curve) for record in records] == [8, 5]
    assert (trained / "target" / "model.safetensors").read_bytes() == weights


def test_a_work_folder_of_other_settings_is_refused(files: list[SourceFile], trained: Path) -> None:
    other = replace(micro_plan(), seed=1)
    with pytest.raises(UsageError, match="other settings"):
        train_family(other, files, files, trained, trained.parent / "work", FOREVER, 1, ignore)


def test_an_unreadable_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "target.pt").write_bytes(b"cut off")
    streams = same_streams(np.zeros(99, np.uint16))
    with pytest.raises(UsageError, match=r"target\.pt is not a readable checkpoint"):
        Learner(micro_plan().target, micro_plan(), streams, None, tmp_path / "target.pt")


def test_a_run_short_of_time_hurries_through_the_whole_schedule(tmp_path: Path) -> None:
    plan = micro_plan()
    streams = same_streams(np.zeros(99, np.uint16))
    record = Learner(plan.target, plan, streams, None, tmp_path / "a.pt").run(1e-6, ignore)
    assert record.num_steps == 1
    assert record.cut_short


def test_distillation_is_least_when_the_draft_is_the_target() -> None:
    logits = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(0))
    log_probs, ids = logits.log_softmax(-1).topk(4, dim=-1)
    same = distillation_loss(logits, ids, log_probs)
    assert same < distillation_loss(torch.zeros_like(logits), ids, log_probs)
    assert same < distillation_loss(1.5 * logits, ids, log_probs)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--out"),
        (["--out", "x", "--minutes", "0"], "--minutes"),
        (["--out", "x", "--threads", "0"], "--threads"),
        (["--out", "x", "--threads", "99999999999"], "--threads"),
        (["--out", "x", "--seed", "99999999999999999999"], "--seed"),
        (["--out", "/proc/x"], "--out: cannot write to /proc/x"),
        (["--out", ".", "--work-dir", "/proc/x"], "--work-dir: cannot write to /proc/x"),
        (["--out", "x", "--seed", "-1"], "--seed"),
        (["--out", __file__], "--out"),
        (["--out", "x", "--work_dir", __file__], "--work-dir"),
        (["--out", "x", "--minutes", "soon"], "--minutes"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str],
    named: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line
    assert not list(tmp_path.iterdir())


def test_the_command_says_what_each_model_took(
    files: list[SourceFile],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(train, "train_files", lambda: files)
    monkeypatch.setattr(train, "package_files", lambda: files)
    monkeypatch.setattr(family, "export", lambda *arguments: None)
    assert train.main(["--out", str(tmp_path), "--threads", "1"], micro_plan()) == 0
    assert "draft: 5 steps, 320 tokens" in capsys.readouterr().err
    target, draft = read_curves(tmp_path / "training.json")
    assert (target.name, draft.name) == ("target", "draft")
    assert draft.tokens == pytest.approx([64e-6 * step for step in range(1, 6)])
    assert all(0.0 < loss < 10.0 for loss in target.losses + draft.losses)


def test_the_planned_family_fits_the_package() -> None:
    from pipespec.demo.learner import new_model

    plan = FamilyPlan()
    sizes = [new_model(model.shape, plan).num_parameters() for model in plan.models]
    assert sizes == sorted(sizes)
    tokenizers = 3 * 110_000
    assert 2 * sum(sizes) + tokenizers < 30_000_000  # bytes in bfloat16


def test_progress_in_a_log_file_is_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from pipespec.demo.progress import ProgressDisplay

    with ProgressDisplay(Console(stderr=True, soft_wrap=True)) as display:
        for done in range(4):
            display.show(Progress("target", done, 3))
    lines = capsys.readouterr().err.splitlines()
    assert [line.strip().partition(" s  ")[2] for line in lines] == ["target: 0/3", "target: 3/3"]


def test_the_shipped_models_are_those_of_the_plan() -> None:
    folders = {folder.name: folder for folder in shipped_models().values()}
    plan = FamilyPlan()
    assert list(folders) == sorted(model.shape.name for model in plan.models)
    tokenizers = {(folder / "tokenizer.json").read_bytes() for folder in folders.values()}
    assert len(tokenizers) == 1
    for shape in (model.shape for model in plan.models):
        config = json.loads((folders[shape.name] / "config.json").read_text("utf-8"))
        assert config["hidden_size"] == shape.hidden_size
        assert config["num_hidden_layers"] == shape.num_layers
        assert config["intermediate_size"] == shape.intermediate_size
        assert config["vocab_size"] == plan.vocab_size
        assert config["max_position_embeddings"] == plan.max_positions


def test_the_record_of_the_shipped_models_training_is_theirs() -> None:
    curves = read_curves(ROOT / "pipespec" / "demo" / "training.json")
    plans = {model.shape.name: model for model in FamilyPlan().models}
    assert sorted(curve.name for curve in curves) == sorted(plans)
    for curve in curves:
        plan = plans[curve.name]
        assert curve.tokens[-1] * 1e6 <= plan.num_steps * plan.tokens_per_step
        assert curve.losses[-1] < curve.losses[0]


def _folder(path: Path) -> Path:
    path.mkdir()
    return path
