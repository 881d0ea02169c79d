"""Our own policies against each other: the original alone, with one of ours, with all, without one.

What each policy brings depends on the others, so it is looked at from both ends. Only names and
schedules are here; they race like everyone else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pipespec.config import Schedule

ORIGINAL: Final = "original"
ALL: Final = "all"
TREE: Final = 8  # candidates beside the main path
POLICIES: Final = ("wait", "confidence", "outcomes", "tree")
NOTES: Final = (
    "original: verifies whatever is there; + one policy more; all: all of them; - one policy less",
    "a tree is of prepared outcomes: original+tree has both, all-outcomes neither; the default is "
    "all-tree",
    "hit rate: of corrections; wasted: of drafted tokens; smallest draft first",
)


def schedules() -> dict[str, dict[str, Any]]:
    """The arguments of each `Schedule`, by name, in the order of the table."""
    found = {ORIGINAL: _schedule()}
    for policy in POLICIES:
        beneath = {"outcomes"} if policy == "tree" else set()
        found[f"{ORIGINAL}+{policy}"] = _schedule(policy, *beneath)
    found[ALL] = _schedule(*POLICIES)
    for policy in POLICIES:
        above = {"tree"} if policy == "outcomes" else set()
        found[f"{ALL}-{policy}"] = _schedule(*({*POLICIES} - {policy} - above))
    return found


def _schedule(*policies: str) -> dict[str, Any]:
    """Of the original with these policies."""
    waits: Mapping[str, Any] = {"policy": "pipespec", "lookahead": 0}
    if "wait" in policies:
        waits = {"policy": Schedule().policy}
    return {
        **waits,
        "confidence": "confidence" in policies,
        "outcomes": Schedule().outcomes if "outcomes" in policies else 0,
        "tree": TREE if "tree" in policies else 0,
    }
