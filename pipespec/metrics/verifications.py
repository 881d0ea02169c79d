"""What each verification by the target did with its candidates, from the metrics of a sample.

The original's files lack the candidates that were offered, so nothing here is known of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pipespec.metrics.origins import Origin, token_origins


class Verification(NamedTuple):
    """One that no verdict overtook, as in `origins`: candidates scored, of those accepted, tokens
    emitted."""

    offered: int
    accepted: int
    emitted: int


def target_verifications(metrics: Mapping[str, Any]) -> list[Verification]:
    """Those of a sample, in order; of greedy and where it was not recorded, none.

    All emit one token more than they accept, the bonus or correction token, but the one in which
    the text ended may have ended with an accepted one: `num_accepted` tells.
    """
    if not metrics.get("offered_tokens"):
        return []
    steps = zip(metrics["offered_tokens"][-1], metrics["accepted_tokens"][-1], strict=True)
    found = [Verification(offered, emitted - 1, emitted) for offered, emitted in steps if emitted]
    if found and metrics["num_accepted"][-1] > sum(item.accepted for item in found):
        found[-1] = found[-1]._replace(accepted=found[-1].emitted)
    return found


def acceptance_by_position(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """Over the samples of a run, for each position of a candidate in its verification: how many
    stood there, and how many of those were accepted, with all before them.

    It makes no sense of runs with `tree` above 0, whose candidates are no sequence.
    """
    found = [item for sample in metrics for item in target_verifications(sample)]
    longest = max((item.offered for item in found), default=0)
    return [
        (
            sum(item.offered > position for item in found),
            sum(item.accepted > position for item in found),
        )
        for position in range(longest)
    ]


def accepted_ids(result: Mapping[str, Any]) -> list[int]:
    """The ids in a sample's output that the target accepted from its draft; the others are its
    own. Nothing if ids and verifications do not belong together."""
    ids: Sequence[int] = result.get("output_ids", ())
    found = target_verifications(result["metrics"])
    if len(ids) != 1 + sum(item.emitted for item in found):
        return []
    origins = token_origins(len(ids), found)
    return [token_id for token_id, origin in zip(ids, origins) if origin is Origin.ACCEPTED]
