"""The generated arithmetic: true answers, splits that cannot meet, the same problems everywhere."""

from __future__ import annotations

import itertools
import re
import string

import pytest

from pipespec.data import arithmetic, load_dataset
from pipespec.data.arithmetic import (
    NAMES,
    TEMPLATES,
    THINGS,
    Problem,
    Template,
    arithmetic_problems,
    arithmetic_text,
    is_correct,
)

WORDS = re.compile(r"\b(" + "|".join((*NAMES, *THINGS)) + r")\b")


@pytest.fixture(scope="module")
def train() -> tuple[Problem, ...]:
    return arithmetic_problems("train", 3000, seed=0)


@pytest.fixture(scope="module")
def held_out() -> tuple[Problem, ...]:
    return arithmetic_problems("held-out", 1000, seed=0)


def without_words(problem: Problem) -> str:
    """What a problem computes: the answer names its template and numbers, whatever the wording."""
    return WORDS.sub("_", problem.answer)


# -- problems ---------------------------------------------------------------------------------


def test_every_step_is_true_and_the_last_one_is_the_result(train: tuple[Problem, ...]) -> None:
    for problem in train:
        *lines, last = problem.answer.splitlines()
        steps = [re.search(r"(\d+ [-+*] \d+) = (\d+)", line) for line in lines]
        assert all(step and eval(step[1]) == int(step[2]) for step in steps), problem
        final = steps[-1]
        assert final is not None
        assert last == f"#### {final[2]}" == f"#### {problem.result}"


def test_a_step_computes_with_numbers_of_the_question_or_of_a_step_before(
    train: tuple[Problem, ...],
) -> None:
    for problem in train:
        known = set(re.findall(r"\d+", problem.question))
        for line in problem.answer.splitlines()[:-1]:
            step = re.search(r"(\d+) [-+*] (\d+) = (\d+)", line)
            assert step is not None
            assert {step[1], step[2]} <= known, problem
            known.add(step[3])


def test_problems_take_one_to_four_steps_with_numbers_a_tiny_model_can_learn(
    train: tuple[Problem, ...],
) -> None:
    assert {problem.answer.count("\n") for problem in train} == {1, 2, 3, 4}
    numbers = {int(n) for problem in train for n in re.findall(r"\d+", problem.text)}
    assert min(numbers) >= 2
    assert max(numbers) <= 199


def test_an_answer_speaks_only_of_words_in_its_question(train: tuple[Problem, ...]) -> None:
    for problem in train:
        assert set(WORDS.findall(problem.answer)) <= set(WORDS.findall(problem.question)), problem


def test_the_training_text_is_whole_problems(train: tuple[Problem, ...]) -> None:
    texts = list(arithmetic_text(300, seed=0))
    assert len(texts) == 300
    assert set(texts) <= {problem.text for problem in train}
    for text in texts:
        assert re.fullmatch(r"Question: .+\nAnswer: (.+\n)+#### \d+\n", text)


def test_a_text_is_its_prompt_and_its_answer() -> None:
    problem = Problem("What is 2 + 3?", "It is 2 + 3 = 5.\n#### 5", 5)
    assert problem.prompt == "Question: What is 2 + 3?\nAnswer:"
    assert problem.text == "Question: What is 2 + 3?\nAnswer: It is 2 + 3 = 5.\n#### 5\n"


# -- which problems ---------------------------------------------------------------------------


def test_nothing_held_out_is_in_training_in_other_words(
    train: tuple[Problem, ...], held_out: tuple[Problem, ...]
) -> None:
    for seed in (0, 1):
        seen = {without_words(problem) for problem in arithmetic_problems("train", 3000, seed)}
        assert seen.isdisjoint(map(without_words, held_out))
    assert {without_words(problem) for problem in train} & {
        without_words(problem) for problem in arithmetic_problems("train", 3000, seed=1)
    }, "the same comparison must find what two train seeds have in common"


