"""The tokens of emulated models, each a pure function of (seed, hash of the prefix it follows).

*Wrong tokens derail.* A token chosen on another prefix is another token, so what follows a wrong
one is wrong, as with a real draft; position alone decides nothing.

*Nested agreement.* Every stage compares the same uniform number of a prefix with its own agreement:
where a worse draft is right, a better one is right too.

*Stretches.* Text has easy and hard passages, in which all drafts agree more or less often. Whether
a prefix lies in a hard one is a function of its hash, true for the share of hashes that the mean
lengths imply. Along a random text it would change from token to token; so whatever writes a token,
right or wrong, picks one such that the prefix it makes is of the kind that comes next: with
probability 1 / mean length the other one, else the same. Difficulty thus persists along every
branch, and yet needs no memory and no position.

*Ranks.* Where the target's token is not a draft's first choice it is its 2nd, 3rd, ... choice:
P(not among the first n) = n ** -rank_exponent. That is the miss law of SSD (arXiv 2603.03251); the
demo family, measured, has 0.86: among the first 2, 3, 4, 8 choices in 45, 61, 70, 83 % of cases.
With `second_share` it is the 2nd so often, and below that the law's shares keep their proportion.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final, Protocol

from pipespec.hashing import extend, hash_tokens

_UNIT: Final = float(1 << 53)
_TARGET: Final = 0x7A11  # which token, which uniform number: one stream of hashes each
_AGREES: Final = 0xA9EE
_WRONG: Final = 0xD1FF
_RANK: Final = 0x4A2C
_IS_HARD: Final = 0x51DE
_NEXT_IS_HARD: Final = 0x57A7
_STRIDE: Final = 0x9E3779B97F4A7C15  # between the numbers of one stream
_TRIES: Final = 256  # to find a token that goes on as wanted; a hard share of 5 % takes 20

DEMO_RANK_EXPONENT: Final = 0.86


@dataclass(frozen=True, slots=True)
class Stretches:
    """Mean lengths, in tokens, of easy and hard stretches; 1 or more."""

    easy: float
    hard: float

    @property
    def hard_share(self) -> float:
        """The part of all tokens that lies in hard stretches."""
        return self.hard / (self.easy + self.hard)


class TokenOracle(Protocol):
    """What a model would write after any prefix, named by its hash: all that a simulation needs to
    know of a model's tokens."""

    def draw(self, prefix_hash: int) -> int:
        """The model's token after the prefix."""
        ...

    def ranked(self, prefix_hash: int, num_choices: int) -> Sequence[int]:
        """Its first choices there, best first and distinct, as many as are known; the first is
        `draw`'s."""
        ...


