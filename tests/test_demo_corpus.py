"""The demo's corpus: which modules are held out, and the prompts made from them."""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path

import pytest

from pipespec.data.stdlib import MAX_PROMPT_CHARS, MIN_PROMPT_CHARS, StdlibPrompt, stdlib_prompts
from pipespec.demo import corpus
from pipespec.demo.corpus import (
    MAX_PACKAGE_FILE_BYTES,
    held_out_files,
    is_held_out,
    is_table_module,
    is_test_module,
    package_files,
    source_files,
    train_files,
)


@pytest.fixture(scope="module")
def prompts() -> list[StdlibPrompt]:
    """The prompts of the running interpreter, made once."""
    return stdlib_prompts()


def test_the_split_never_changes_because_the_shipped_models_were_trained_on_it() -> None:
    assert [name for name in ("ast", "glob", "platform", "turtle") if is_held_out(name)] == [
        "ast",
        "glob",
        "platform",
        "turtle",
    ]
    assert not any(is_held_out(name) for name in ("json", "textwrap", "os", "test.test_json"))


def test_one_module_in_ten_is_held_out_and_the_two_sides_are_disjoint() -> None:
    train, held_out = train_files(), held_out_files()
    assert not set(train) & set(held_out)
    assert sorted([*train, *held_out]) == source_files()
    assert 0.05 < len(held_out) / (len(train) + len(held_out)) < 0.15


def test_installed_packages_and_unusable_files_are_left_out(tmp_path: Path) -> None:
    for name in ("a.py", "pack/__init__.py", "pack/b.py", "site-packages/foreign.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n", encoding="utf-8")
    (tmp_path / "empty.py").write_text(" \n", encoding="utf-8")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    (tmp_path / "_sysconfigdata__linux.py").write_text("x = 1\n", encoding="utf-8")
    assert [file.module_name for file in source_files(tmp_path)] == ["a", "pack", "pack.b"]


def test_test_suites_and_tables_are_told_from_library_modules() -> None:
    assert is_test_module("test.test_json")
    assert is_test_module("unittest.test.support")
    assert not is_test_module("unittest.case")
    assert is_table_module("encodings.cp037")
    assert not is_table_module("codecs")


def test_prompts_are_the_same_every_time_and_none_comes_twice(
    prompts: list[StdlibPrompt],
) -> None:
    assert prompts == stdlib_prompts()
    assert len({prompt.text for prompt in prompts}) == len(prompts) >= 40


def test_every_prompt_comes_from_a_held_out_library_module(prompts: list[StdlibPrompt]) -> None:
    held_out = {file.module_name for file in held_out_files()}
    for prompt in prompts:
        parts = prompt.name.split(".")
        modules = {".".join(parts[:end]) for end in range(1, len(parts))} & held_out
        assert modules, prompt.name
        assert not any(is_test_module(module) for module in modules)


def test_every_prompt_becomes_a_function_once_it_has_a_body(prompts: list[StdlibPrompt]) -> None:
    for prompt in prompts:
        assert not prompt.text.endswith("\n")
        assert MIN_PROMPT_CHARS <= len(prompt.text) <= MAX_PROMPT_CHARS
        (function,) = ast.parse(textwrap.dedent(prompt.text)).body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        assert ast.get_docstring(function)


def test_the_first_prompts_are_functions_of_different_modules(prompts: list[StdlibPrompt]) -> None:
    first = prompts[:6]
    assert len({prompt.name.rpartition(".")[0] for prompt in first}) == len(first)
    assert all(prompt.text.startswith(("def ", "async def ")) for prompt in first)


def test_a_function_without_prose_or_body_gives_no_prompt(tmp_path: Path) -> None:
    name = next(f"module{n}" for n in range(1000) if is_held_out(f"module{n}"))
    prose = '    """Do it.\n\n    ' + "many words about it " * 8 + '\n    """\n'
    doctest = prose.replace("Do it.", ">>> doctest(1)")
    body = "    a += 1\n    b = a\n    return b\n"
    (tmp_path / f"{name}.py").write_text(
        f"def good(a):\n{prose}{body}"
        f"def bare(a):\n{prose}"
        f"def doctest(a):\n{doctest}{body}"
        f"def _private(a):\n{prose}{body}",
        encoding="utf-8",
    )
    assert [prompt.name for prompt in stdlib_prompts(tmp_path)] == [f"{name}.good"]


def test_packages_bring_their_code_once_and_no_tests_tables_or_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = [name for name in (f"m{n}" for n in range(40)) if not is_held_out(f"pack.{name}")]
    held_out = next(f"m{n}" for n in range(400) if is_held_out(f"pack.m{n}"))
    texts = {
        f"{train[0]}.py": "a = 1\n",
        f"{train[1]}.py": "a = 1\n",
        f"{train[2]}.py": "b = 2\n",
        f"{train[3]}.py": "c = 3\n" * MAX_PACKAGE_FILE_BYTES,
        f"{held_out}.py": "d = 4\n",
        "tests/test_a.py": "e = 5\n",
        "_vendor/other.py": "f = 6\n",
    }
    for name, text in texts.items():
        path = tmp_path / "pack" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "pack" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(corpus, "PACKAGES", ("pack", "not_installed_anywhere"))
    assert [file.text() for file in package_files()] == ["a = 1\n", "b = 2\n"]