def test_the_same_seed_gives_the_same_problems_everywhere() -> None:
    problems = arithmetic_problems("held-out", 20, seed=0)
    assert problems == arithmetic_problems("held-out", 30, seed=0)[:20]
    assert problems != arithmetic_problems("held-out", 20, seed=1)
    assert problems[0].text == (
        "Question: A bag costs 9 dollars. Finn takes the bag and 6 balls at 8 dollars each. What "
        "does Finn pay in dollars?\nAnswer: The balls cost 6 * 8 = 48 dollars.\n"
        "With the bag that is 48 + 9 = 57 dollars.\n#### 57\n"
    )


def test_no_question_comes_twice(train: tuple[Problem, ...], held_out: tuple[Problem, ...]) -> None:
    assert len({problem.question for problem in train}) == 3000
    assert len({problem.question for problem in held_out}) == 1000


def test_there_are_as_many_questions_as_the_module_says() -> None:
    combinations = {template.name: num_combinations(template) for template in TEMPLATES}
    questions = sum(
        combinations[template.name] * sum(map(num_wordings, template.wordings))
        for template in TEMPLATES
    )
    said = " ".join((arithmetic.__doc__ or "").split())
    assert f"{questions:,} distinct questions" in said
    assert f"{sum(combinations.values()):,} combinations" in said


def num_combinations(template: Template) -> int:
    return sum(template.values(numbers) is not None for numbers in product_of(template))


def product_of(template: Template) -> itertools.product[tuple[int, ...]]:
    return itertools.product(*template.numbers)


def num_wordings(wording: str) -> int:
    """How many questions one wording makes of one combination of numbers."""
    fields = {field for _, field, _, _ in string.Formatter().parse(wording)}
    sizes = {"name": len(NAMES), "other": len(NAMES) - 1, "things": len(THINGS)}
    count = 1
    for word, size in sizes.items():
        count *= size if word in fields else 1
    return count


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)
def test_every_wording_tells_every_number(template: Template) -> None:
    for wording in template.wordings:
        fields = {field for _, field, _, _ in string.Formatter().parse(wording)}
        assert set("abcde"[: len(template.numbers)]) <= fields


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)
def test_both_splits_have_problems_of_every_template(template: Template) -> None:
    sides = {template.is_held_out(numbers) for numbers in product_of(template)}
    assert sides == {True, False}


# -- the checker ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "correct"),
    [
        (" 3 * 4 = 12.\n#### 12\n", True),
        ("####12", True),
        ("#### $12.", True),
        ("#### 12\nQuestion: another\n#### 13", True),
        ("#### 13\n#### 12", False),
        ("####\n12", False),
        ("#### 12.5", False),
        ("#### 112", False),
        ("#### -12", False),
        ("#### twelve", False),
        ("12", False),
        ("", False),
    ],
)
def test_the_first_final_answer_decides(text: str, correct: bool) -> None:
    assert is_correct(Problem("3 * 4?", "3 * 4 = 12.\n#### 12", 12), text) is correct


def test_a_thousands_comma_is_read() -> None:
    assert is_correct(Problem("?", "#### 1200", 1200), "#### 1,200")


def test_every_problems_own_answer_is_correct(held_out: tuple[Problem, ...]) -> None:
    assert all(is_correct(problem, problem.answer) for problem in held_out)


# -- the data set -----------------------------------------------------------------------------


def test_the_data_set_asks_held_out_questions(held_out: tuple[Problem, ...]) -> None:
    data = load_dataset("arithmetic")
    assert [sample.text for sample in data.samples] == [problem.prompt for problem in held_out[:6]]
    assert len(load_dataset("arithmetic", 2000).samples) == 1000


def test_chat_models_are_asked_in_a_conversation(held_out: tuple[Problem, ...]) -> None:
    for sample, problem in zip(load_dataset("arithmetic-chat").samples, held_out):
        assert sample.messages is not None
        (turn,) = sample.messages
        assert turn.role == "user"
        assert turn.content.startswith(problem.question + "\n")
