"""Simulated models: the next token as a pure function of the prefix.

Every stage sees the same uniform number for a prefix, so agreement is nested: where a weak draft
agrees with the target, a stronger one does too. A wrong token changes the prefix and with it
everything after it, as it does in a real draft.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipespec.hashing import extend, hash_tokens

_UNIT = float(1 << 53)


@dataclass(frozen=True, slots=True)
class Oracle:
    """A model that draws like the target with probability `agreement` (the target: 1)."""

    agreement: float
    vocab_size: int
    seed: int = 0

    def draw(self, prefix_hash: int) -> int:
        """The token after the prefix with this hash."""
        token = extend(prefix_hash, 0x7A11 + self.seed) % self.vocab_size
        if self.agreement >= 1.0:
            return token
        if (extend(prefix_hash, 0xA9EE + self.seed) >> 11) / _UNIT < self.agreement:
            return token
        offset = 1 + extend(prefix_hash, 0xD1FF + self.seed) % (self.vocab_size - 1)
        return (token + offset) % self.vocab_size

    def continuation(
        self, prompt: Sequence[int], max_new_tokens: int, eos: int | None
    ) -> list[int]:
        """What the model alone would write: the reference that every simulation must equal."""
        prefix, output = hash_tokens(prompt), list[int]()
        while len(output) < max_new_tokens:
            output.append(self.draw(prefix))
            prefix = extend(prefix, output[-1])
            if output[-1] == eos:
                break
        return output
