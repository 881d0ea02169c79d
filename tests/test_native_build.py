"""The native runner's library is made once, whole or not at all, or it is said why not."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
from processes import is_gone, wait_until

from pipespec.runners.native import BuildError, build
from pipespec.runners.native.build import load_library, user_cache

ROOT = Path(__file__).resolve().parents[1]


def make_compiler(folder: Path, compiles: str, name: str = "fake-c++") -> str:
    """A command that has a version and `compiles`, with what it shall write in $out."""
    script = folder / name
    script.write_text(
        f"""#!/bin/sh
[ "$1" = --version ] && echo fake 1.0 && exit
while [ $# -gt 0 ]; do [ "$1" = -o ] && out=$2; shift; done
echo ran >> {folder}/runs
{compiles}
"""
    )
    script.chmod(0o755)
    return str(script)


@pytest.fixture(scope="module")
def copying() -> str:
    """Copies the library that the real compiler makes, or has made."""
    return f'cp {load_library()._name} "$out"'


def num_runs(folder: Path) -> int:
    return len((folder / "runs").read_text().splitlines())


def error_line(compiler: str, cache: Path) -> str:
    with pytest.raises(BuildError) as caught:
        load_library(compiler, cache=cache)
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert "\n" not in message
    assert not list(cache.glob("*")) and not list(cache.glob(".native-*")), "something is left"
    return message


def test_a_library_is_made_once(tmp_path: Path, copying: str) -> None:
    compiler, cache = make_compiler(tmp_path, copying), tmp_path / "cache"
    for _ in range(3):
        load_library(compiler, cache=cache)
    assert num_runs(tmp_path) == 1
    assert [path.suffix for path in cache.iterdir()] == [".so"]


def test_another_processor_or_compiler_makes_another(tmp_path: Path, copying: str) -> None:
    compiler, cache = make_compiler(tmp_path, copying), tmp_path / "cache"
    load_library(compiler, cache=cache)
    load_library(compiler, "x86-64-v3", cache=cache)
    newer = make_compiler(tmp_path, copying, "newer-c++")
    Path(newer).write_text(Path(newer).read_text().replace("fake 1.0", "fake 2.0"))
    load_library(newer, cache=cache)
    assert num_runs(tmp_path) == len(list(cache.iterdir())) == 3


def test_processes_that_make_it_at_the_same_time_do_not_disturb_each_other(
    tmp_path: Path, copying: str
) -> None:
    slowly = f'head -c 1000 {load_library()._name} > "$out"; sleep 0.5; {copying}'
    compiler, cache = make_compiler(tmp_path, slowly), tmp_path / "cache"
    code = f"""
from pathlib import Path
from pipespec.runners.native.build import load_library
load_library({compiler!r}, cache=Path({str(cache)!r})).pipespec_create
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, cwd=ROOT)
        for _ in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert [path.suffix for path in cache.iterdir()] == [".so"]


def test_without_a_compiler_it_is_said_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match=r"^[^\n]*install one of c\+\+, g\+\+, clang\+\+$"):
        load_library(cache=tmp_path)
    assert "no-such-compiler" in error_line("no-such-compiler", tmp_path / "cache")


def test_a_compiler_that_fails_is_quoted_in_one_line(tmp_path: Path) -> None:
    fails = "echo 'In file included from x:'; echo 'step.cpp:1: error: no such thing' >&2; exit 1"
    line = error_line(make_compiler(tmp_path, fails), tmp_path / "cache")
    assert line.endswith("cannot compile the native runner: step.cpp:1: error: no such thing")


def test_a_compiler_that_fails_without_a_word_is_told(tmp_path: Path) -> None:
    line = error_line(make_compiler(tmp_path, "exit 3"), tmp_path / "cache")
    assert line.endswith("exit status 3")


def test_a_compiler_that_cannot_be_started_is_told(tmp_path: Path) -> None:
    script = tmp_path / "empty"
    script.write_bytes(b"\x7fELF")
    script.chmod(0o755)
    assert "cannot compile the native runner" in error_line(str(script), tmp_path / "cache")


def test_a_compiler_that_hangs_is_ended_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "TIMEOUT_S", 1.0)
    compiler = make_compiler(tmp_path, f"sleep 300 & echo $! > {tmp_path}/pid; wait")
    assert "longer than 1 s" in error_line(compiler, tmp_path / "cache")
    pid = int((tmp_path / "pid").read_text())
    wait_until(lambda: is_gone(pid), "it is left")


def test_a_library_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    compiler = make_compiler(tmp_path, 'echo nothing > "$out"')
    with pytest.raises(
        BuildError, match=rf"^{tmp_path}[^\n]*\.so cannot be loaded [^\n]*delete it"
    ):
        load_library(compiler, cache=tmp_path / "cache")


def test_without_a_cache_a_library_serves_this_process(
    tmp_path: Path, copying: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder cannot be made, because a file has its name."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    (tmp_path / "cache").write_text("a file")
    library = load_library(make_compiler(tmp_path, copying), cache=tmp_path / "cache" / "below")
    assert library.pipespec_create
    assert not list(temporary.iterdir())


def test_the_cache_is_where_users_look_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert user_cache() == Path("/somewhere/pipespec")
    for unset in ("", "not/absolute"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert user_cache() == Path(os.path.expanduser("~/.cache/pipespec"))


def test_a_user_without_a_home_has_no_cache_and_is_served(
    tmp_path: Path, copying: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container that runs under a number without a name."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    monkeypatch.chdir(tmp_path)
    compiler = make_compiler(tmp_path, copying)
    before = set(tmp_path.iterdir())
    assert user_cache() is None
    assert load_library(compiler).pipespec_create
    assert set(tmp_path.iterdir()) - before == {tmp_path / "runs"}


def test_its_sources_are_installed_with_the_package() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    patterns = setup["options.package_data"]["pipespec.runners.native"].split(", ")
    folder = Path(build.__file__).parent
    sources = [path.name for path in folder.iterdir() if path.suffix in (".cpp", ".h")]
    assert set(sources) == set(build._SOURCES)
    assert all(any(fnmatch(name, pattern) for pattern in patterns) for name in sources)
