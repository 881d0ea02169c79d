"""How near the calls were where a contestant's text left greedy's. Loads the target once more."""

from __future__ import annotations

from collections.abc import Sequence

from pipespec.commands.equality import Divergence, first_divergence, with_margins
from pipespec.commands.inputs import Prompt
from pipespec.comparison.measures import table_rows
from pipespec.comparison.record import Record
from pipespec.config import SamplingParams
from pipespec.decoding import Hierarchy


def difference_lines(
    record: Record,
    prompts: Sequence[Prompt],
    hierarchy: Hierarchy,
    sampling: SamplingParams,
) -> list[str]:
    """One line for each contestant that differs: where it first does, and by what margin the target
    prefers its own token there. Texts without token ids cannot be asked about."""
    found: dict[str, Divergence] = {}
    ids = {prompt.index: prompt.ids for prompt in prompts}
    for table in record.metadata["tables"]:
        for row in table_rows(record, table):
            first = row.sameness.first if row.sameness else None
            if first is None or first.unit != "token":
                continue
            divergence = first_divergence(
                first.index,
                ids[first.index],
                record.outputs[first.expected]["token_ids"],
                record.outputs[first.output]["token_ids"],
            )
            assert divergence is not None
            found.setdefault(row.entrant.key, divergence)
    # A user's program may name ids that the target does not know.
    known = {
        key: d for key, d in found.items() if d.found is None or d.found < hierarchy.vocab_size
    }
    if known:
        found |= zip(known, with_margins(list(known.values()), hierarchy, sampling))
    dtype = hierarchy.models[-1].dtype
    return [f"{key}: {divergence.describe(dtype)}" for key, divergence in found.items()]
