"""Models that draw what they drew when they were measured: token oracles from recorded texts.

Along the target's own text the draws are the recorded ones, best first, so a simulation replays the
very texts: the easy and the hard passages, and on which rank the right token stood where a draft
was wrong (what decides whether an outcome was prepared for). On any other prefix a draft agrees
with the next larger model as often as it did along the text; what it draws there decides nothing
but what is thrown away. Pure: equal in every run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from pipespec.emulation import TokenOracle
from pipespec.hashing import extend, hash_tokens

_UNIT: Final = float(1 << 53)
_AGREES: Final = 0x71A6  # one stream of hashes for each kind of chance
_OTHER: Final = 0x0D1F
_RANK: Final = 0x5EED

Ranked = tuple[int, ...]  # token ids, best first
Draws = Sequence[Sequence[Ranked]]  # what one model drew, at each token of each text


@dataclass(frozen=True, slots=True)
class Text:
    """What the target wrote after a prompt."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]

    def prefix_hashes(self) -> list[int]:
        """Of the prefix that each token of the output follows."""
        prefix = hash_tokens(self.prompt)
        hashes = []
        for token in self.tokens:
            hashes.append(prefix)
            prefix = extend(prefix, token)
        return hashes


@dataclass(frozen=True, slots=True)
class TraceOracle:
    """What a measured model draws after any prefix.

    recorded: its first choices by prefix hash. larger: the next larger model, which it follows
    elsewhere with probability `agreement`; None for the target, whose draws off its own text are
    never used. rank_shares: where it does not agree, how often its second, third, ... choice is
    the larger model's token. own: tells the models of a simulation apart.
    """

    recorded: Mapping[int, Ranked]
    vocab_size: int
    larger: TokenOracle | None = None
    agreement: float = 1.0
    rank_shares: Sequence[float] = ()
    own: int = 0
    _memory: dict[int, int] = field(default_factory=dict, repr=False, compare=False)

    def draw(self, prefix_hash: int) -> int:
        """See `TokenOracle`."""
        recorded = self.recorded.get(prefix_hash)
        if recorded is not None:
            return recorded[0]
        token = self._memory.get(prefix_hash)
        if token is None:
            token = self._memory[prefix_hash] = self._guess(prefix_hash)
        return token

    def ranked(self, prefix_hash: int, num_choices: int) -> Ranked:
        """See `TokenOracle`."""
        recorded = self.recorded.get(prefix_hash)
        if recorded is not None:
            return recorded[:num_choices]
        first = self.draw(prefix_hash)
        others = [self._other(prefix_hash, first, number) for number in range(1, num_choices)]
        if self.larger is not None and others:
            wanted, rank = self.larger.draw(prefix_hash), self._rank(prefix_hash)
            if wanted != first and rank is not None and rank < num_choices:
                others[rank - 1] = wanted
        return tuple(dict.fromkeys((first, *others)))

    def _guess(self, prefix_hash: int) -> int:
        if self.larger is None:
            return self._other(prefix_hash, -1, 0)
        wanted = self.larger.draw(prefix_hash)
        if self._uniform(prefix_hash, _AGREES) < self.agreement:
            return wanted
        return self._other(prefix_hash, wanted, 0)

    def _rank(self, prefix_hash: int) -> int | None:
        """Which of the choices, counted from 0, the larger model's token is; None: none of those
        that were recorded."""
        left = self._uniform(prefix_hash, _RANK)
        for rank, share in enumerate(self.rank_shares, 1):
            left -= share
            if left < 0.0:
                return rank
        return None

    def _other(self, prefix_hash: int, token: int, number: int) -> int:
        """Some token that is not `token`; another for each number, but for chance."""
        stream = _OTHER + self.own + (number << 20)
        offset = extend(prefix_hash, stream) % (self.vocab_size - 1)
        return (max(token, 0) + 1 + offset) % self.vocab_size

    def _uniform(self, prefix_hash: int, stream: int) -> float:
        return (extend(prefix_hash, stream + self.own) >> 11) / _UNIT


def recorded_draws(texts: Sequence[Text], draws: Draws) -> dict[int, Ranked]:
    """A model's draws by prefix hash. A text of which it could read only the first part has draws
    for that part."""
    found: dict[int, Ranked] = {}
    for text, ranked in zip(texts, draws, strict=True):
        found.update(zip(text.prefix_hashes(), ranked))
    return found


def target_draws(texts: Sequence[Text]) -> Draws:
    """The target's: what it wrote."""
    return [[(token,) for token in text.tokens] for text in texts]


def agreement(draft: Draws, larger: Draws) -> float:
    """How often two models drew the same along the texts; 1 if nothing was drawn."""
    pairs = _pairs(draft, larger)
    return sum(a[0] == b[0] for a, b in pairs) / len(pairs) if pairs else 1.0


def rank_shares(draft: Draws, larger: Draws) -> list[float]:
    """Where a draft did not agree: how often its second, third, ... choice was the larger model's
    token."""
    wrong = [(a, b[0]) for a, b in _pairs(draft, larger) if a[0] != b[0]]
    most = max((len(ranked) for ranked, _ in wrong), default=1)
    return [
        sum(len(ranked) > rank and ranked[rank] == token for ranked, token in wrong) / len(wrong)
        for rank in range(1, most)
    ]


def _pairs(one: Draws, other: Draws) -> list[tuple[Ranked, Ranked]]:
    return [pair for a, b in zip(one, other, strict=True) for pair in zip(a, b)]
