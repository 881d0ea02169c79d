"""What a check found, as plain data: for the terminal, for JSON, and for the exit code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Mark(Enum):
    """How much a finding matters."""

    OK = "ok"
    WARNING = "warning"  # numbers measured here may mislead
    PROBLEM = "problem"  # something does not work


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. remedy: what to do about it, if there is something."""

    mark: Mark
    text: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Section:
    """The findings of one check. values: what was measured, as JSON values."""

    title: str
    findings: Sequence[Finding]
    values: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "findings": [
                {"mark": finding.mark.value, "text": finding.text, "remedy": finding.remedy}
                for finding in self.findings
            ],
            "values": self.values,
        }


def ok(text: str) -> Finding:
    return Finding(Mark.OK, text)


def warning(text: str, remedy: str = "") -> Finding:
    return Finding(Mark.WARNING, text, remedy)


def problem(text: str, remedy: str) -> Finding:
    return Finding(Mark.PROBLEM, text, remedy)


def count(sections: Sequence[Section], mark: Mark) -> int:
    """How many findings of all sections have the mark."""
    return sum(finding.mark is mark for section in sections for finding in section.findings)