@dataclass(frozen=True, slots=True)
class Oracle:
    """What one model would write after any prefix.

    agreement: how often its choice is the target's (the target: 1). hard_agreement: the same in
    hard stretches, `agreement` then being of easy ones. stretches, seed, vocab_size, eos: equal in
    all stages. own: tells apart the wrong tokens of drafts. eos: an id that is drawn only as the
    token at position `eos_after`, and never if that is None.
    """

    agreement: float
    vocab_size: int
    seed: int = 0
    hard_agreement: float | None = None
    stretches: Stretches | None = None
    rank_exponent: float = DEMO_RANK_EXPONENT
    second_share: float | None = None
    own: int = 0
    eos: int | None = None
    eos_after: int | None = None

    def draw(self, prefix_hash: int, position: int | None = None) -> int:
        """The model's token after the prefix with this hash; `position` is the token's own."""
        if self.agrees(prefix_hash):
            return self.target(prefix_hash, position)
        return next(self._others(prefix_hash, position))

    def target(self, prefix_hash: int, position: int | None = None) -> int:
        """The target's token there."""
        if position is not None and position == self.eos_after:
            assert self.eos is not None
            return self.eos
        return self._id(self._target_index(prefix_hash))

    def agrees(self, prefix_hash: int) -> bool:
        """Whether the model's first choice is the target's token."""
        agreement = self.agreement
        if self.hard_agreement is not None and self.is_hard(prefix_hash):
            agreement = self.hard_agreement
        return agreement >= 1.0 or self._uniform(prefix_hash, _AGREES) < agreement

    def is_hard(self, prefix_hash: int) -> bool:
        """Whether the token after this prefix lies in a hard stretch."""
        if self.stretches is None:
            return False
        return self._uniform(prefix_hash, _IS_HARD) < self.stretches.hard_share

    def rank(self, prefix_hash: int) -> int | None:
        """The target's token is the model's first choice (1), its second (2), ...; None: none that
        matters."""
        if self.agrees(prefix_hash):
            return 1
        rest = 1.0 - self._uniform(prefix_hash, _RANK)
        if self.second_share is not None:
            if rest > 1.0 - self.second_share:
                return 2
            rest *= 2.0**-self.rank_exponent / (1.0 - self.second_share)
        if self.rank_exponent <= 0.0:
            return None
        rank = 1.0 + rest ** (-1.0 / self.rank_exponent)
        return int(rank) if rank <= self.vocab_size else None

    def ranked(self, prefix_hash: int, num_choices: int, position: int | None = None) -> list[int]:
        """The model's first choices, best first and distinct; the first is `draw`'s."""
        rank = self.rank(prefix_hash)
        choices = list(islice(self._others(prefix_hash, position), num_choices))
        if rank is not None and rank <= num_choices:
            choices.insert(rank - 1, self.target(prefix_hash, position))
        return choices[:num_choices]

    def continuation(
        self, prompt: Sequence[int], max_new_tokens: int, eos: int | None
    ) -> list[int]:
        """What the model alone would write: the reference that every simulation must equal."""
        prefix, output = hash_tokens(prompt), list[int]()
        while len(output) < max_new_tokens:
            output.append(self.draw(prefix, len(prompt) + len(output)))
            prefix = extend(prefix, output[-1])
            if output[-1] == eos:
                break
        return output

    # -- parts ------------------------------------------------------------------------------

    @property
    def _num_ordinary(self) -> int:
        return self.vocab_size - (self.eos is not None)

    def _id(self, index: int) -> int:
        """The index-th id other than the end of text."""
        return index + (self.eos is not None and index >= self.eos)

    def _uniform(self, prefix_hash: int, stream: int) -> float:
        return (extend(prefix_hash, stream + self.seed) >> 11) / _UNIT

    def _target_index(self, prefix_hash: int) -> int:
        index = extend(prefix_hash, _TARGET + self.seed) % self._num_ordinary
        if self.stretches is None:
            return index
        wanted = self._next_is_hard(prefix_hash)
        for attempt in range(1, _TRIES):
            if self.is_hard(extend(prefix_hash, self._id(index))) == wanted:
                break
            stream = _TARGET + self.seed + attempt * _STRIDE
            index = extend(prefix_hash, stream) % self._num_ordinary
        return index

    def _next_is_hard(self, prefix_hash: int) -> bool:
        assert self.stretches is not None
        uniform = self._uniform(prefix_hash, _NEXT_IS_HARD)
        if self.is_hard(prefix_hash):
            return uniform * self.stretches.hard >= 1.0
        return uniform * self.stretches.easy < 1.0

    def _others(self, prefix_hash: int, position: int | None) -> Iterator[int]:
        """All tokens but the target's, in the model's order: first those that keep to the stretch,
        as far as some tries find them."""
        count, index = self._num_ordinary, self._target_index(prefix_hash)
        is_end = position is not None and position == self.eos_after
        seen = set() if is_end else {index}
        wanted = self.stretches and self._next_is_hard(prefix_hash)
        for attempt in range(_TRIES):
            if len(seen) == count:
                return  # of a small vocabulary, all
            stream = _WRONG + self.seed + self.own + attempt * _STRIDE
            other = (index + 1 + extend(prefix_hash, stream) % (count - 1)) % count
            token = self._id(other)
            if other not in seen and (
                self.stretches is None or self.is_hard(extend(prefix_hash, token)) == wanted
            ):
                seen.add(other)
                yield token
        for offset in range(count):
            other = (index + offset) % count
            if other not in seen:
                yield self._id(other)
