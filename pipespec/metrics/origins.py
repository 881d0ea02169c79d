"""Where each token of an output comes from, as the target saw it: drafted, or its own.

A verification is (offered, accepted, emitted), as `StageCounts` lists them: of `offered` candidates
the target took the first `accepted`, and its output grew by `emitted` tokens, those and, unless the
text ended before, one of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum

Verification = tuple[int, int, int]


class Origin(Enum):
    """What brought a token.

    ACCEPTED: a draft, and the target agreed. CORRECTION: the target, in place of a candidate that
    it rejected. BONUS: the target, after it had accepted all that was offered. UNDRAFTED: the
    target, with nothing to verify: the first token, and where no draft was in time.

    Where branches of a tree are verified beside the main path, some candidate is always rejected,
    so there every token of the target's own is a CORRECTION.
    """

    ACCEPTED = "accepted"
    CORRECTION = "correction"
    BONUS = "bonus"
    UNDRAFTED = "undrafted"


def verification_origins(offered: int, accepted: int, emitted: int) -> list[Origin]:
    """Of the tokens of one verification, in order; none if a verdict had overtaken it."""
    own = Origin.BONUS if accepted == offered else Origin.CORRECTION
    if offered == 0:
        own = Origin.UNDRAFTED
    return [Origin.ACCEPTED] * accepted + [own] * (emitted - accepted)


def token_origins(num_tokens: int, verifications: Iterable[Sequence[int]]) -> list[Origin]:
    """Of the last `num_tokens` tokens that these verifications, in order, led to. Tokens before
    theirs (the one that the prompt's forward draws) are UNDRAFTED."""
    found = [origin for item in verifications for origin in verification_origins(*item)]
    return ([Origin.UNDRAFTED] * num_tokens + found)[len(found) :]
