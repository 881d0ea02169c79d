"""Each planted bug is found by the simulator, and this table says by which promise.

Equal text alone cannot test the protocol, because the target commits only its own draws. So each
mutant changes one line of the core, and the suite must notice within a few hundred seeds. If a
mutant's line is no longer in the source, the test fails instead of testing nothing.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from dataclasses import dataclass
from types import ModuleType

import pytest

from pipespec.simulate import Faults, engine, scenario
from pipespec.state import beside, burst, journal, links, request, stage

MAX_SEEDS = 400


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in `module`; `faults` is where it shows; `broken` the promises that may
    name it."""

    module: ModuleType
    old: str
    new: str
    faults: Faults
    broken: tuple[str, ...]


GROWTH = """\
            self._roll_back(first_new)
            for token in rest:
                self._push(token)
            self.sent = len(self.seq)
            is_hit = branch is not None
            if branch is not None:
                self._adopt(branch, len(rest))
            outgoing += self._send_up(first_new)
"""

MUTANTS = {
    "no parent check": Mutant(
        request,
        "return self.hashes[length] == prefix_hash",
        "return True",
        scenario.RELIABLE,
        ("a candidate was drafted on the prefix it follows",),
    ),
    "no growth verdict": Mutant(
        request,
        GROWTH,
        "            changed = first_new < len(self.seq)\n"
        + GROWTH.replace("_send_up(first_new)", "_send_up(first_new) if changed else []"),
        scenario.RELIABLE,
        ("no deadlock", "no verdict is out of order"),
    ),
    "sent + 1": Mutant(
        request,
        "            self.sent = len(self.seq)\n",
        "            self.sent = len(self.seq) + 1\n",
        scenario.RELIABLE,
        ("only own tokens are sent", "no deadlock"),
    ),
    "acked - 1": Mutant(
        request,
        "        self.acked = end\n",
        "        self.acked = end - 1\n",
        scenario.RELIABLE,
        ("no deadlock", "sent drafts stay within run-ahead"),
    ),
    "KV + 1": Mutant(
        request,
        "        self.kv_valid = first_new + num_accepted\n",
        "        self.kv_valid = min(step.end, first_new + num_accepted + 1)\n",
        scenario.RELIABLE,
        ("KV ids equal the prefix", "draws are used only on their own context", "KV holds what"),
    ),
    "rows not kept": Mutant(
        request,
        "        self.keep = tuple(verified.rows[: num_accepted - self.num_main_accepted])\n",
        "        self.keep = ()\n",
        scenario.RELIABLE,
        ("KV ids equal the prefix",),
    ),
    "a branch fed after the wrong row": Mutant(
        beside,
        "length + before - 1 if",
        "length + before - 2 if",
        scenario.RELIABLE,
        ("a branch is fed on the prefix it follows",),
    ),
    "a prepared token after the wrong one": Mutant(
        beside,
        "parent = branch.position - start - 1",
        "parent = max(-1, branch.position - start - 2)",
        scenario.RELIABLE,
        ("a draft says what was drawn",),
    ),
    "a branch that goes on beyond its end": Mutant(
        beside,
        "[min(num_rounds, left - 1) for left, _ in lefts]",
        "[num_rounds for _ in lefts]",
        scenario.RELIABLE,
        ("nothing is fed that nobody wants to go on from",),
    ),
    "a branch that goes on from another's draw": Mutant(
        burst,
        "beside, branches = draws[step.num_draws :],",
        "beside, branches = draws[-len(step.branches) - 1 :],",
        scenario.RELIABLE,
        ("branches go on from their own draws",),
    ),
    "a burst that forgets what it fed": Mutant(
        burst,
        "step = last._replace(start=first.start, ids=first.ids + fed, num_candidates=len(fed))",
        "step = last._replace(start=first.start, ids=first.ids + fed)",
        scenario.RELIABLE,
        ("draws are used only on their own context",),
    ),
    "rows of a burst not given back": Mutant(
        request,
        "        self.rows.free(self.burst.reserved)\n",
        "",
        scenario.RELIABLE,
        ("a row that nobody holds is free",),
    ),
    "KV not cut by a rollback": Mutant(
        request,
        "        self.kv_valid = min(self.kv_valid, length)\n",
        "",
        scenario.RELIABLE,
        ("KV ids equal the prefix", "draws are used only on their own context"),
    ),
    "a stale step kept": Mutant(
        request,
        "        if self.kv_valid < len(self.seq):\n",
        "        if self.kv_valid < step.base:\n            first_new = len(self.seq)\n"
        "            self._push(draws[0][0])\n            return self._send_up(first_new)\n"
        "        if False:\n",
        scenario.RELIABLE,
        ("draws are used only on their own context", "IndexError"),
    ),
    "no incarnation check": Mutant(
        links,
        "if frame.incarnation < self._known[link] or is_stale_verdict:",
        "if False:",
        scenario.EVERYTHING,
        ("sent drafts stay within run-ahead", "no deadlock"),
    ),
    "no fence": Mutant(
        journal,
        "if incarnation < self.incarnation:",
        "if False:",
        scenario.UNEQUAL,
        ("changed committed output", "skipped output"),
    ),
    "full verdicts do not resend": Mutant(
        request,
        "        elif verdict.full:\n            self.sent = end  #",
        "        elif False:\n            self.sent = end  #",
        scenario.CRASHES,
        ("sent drafts stay within run-ahead", "no deadlock"),
    ),
}


def mutated(mutant: Mutant) -> ModuleType:
    """The module with the bug in it, under a name of its own."""
    source = inspect.getsource(mutant.module)
    assert source.count(mutant.old) == 1, f"not exactly once in the source: {mutant.old!r}"
    spec = importlib.util.spec_from_loader(mutant.module.__name__ + "_mutant", loader=None)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    module.__dict__["__file__"] = mutant.module.__file__
    sys.modules[spec.name] = module  # dataclasses look their module up
    exec(compile(source.replace(mutant.old, mutant.new), spec.name, "exec"), module.__dict__)
    return module


def first_failure(faults: Faults) -> tuple[int, str] | None:
    """The first seed that notices, and what it says."""
    for seed in range(MAX_SEEDS):
        try:
            scenario.simulate_seed(seed, faults)
        except (AssertionError, IndexError) as error:
            return seed, f"{type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_bug_breaks_a_promise(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = MUTANTS[name]
    module = mutated(mutant)
    if mutant.module is request:
        monkeypatch.setattr(stage, "RequestState", module.RequestState)
    elif mutant.module is beside:
        monkeypatch.setattr(request, "place_feeds", module.place_feeds)
        monkeypatch.setattr(request, "make_draft", module.make_draft)
    elif mutant.module is burst:
        monkeypatch.setattr(request, "Burst", module.Burst)
    elif mutant.module is links:
        monkeypatch.setattr(stage, "Links", module.Links)
        monkeypatch.setattr(stage, "Arrival", module.Arrival)
    else:
        monkeypatch.setattr(engine, "Journal", module.Journal)
    failure = first_failure(mutant.faults)
    assert failure is not None, f"{name} went unnoticed for {MAX_SEEDS} seeds"
    seed, message = failure
    print(f"{name}: seed {seed}: {message}")
    assert any(promise in message for promise in mutant.broken), message
