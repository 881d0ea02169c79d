"""The report's page in a real browser: its script runs, and a reader can look at a sample."""

from __future__ import annotations

import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import BROWSER, SHARED_DATA
from reports import own_sample, write_both, write_run

from pipespec import report

pytestmark = pytest.mark.browser

TIMEOUT_S = 60


class Elements(HTMLParser):
    """The text and attributes of each element, by id."""

    def __init__(self, dom: str) -> None:
        super().__init__()
        self.dom = dom
        self.texts: dict[str, str] = {}
        self.attributes: dict[str, dict[str, str | None]] = {}
        self.classes: list[tuple[str, str]] = []
        self._open: list[tuple[str, str, str]] = []
        self.feed(dom)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        name = attributes.get("id") or ""
        if name:
            self.attributes[name] = attributes
            self.texts[name] = ""
        if tag not in ("meta", "br", "wbr", "input"):
            self._open.append((tag, name, attributes.get("class") or ""))

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        for _, name, _ in self._open:
            if name:
                self.texts[name] += data
        for _, _, kind in self._open:
            if "tok" in kind.split() and any(name == "text" for _, name, _ in self._open):
                self.classes.append((kind.split()[1], data))


def browse(page: Path, fragment: str, profile: Path, *flags: str) -> Elements:
    """The document after its scripts ran; they must not have complained."""
    assert BROWSER is not None
    ended = subprocess.run(
        [
            BROWSER, "--headless", "--disable-gpu", "--no-sandbox", "--enable-logging=stderr",
            "--disable-background-networking", f"--user-data-dir={profile}", *flags, "--dump-dom",
            f"{page.as_uri()}{fragment}",
        ],
        capture_output=True, text=True, timeout=TIMEOUT_S, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in ended.stderr, ended.stderr
    assert 'data-ready="yes"' in ended.stdout, "the script did not reach its end"
    return Elements(ended.stdout)


def make_page(folder: Path, source: Path, then: str = "") -> Path:
    """The report of `source`. then: a script that stands for the reader's hand."""
    page = folder / "page.html"
    assert report.main([str(source), "--output", str(page)]) == 0
    if then:
        text = page.read_text(encoding="utf-8")
        page.write_text(text.replace("</main>", f"<script>{then}</script></main>"), "utf-8")
    return page


def test_a_sample_is_chosen_by_address_and_shows_who_wrote_what(tmp_path: Path) -> None:
    source = tmp_path / "runs"
    source.mkdir()
    text = "\U0001f600a </script>&<b>"
    write_both(source, 3, text=text, token_lengths=[1, 1, 1, 9, 1, 3])
    found = browse(make_page(tmp_path, source), "#run=2&sample=2", tmp_path / "profile")
    assert found.texts["prompt"] == "prompt 2"
    assert found.texts["text"] == text
    assert found.classes == [
        ("undrafted", "\U0001f600"), ("accepted", "a "), ("correction", "</script>"),
        ("undrafted", "&"), ("accepted", "<b>"),
    ]  # fmt: skip
    assert "1 of 3: 2 of 4 accepted, then correction" in found.texts["step-facts"]
    assert "Approximate" not in found.texts["text-note"]
    assert "greedy" in found.texts["progress"] and "async-chain" in found.texts["progress"]
    assert "hidden" in found.attributes["utilization"]


def test_the_reader_goes_on_to_the_next_sample_and_another_verification(tmp_path: Path) -> None:
    source = tmp_path / "runs"
    source.mkdir()
    stats = [{"timestamp": t / 2, "gpu_utilizations": [t, None if t else 5]} for t in range(3)]
    write_both(source, 2, gpustats=stats)
    hand = (
        "document.getElementById('next').click();"
        "document.querySelector('[data-step=\"2\"]').click();"
        "document.title = location.hash"
    )
    page = make_page(tmp_path, source, hand)
    shot = tmp_path / "page.png"
    found = browse(page, "", tmp_path / "profile", f"--screenshot={shot}")
    assert found.texts["prompt"] == "prompt 1"
    assert found.texts["step-facts"].startswith("3 of 3: 1 of 3 accepted, then the end; forward")
    assert "GPU 1" in found.texts["utilization"]
    assert "<title>#run=2&amp;sample=1</title>" in found.dom
    assert shot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.shared_data
def test_the_originals_files_can_be_looked_at(tmp_path: Path) -> None:
    page = make_page(tmp_path, SHARED_DATA / "pipespec_results")
    found = browse(page, "#run=48&sample=3", tmp_path / "profile")
    assert found.attributes["utilization"].get("hidden") is None
    assert "Approximate" in found.texts["text-note"]
    assert found.texts["text"].startswith("assistant")
    kinds = {kind for kind, _ in found.classes}
    assert kinds == {"accepted", "either"}
    assert re.match(r"1 of \d+: \d+ accepted, then the target's own", found.texts["step-facts"])


def test_greedy_alone_and_a_page_without_samples_work(tmp_path: Path) -> None:
    source = tmp_path / "runs"
    source.mkdir()
    write_run(source, "greedy", [own_sample(0, "greedy")])
    found = browse(make_page(tmp_path, source), "#run=9&sample=9", tmp_path / "profile")
    assert "every token is the target's own" in found.texts["text-note"]
    page = tmp_path / "none.html"
    assert report.main([str(source), "--output", str(page), "--max-samples", "0"]) == 0
    assert "hidden" in browse(page, "", tmp_path / "profile").attributes["samples"]
