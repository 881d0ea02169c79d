"""When two tokenizers are the same, as far as stages that exchange ids are concerned.

Stages agree if every id stands for the same token and tokens are put together alike: the tokens by
id (added tokens included) and the merges, or scores for a unigram model. All else may differ
between repositories of one family and does not matter to ids on the wire, so it is left out:

- chat templates, which tell Llama 3.1 and 3.2 apart, and which token begins, ends or pads a text;
- flags of added tokens (special, normalized, lstrip, ...) and whether such a token is listed among
  the vocabulary, the added tokens or both: conversion scripts disagree on them;
- normalizers, pre-tokenizers and decoders: scripts write the same rule in different forms, and the
  prompt is encoded, the output decoded, with the target's alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from pipespec.errors import ConfigError

if TYPE_CHECKING:
    from pipespec.tokenizer.protocol import TextTokenizer


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """tokens: id -> token. added: the ids among them that were added to the model's own. merges:
    pairs in order of rank. scores: of a unigram model, by id. kind: "BPE", "Unigram", ..."""

    kind: str
    tokens: Mapping[int, str]
    added: frozenset[int]
    merges: tuple[tuple[str, str], ...] = ()
    scores: tuple[float, ...] = ()

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Vocabulary:
        """From the contents of a tokenizer.json."""
        model = values["model"]
        listed = model.get("vocab", {})
        scores: tuple[float, ...] = ()
        if isinstance(listed, list):  # unigram: [piece, score], the index is the id
            tokens = {index: piece for index, (piece, _) in enumerate(listed)}
            scores = tuple(score for _, score in listed)
        else:
            tokens = {index: token for token, index in listed.items()}
        added = {entry["id"]: entry["content"] for entry in values.get("added_tokens") or ()}
        return cls(
            kind=str(model.get("type", "unknown")),
            tokens={**tokens, **added},
            added=frozenset(added),
            merges=tuple(_pair(merge) for merge in model.get("merges") or ()),
            scores=scores,
        )

    @property
    def num_ids(self) -> int:
        """The largest id plus one."""
        return max(self.tokens, default=-1) + 1

    @property
    def digest(self) -> str:
        """64 hexadecimal digits over everything but `added`."""
        digest = hashlib.sha256(self.kind.encode())
        for index in sorted(self.tokens):
            digest.update(f"\0{index}\0{self.tokens[index]}".encode("utf-8", "surrogatepass"))
        for left, right in self.merges:
            digest.update(f"\1{left}\0{right}".encode("utf-8", "surrogatepass"))
        for score in self.scores:
            digest.update(f"\2{score!r}".encode())
        return digest.hexdigest()


def _pair(merge: Any) -> tuple[str, str]:
    """Files hold either ["a", "b"] or, the older ones, "a b"."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def first_difference(one: Vocabulary, other: Vocabulary) -> str:
    """In words, the first way in which `one` and `other` differ; empty if they are the same."""
    if one.kind != other.kind:
        return f"one is {one.kind}, the other {other.kind}"
    sizes = f"{one.num_ids} and {other.num_ids} ids; " if one.num_ids != other.num_ids else ""
    for index in sorted({*one.tokens, *other.tokens}):
        mine, theirs = one.tokens.get(index), other.tokens.get(index)
        if mine != theirs:
            kind = "added token" if index in one.added | other.added else "token"
            return f"{sizes}{kind} {index} is {_shown(mine)} and {_shown(theirs)}"
    for rank, (left, right) in enumerate(zip_longest(one.merges, other.merges)):
        if left != right:
            return f"merge {rank} is {_shown(left)} and {_shown(right)}"
    for index, (score, another) in enumerate(zip_longest(one.scores, other.scores)):
        if score != another:
            return f"the score of token {index} is {score} and {another}"
    return ""


def _shown(value: str | tuple[str, str] | None) -> str:
    if value is None:
        return "absent"
    return repr(value if isinstance(value, str) else " ".join(value))


def check_same_tokenizer(tokenizers: Sequence[tuple[str, TextTokenizer]]) -> None:
    """Checks that all models, each given by name and tokenizer, agree on what ids mean.

    Raises:
        ConfigError: naming two models and the first difference between their tokenizers.
    """
    for name, tokenizer in tokenizers[:-1]:
        target_name, target = tokenizers[-1]
        if tokenizer.digest == target.digest:
            continue
        difference = first_difference(tokenizer.vocabulary(), target.vocabulary())
        assert difference, "vocabularies without a difference have the same digest"
        raise ConfigError(
            f"{name} and {target_name} have different tokenizers ({difference}, respectively); "
            "models of one hierarchy must share a vocabulary, so choose a draft of the same family"
        )
