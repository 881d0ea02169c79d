"""`python -m pipespec.fit_emulation`: a models config of emulated models from published runs.

Reads the greedy and the chain files of a folder (the original's schema) and no others: what its
async-chain files say is left to be predicted. Prints what was fitted and how well it fits.
"""

from __future__ import annotations

import json
import re
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from pipespec.commands.arguments import Parser
from pipespec.commands.display import Display, make_console
from pipespec.commands.entry import run_command
from pipespec.config import Schedule, load_models_config
from pipespec.emulation import fit
from pipespec.emulation.hidden import Observation, TwoStates, fit_two_states
from pipespec.emulation.oracle import DEMO_RANK_EXPONENT, Oracle
from pipespec.errors import DataError, UsageError
from pipespec.metrics import summarise
from pipespec.results import ensure_writable_file, load_results
from pipespec.simulate.prediction import Workload, emulations_of, predict

DEFAULT_TOKENIZER: Final = "pipespec:demo/middle-2M"
_PREFIX: Final = "emulated-"


@dataclass(frozen=True, slots=True)
class Published:
    """The runs that a fit may look at. models: names, smallest draft first. greedy: of each model.
    pairs: of each draft with the target, by lookahead. whole: of all models, if there are three."""

    models: tuple[str, ...]
    greedy: tuple[Sequence[fit.Result], ...]
    pairs: tuple[tuple[fit.ChainRun, ...], ...]
    whole: tuple[fit.ChainRun, ...]

    @property
    def chains(self) -> list[fit.ChainRun]:
        return [run for runs in (*self.pairs, self.whole) for run in runs]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run_command(lambda: _fit(make_parser().parse_args(arguments)))


