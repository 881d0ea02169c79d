"""A 64-bit rolling hash over token ids: the identity of a prefix.

`extend(extend(ROOT, a), b)` names the prefix `[a, b]`. Two stages whose hashes agree at a position
hold the same tokens before it, up to a collision chance of 2**-64 a comparison, so a draft can say
which prefix it follows in eight bytes. A collision costs a wasted verification, never a wrong
token: the target commits only its own draws.

Not cryptographic. Equal on every machine: plain integers, no `hash()`.
"""

from __future__ import annotations

from collections.abc import Iterable

MASK64 = (1 << 64) - 1
ROOT = 0x9E3779B97F4A7C15


def extend(prefix_hash: int, token: int) -> int:
    """Hash of the prefix one token longer (the multiply-xorshift finalizer of SplitMix64)."""
    x = (prefix_hash * 0x9E3779B97F4A7C15 + (token + 1) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def hash_tokens(tokens: Iterable[int], prefix_hash: int = ROOT) -> int:
    """Hash of `prefix_hash`'s prefix followed by `tokens`."""
    for token in tokens:
        prefix_hash = extend(prefix_hash, token)
    return prefix_hash
