"""Who races, on which hardware, in which variants. Nothing is started or loaded here.

Two tables compare on equal hardware. *device*: everyone has the target's device; only async-chain,
which is made for it, has a device a model as the config says. *total*: everyone has all that
async-chain has. One model cannot use a second GPU to any profit without tensor parallelism, so on
GPUs *total* means that each model of a synchronous pair stands on its own, as the config says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Final

from pipespec.checkpoint import CheckpointShape
from pipespec.comparison import ablation
from pipespec.config import ModelConfig
from pipespec.decoding import Hierarchy
from pipespec.errors import UsageError
from pipespec.placement import Machine, StagePlacement, in_process, place

TABLES: Final = ("device", "total")
GREEDY: Final = "greedy"
LIBRARY_DEFAULT: Final = "default"
HEURISTIC: Final = "heuristic"

Places = tuple[StagePlacement, ...]


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to let a contestant run; another one needs no other process. The best of them counts.

    label: for the table; empty where there is only one.
    """

    label: str
    settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Contestant:
    """Who takes part.

    key: its name, with "@" and the table where it differs between the tables. name: as `--only` and
    `--skip` know it. kind: "own", "transformers" or "command". tables: in which it stands. places:
    of all models of the config, drafts first. settings: what its process is told beside that.
    """

    key: str
    name: str
    kind: str
    tables: tuple[str, ...]
    places: Places
    settings: Mapping[str, Any]
    variants: tuple[Variant, ...]

    @property
    def cores(self) -> tuple[int, ...]:
        """The cores it may use at all; empty where it is not pinned."""
        if any(place.device == "cpu" and not place.cores for place in self.places):
            return ()
        return tuple(sorted({core for place in self.places for core in place.cores}))


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Who does not take part. why: one clause."""

    name: str
    why: str


@dataclass(frozen=True, slots=True)
class Choices:
    """What the user can choose.

    chain_lookaheads, assistant_tokens ("default", "heuristic" or a number), lookup_tokens: variants
    of chain, assisted generation and prompt lookup. outcomes: each one more async-chain. commands:
    name and command line of others. ablation: in place of the usual contestants, our own policies.
    """

    chain_lookaheads: tuple[int, ...] = (2, 3, 4, 6, 8)
    outcomes: tuple[int, ...] = (0,)
    assistant_tokens: tuple[str, ...] = (HEURISTIC, LIBRARY_DEFAULT)
    lookup_tokens: tuple[int, ...] = (10,)
    commands: tuple[tuple[str, str], ...] = ()
    ablation: bool = False


def line_up(
    hierarchy: Hierarchy, choices: Choices, tables: Sequence[str] = TABLES
) -> tuple[list[Contestant], list[LeftOut]]:
    """All who could race with these models, and who cannot, in the order of the tables.

    Raises:
        UsageError: a command has the name of another contestant.
    """
    grounds = playing_grounds(hierarchy, tables)
    contestants: list[Contestant] = []
    left_out: list[LeftOut] = []
    entries = _entries(choices)
    names = [entry.name for entry in entries]
    taken = next((name for name, _ in choices.commands if names.count(name) > 1), None)
    if taken is not None:
        raise UsageError(f"--command: the name {taken} is taken; choose another")
    for entry in entries:
        why = _why_not(entry, hierarchy.models)
        if why:
            left_out.append(LeftOut(entry.name, why))
        elif entry.is_async:
            contestants.append(_contestant(entry, entry.name, tuple(grounds), hierarchy.placements))
        else:
            contestants += _on_grounds(entry, grounds)
    return contestants, left_out


def chosen(
    names: Iterable[str], only: Sequence[str] | None, skip: Sequence[str] | None
) -> frozenset[str]:
    """The names that `--only` and `--skip` leave; a pattern such as `transformers*` stands for all
    that match.

    Raises:
        UsageError: a name or pattern that nobody has, or nobody is left.
    """
    known = list(dict.fromkeys(names))
    for flag, patterns in (("--only", only), ("--skip", skip)):
        for pattern in patterns or ():
            if not any(fnmatchcase(name, pattern) for name in known):
                listed = ", ".join(known)
                raise UsageError(f"{flag}: nobody is called {pattern}; there are {listed}")
    left = [
        name
        for name in known
        if (only is None or any(fnmatchcase(name, pattern) for pattern in only))
        and not any(fnmatchcase(name, pattern) for pattern in skip or ())
    ]
    if not left:
        raise UsageError("--only and --skip leave nobody to race")
    return frozenset(left)


# -- hardware -------------------------------------------------------------------------------


def playing_grounds(hierarchy: Hierarchy, tables: Sequence[str] = TABLES) -> dict[str, Places]:
    """Where the models of a synchronous contestant stand, by table. The second table is missing
    where it would be the first again, as for emulated models, which use no hardware."""
    placements = hierarchy.placements
    both = {"device": _on_target(placements), "total": _on_all(hierarchy)}
    is_emulated = all(model.emulated is not None for model in hierarchy.models)
    if is_emulated or both["device"] == both["total"]:
        return {"device": both["device"]}
    return {table: both[table] for table in tables}


def seen_by_process(places: Places, machine: Machine) -> tuple[Places, tuple[str, ...]]:
    """The places as a process names them that sees the GPUs of these places alone, and its
    CUDA_VISIBLE_DEVICES."""
    used = {name for place in places for name in place.visible_devices}
    visible = tuple(name for name in machine.gpu_ids if name in used)
    narrowed = replace(machine, gpu_ids=visible)
    return tuple(in_process(place, narrowed) for place in places), visible


def num_threads(places: Places) -> int:
    """Of the thread pools of a process in which one model works at a time."""
    return max(place.threads for place in places)


def _on_target(placements: Places) -> Places:
    """Everything on the device of the target; where that has several, a draft on the first."""
    target = placements[-1]
    draft = target
    if target.device == "auto":
        draft = replace(target, device="cuda:0", visible_devices=target.visible_devices[:1])
        draft = replace(draft, max_memory_gib={})
    return (*(draft for _ in placements[:-1]), target)


def _on_all(hierarchy: Hierarchy) -> Places:
    """One process with all cores, or on GPUs with a device a model."""
    placements, machine = hierarchy.placements, hierarchy.machine
    if any(place.device != "cpu" for place in placements):
        return placements
    is_pinned = all(place.cores for place in placements)
    cores = tuple(sorted({core for place in placements for core in place.cores}))
    wanted = len(cores) if is_pinned else sum(place.threads for place in placements)
    threads = min(wanted, len(machine.cores))
    everything = replace(placements[-1], cores=cores if is_pinned else (), threads=threads)
    drafts = range(len(placements) - 1)
    return (
        *(replace(everything, threads=min(threads, _useful_threads(hierarchy, i))) for i in drafts),
        everything,
    )


def _useful_threads(hierarchy: Hierarchy, index: int) -> int:
    """As many as a small model can use: with more, a synchronous chain would only be slower."""
    folder = hierarchy.folders[index]
    if folder is None:
        return len(hierarchy.machine.cores)
    model = replace(hierarchy.models[index], devices=("cpu",))
    num_bytes = CheckpointShape.read(folder).weight_bytes(model.dtype, model.quantize)
    (alone,) = place((model,), hierarchy.machine, [num_bytes / (1 << 30)])
    return alone.threads


# -- entries --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Entry:
    """A contestant before it has a place. num_models: how many it takes at least."""

    name: str
    kind: str
    num_models: int
    settings: Mapping[str, Any]
    variants: tuple[Variant, ...] = (Variant("", {}),)
    is_async: bool = False


def _entries(choices: Choices) -> list[_Entry]:
    usual = _ablation_entries if choices.ablation else _race_entries
    return [
        *usual(choices),
        *(_Entry(name, "command", 1, {"command": text}) for name, text in choices.commands),
    ]


def _ablation_entries(choices: Choices) -> list[_Entry]:
    """Greedy, the best chain, and async-chain with more and fewer policies."""
    chains = (Variant("auto", {}), *_fixed_chains(choices))
    return [
        _Entry(GREEDY, "own", 1, {"strategy": "greedy"}),
        _Entry("chain", "own", 2, {"strategy": "chain"}, chains),
        *(_async(name, schedule) for name, schedule in ablation.schedules().items()),
    ]


def _race_entries(choices: Choices) -> list[_Entry]:
    assisted = [Variant(_words(text), {"tokens": text}) for text in choices.assistant_tokens]
    lookups = [Variant(f"{n} tokens", {"tokens": n}) for n in choices.lookup_tokens]
    return [
        _Entry(GREEDY, "own", 1, {"strategy": "greedy"}),
        _Entry("chain", "own", 2, {"strategy": "chain"}, _fixed_chains(choices)),
        _Entry("chain-auto", "own", 2, {"strategy": "chain"}),
        _async("async-chain", {}),
        _async("async-chain-pipespec", {"policy": "pipespec", "lookahead": 0}),
        *(_async(f"async-chain-outcomes-{n}", {"outcomes": n}) for n in choices.outcomes),
        _Entry("transformers", "transformers", 1, {"mode": "plain"}),
        _Entry("transformers-assisted", "transformers", 2, {"mode": "assisted"}, tuple(assisted)),
        _Entry("transformers-lookup", "transformers", 1, {"mode": "lookup"}, tuple(lookups)),
    ]


def _fixed_chains(choices: Choices) -> tuple[Variant, ...]:
    return tuple(Variant(f"lookahead {n}", {"lookahead": n}) for n in choices.chain_lookaheads)


def _async(name: str, schedule: Mapping[str, Any]) -> _Entry:
    settings = {"strategy": "async-chain", "schedule": schedule}
    return _Entry(name, "own", 2, settings, is_async=True)


def _words(assistant_tokens: str) -> str:
    return f"{assistant_tokens} tokens" if assistant_tokens.isdigit() else assistant_tokens


def _why_not(entry: _Entry, models: Sequence[ModelConfig]) -> str:
    """Why an entry cannot race; empty if it can, as far as the config tells."""
    if len(models) < entry.num_models:
        return "it needs a draft, and the models config has a target only"
    if not entry.variants:
        return "no variant of it was asked for"
    if entry.kind == "transformers" and any(model.emulated is not None for model in models):
        return "emulated models have no weights that transformers could load"
    return ""


def _on_grounds(entry: _Entry, grounds: Mapping[str, Places]) -> list[Contestant]:
    """The entry once for each table, or once for both where it has the same hardware in both."""
    used = {table: _used(entry, places) for table, places in grounds.items()}
    first = next(iter(used.values()))
    if all(places == first for places in used.values()):
        return [_contestant(entry, entry.name, tuple(grounds), first)]
    return [
        _contestant(entry, f"{entry.name}@{table}", (table,), places)
        for table, places in used.items()
    ]


def _used(entry: _Entry, places: Places) -> Places:
    """The places of the models that the entry loads."""
    if entry.kind == "command":
        return places
    if entry.num_models == 1:
        return places[-1:]
    if entry.kind == "transformers":
        return places[0], places[-1]  # the smallest draft assists
    return places


def _contestant(entry: _Entry, key: str, tables: tuple[str, ...], places: Places) -> Contestant:
    return Contestant(
        key, entry.name, entry.kind, tables, places, dict(entry.settings), entry.variants
    )