def make_parser() -> Parser:
    """All flags of the command."""
    parser = Parser(
        prog="python -m pipespec.fit_emulation",
        description="Fits emulated models to the greedy and chain result files in a folder.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="with the result files")
    parser.add_argument(
        "--models",
        nargs="+",
        required=True,
        metavar="NAME",
        help="two or three, as in the names of the files, smallest draft first, target last",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="models config to write"
    )
    parser.add_argument(
        "--tokenizer",
        metavar="PATH",
        default=DEFAULT_TOKENIZER,
        help="what turns prompts into tokens; an emulated model has none of its own",
    )
    parser.add_argument(
        "--rank-exponent",
        type=float,
        metavar="R",
        default=DEMO_RANK_EXPONENT,
        help="of second and further choices, which result files do not tell",
    )
    parser.add_argument(
        "--num-texts",
        type=int,
        metavar="N",
        default=60,
        help="texts to simulate for the comparison; 0 leaves it out",
    )
    return parser


def _fit(options: Namespace) -> int:
    if len(options.models) not in (2, 3):
        raise UsageError(f"--models names {len(options.models)}; it must be two or three")
    if not 0.0 <= options.rank_exponent <= 100.0:
        raise UsageError(f"--rank-exponent is {options.rank_exponent}; it must be from 0 to 100")
    if options.num_texts < 0:
        raise UsageError(f"--num-texts is {options.num_texts}; it must be 0 or more")
    ensure_writable_file(options.output, "--output")
    published = read_published(options.folder, tuple(options.models))
    observed = observations(published)
    states = fit_two_states(observed, len(published.models) - 1)
    source = f"fitted by pipespec.fit_emulation on greedy and chain runs of {options.folder.name}"
    entries = [
        {
            "path": _PREFIX + name,
            "devices": "cpu",
            "tokenizer": options.tokenizer,
            "emulated": _emulated(published, states, index)
            | {"rank_exponent": options.rank_exponent, "source": source},
        }
        for index, name in enumerate(published.models)
    ]
    try:
        options.output.write_text(_to_text(entries), encoding="utf-8")
    except OSError as error:
        raise DataError(f"--output: {options.output}: {error.strerror or error}") from error
    display = Display(make_console())
    _report_fit(published, observed, states, entries, display)
    if options.num_texts:
        _report_error(published, states, options.output, options.num_texts, display)
    display.line(f"wrote {options.output}")
    return 0


# -- reading and fitting --------------------------------------------------------------------


def read_published(folder: Path, models: tuple[str, ...]) -> Published:
    """Reads what a fit of `models` needs.

    Raises:
        DataError: a file that is missing or is not a result file; names it.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    target = models[-1]
    return Published(
        models=models,
        greedy=tuple(load_results(folder / f"greedy_{name}.json").results for name in models),
        pairs=tuple(_chains(folder, (draft, target)) for draft in models[:-1]),
        whole=_chains(folder, models) if len(models) > 2 else (),
    )


def _chains(folder: Path, models: tuple[str, ...]) -> tuple[fit.ChainRun, ...]:
    """The chain runs of exactly these models, by lookahead."""
    stem = f"chain_{'-'.join(models)}_"
    found = {}
    for path in folder.iterdir():
        match = re.fullmatch(re.escape(stem) + "([0-9]+)[.]json", path.name)
        if match:
            found[int(match[1])] = path
    if not found:
        raise DataError(f"{folder}: there is no file {stem}LOOKAHEAD.json")
    return tuple(
        fit.ChainRun(models, lookahead, load_results(path).results)
        for lookahead, path in sorted(found.items())
    )


def observations(published: Published) -> list[list[Observation]]:
    """At each position of each text, which drafts were right; from the run of each pair with the
    longest lookahead, which tells of the most positions."""
    drafts = [fit.agreement(runs[-1]) for runs in published.pairs]
    return [list(zip(*texts)) for texts in zip(*drafts)]


def step_times(published: Published, index: int) -> dict[int, float]:
    """Medians in milliseconds by number of tokens, of one model.

    The jump comes with the second token (the runs with lookaheads from 2 on show it), so a shortest
    forward of several tokens stands for two as well.
    """
    pooled: fit.StepTimes = {}
    if index == len(published.models) - 1:
        for run in published.chains:
            for query, times in fit.target_times(run).items():
                pooled.setdefault(query, []).extend(times)
    else:
        pooled[1] = [ms for run in published.pairs[index] for ms in fit.draft_times(run)]
        for run in published.whole if index == 1 else ():
            pooled[run.lookahead] = fit.middle_times(run)
    medians = {query: median(times) for query, times in sorted(pooled.items()) if times}
    if 1 not in medians:
        medians[1] = fit.greedy_times(published.greedy[index], published.models[index]).step_ms
    several = [query for query in medians if query > 1]
    if several:
        medians.setdefault(2, medians[min(several)])
    kept = {1, 2, 4, 8, 16, max(medians)}
    return {query: round(medians[query], 2) for query in sorted(kept & set(medians))}


def _emulated(published: Published, states: TwoStates, index: int) -> dict[str, Any]:
    """The "emulated" object of one model."""
    values: dict[str, Any] = {
        "step_ms": {str(q): ms for q, ms in step_times(published, index).items()},
        "stretches": {
            "easy": round(states.stretches.easy, 1),
            "hard": round(states.stretches.hard, 1),
        },
    }
    if index < len(published.models) - 1:
        easy, hard = states.agreement(index)
        values["agreement"] = {"easy": round(easy, 3), "hard": round(hard, 3)}
    return values


def _to_text(entries: Sequence[dict[str, Any]]) -> str:
    """One line a key, and one a model's numbers."""
    lines = []
    for entry in entries:
        head = [f'    "{k}": {json.dumps(v)}' for k, v in entry.items() if k != "emulated"]
        body = [f'      "{k}": {json.dumps(v)}' for k, v in entry["emulated"].items()]
        inner = ",\n".join(body)
        lines.append(
            "  {\n" + ",\n".join([*head, f'    "emulated": {{\n{inner}\n    }}']) + "\n  }"
        )
    return "[\n" + ",\n".join(lines) + "\n]\n"


# -- how well it fits -----------------------------------------------------------------------


def _report_fit(
    published: Published,
    observed: Sequence[Sequence[Observation]],
    states: TwoStates,
    entries: Sequence[dict[str, Any]],
    display: Display,
) -> None:
    for entry in entries:
        table = ", ".join(f"{q}: {ms:g}" for q, ms in entry["emulated"]["step_ms"].items())
        display.line(f"{entry['path']}: ms by number of tokens {{{table}}}")
    stretches = states.stretches
    display.line(f"stretches: {stretches.easy:.1f} easy tokens, {stretches.hard:.1f} hard ones")
    items = [item for text in observed for item in text]
    for index, name in enumerate(published.models[:-1]):
        known = [item[index] for item in items if item[index] is not None]
        easy, hard = states.agreement(index)
        display.line(
            f"agreement of {name}: {known.count(True) / len(known):.4f} of {len(known)} observed, "
            f"{easy:.3f} in easy and {hard:.3f} in hard stretches"
        )
    both = [item for item in items if len(item) == 2 and None not in item]
    if both:
        broken, wrong = both.count((True, False)), both.count((False, False))
        display.line(
            f"nested: the better draft is wrong where the worse one is right at {broken} of "
            f"{len(both)} positions ({broken / len(both):.1%}; both are wrong at {wrong}); "
            "the emulation never does that"
        )


def _report_error(
    published: Published, states: TwoStates, config: Path, num_texts: int, display: Display
) -> None:
    """The fitted process against what it was fitted to. The accepted lengths are those of the
    original's chain; times are of PipeSpec's, which verifies as many drafted tokens."""
    for index, runs in enumerate(published.pairs):
        easy, hard = states.agreement(index)
        oracle = Oracle(easy, 4096, hard_agreement=hard, stretches=states.stretches)
        lookahead, lengths = runs[-1].lookahead, runs[-1].lengths
        fitted = fit.chain_lengths(oracle, lookahead, num_texts, Workload().new_tokens)
        distance = fit.length_distance(fitted, lengths)
        display.line(
            f"emulated {'-'.join(runs[-1].models)}, chain with lookahead {lookahead}: mean "
            f"accepted length {sum(fitted) / len(fitted):.2f}, published "
            f"{sum(lengths) / len(lengths):.2f}; distance of the distributions {distance:.3f}"
        )
    models = emulations_of(load_models_config(config))
    workload = Workload(num_texts=num_texts)
    fitted_ms = predict(models, "greedy", workload=workload).ms_per_token
    _report_ms("greedy", published.models[-1:], fitted_ms, published.greedy[-1], display)
    for run in published.chains:
        used = [models[published.models.index(name)] for name in run.models]
        if run.lookahead == max(r.lookahead for r in published.chains if r.models == run.models):
            schedule = Schedule(lookahead=run.lookahead - 1)
            fitted_ms = predict(used, "chain", schedule, workload).ms_per_token
            _report_ms(f"chain {run.lookahead}", run.models, fitted_ms, run.results, display)


def _report_ms(
    strategy: str,
    models: Sequence[str],
    fitted_ms: float,
    results: Sequence[fit.Result],
    display: Display,
) -> None:
    published_ms = summarise(results).ms_per_token
    assert published_ms is not None
    display.line(
        f"emulated {'-'.join(models)}, {strategy}: {fitted_ms:.2f} ms/token, published "
        f"{published_ms:.2f} ({fitted_ms / published_ms - 1:+.1%})"
    )


if __name__ == "__main__":
    sys.exit(main())
