"""The target's own greedy text, and the loss that makes it less of a loop."""

from __future__ import annotations

import pytest
import torch
from tiny import one_thread  # noqa: F401
from transformers import LlamaForCausalLM

from pipespec.demo.learner import new_model
from pipespec.demo.own_text import continue_windows, repeating, unlikelihood_loss
from pipespec.demo.settings import FamilyPlan, ModelShape


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """Random weights, which loop at once."""
    return new_model(ModelShape("micro", 32, 2, 32, 16), FamilyPlan(vocab_size=50))


def test_a_continuation_is_what_the_model_chooses_token_by_token(model: LlamaForCausalLM) -> None:
    prompts = torch.randint(3, 50, (3, 5), generator=torch.Generator().manual_seed(0))
    texts = continue_windows(model, prompts, 12)
    assert texts.shape == (3, 12)
    assert torch.equal(texts[:, :5], prompts)
    writer = LlamaForCausalLM(model.config).to(torch.bfloat16)
    writer.load_state_dict(model.state_dict())
    for row in texts:
        for place in range(5, 12):
            with torch.no_grad():
                logits = writer(input_ids=row[None, :place], use_cache=False).logits[0, -1].float()
            # Cached and uncached forwards in bfloat16 may part at a near-tie.
            assert logits[row[place]] >= logits.max() - 0.01


def test_sampling_follows_its_generator_and_leaves_the_model_as_it_was(
    model: LlamaForCausalLM,
) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prompts = torch.randint(3, 50, (2, 4), generator=torch.Generator().manual_seed(1))
    first, again, other = (
        continue_windows(model, prompts, 20, 1.0, torch.Generator().manual_seed(seed))
        for seed in (5, 5, 6)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_repeats_are_marked_after_the_prompt_and_before_the_end_of_text() -> None:
    texts = torch.tensor(
        [
            [5, 6, 5, 6, 5, 7],  # 5 6 and 6 5 come again in the prompt and after it
            [5, 6, 7, 5, 6, 8],
            [5, 6, 0, 5, 6, 5],  # what follows the end of text is none of ours
        ]
    )
    marks = repeating(texts, prompt_length=2, ngram=2)
    assert marks.tolist() == [
        [False, False, False, True, True, False],
        [False, False, False, False, True, False],
        [False, False, False, False, False, False],
    ]


def test_the_loss_is_of_the_marked_tokens_and_counts_all() -> None:
    logits = torch.zeros(1, 4, 10)
    following = torch.tensor([[1, 2, 3, 4]])
    marks = torch.tensor([[False, True, True, False]])
    expected = -2 * torch.log(torch.tensor(0.9)) / 4
    assert unlikelihood_loss(logits, following, marks) == pytest.approx(expected.item())
    assert unlikelihood_loss(logits, following, torch.zeros_like(marks)) == 0.0


def test_the_loss_stays_finite_for_a_certain_token_and_pushes_it_down() -> None:
    logits = torch.zeros(1, 1, 10)
    logits[0, 0, 3] = 30.0
    logits.requires_grad_()
    loss = unlikelihood_loss(logits, torch.tensor([[3]]), torch.tensor([[True]]))
    assert loss.isfinite()
    likely = torch.zeros(1, 1, 10, requires_grad=True)
    unlikelihood_loss(likely, torch.tensor([[3]]), torch.tensor([[True]])).backward()  # type: ignore[no-untyped-call]
    assert likely.grad is not None
    assert likely.grad[0, 0, 3] > 0 > likely.grad[0, 0, 4]


def test_unlearning_makes_a_looping_model_repeat_less(model: LlamaForCausalLM) -> None:
    torch.manual_seed(0)
    prompts = torch.randint(3, 50, (8, 6), generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def share_repeated() -> float:
        return repeating(continue_windows(model, prompts, 40), 6, 4)[:, 6:].float().mean().item()

    before = share_repeated()
    for _ in range(30):
        texts = continue_windows(model, prompts, 40)
        marks = repeating(texts, 6, 4)
        logits = model(input_ids=texts[:, :-1], use_cache=False).logits
        loss = unlikelihood_loss(logits, texts[:, 1:], marks[:, 1:])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    assert before > 0.5 > share_repeated()
