"""``bench --search``: the settings that are searched, the trained models that run them, and the table."""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from dllm_compile import tiny
from dllm_compile.generate import for_backend, generate
from dllm_compile.mechanisms import PRESETS, tables
from dllm_compile.options import Options
from dllm_compile.sampler.compiled import compiled
from dllm_compile.sampler.family import Family
from dllm_compile.sampler.settings import PRESET_SETTINGS, Settings, settings_of

from . import antibody
from .command import Parser, require, share, target, whole
from .search import Evaluate, Evaluated, Row, Setting, search
from .shape import machine
from .table import aligned
from .timed import Timed, clocked

ABOUT = "the fastest composition of settings within an accuracy bound, by successive halving"
SEED_OF_PROBLEMS = 2
"""Not those of the demo: what is chosen on problems is not to be shown on the same."""
BASELINE = "eager", {"block_length": 32}
THRESHOLD = {"threshold": 0.9}

AXES: dict[str, tuple[Setting, ...]] = {
    "rows": (
        {"cache": "dual"},
        {"cache": "prefix"},
        {"cache": "rolling"},
        {"cache": "decoded"},
        *({"method": "dllm-cache", "prompt_interval": 50, "response_interval": every} for every in (2, 7)),
        {},
    ),
    "block": ({"block_length": 32}, {"block_length": 16}, {"block_length": 64}),
    "tokens": (
        {"threshold": 0.9},
        {"threshold": 0.7},
        {"threshold": 0.8},
        {"threshold": 0.95},
        {"threshold": 0.9, "threshold_fall": 0.3},
        {"factor": 1.0},
        {"frechet_delta": 0.25},
        {"frechet_delta": 0.5},
    ),
    "saliency": ({}, {"saliency_threshold": 0.99}),
    "window": ({}, {"suffix_window": 32}),
    "skipping": ({}, {"row_shares": (0.5, 0.25)}, {"row_shares": (0.75, 0.5)}),
    "eviction": ({}, {"keep_ratio": 0.5}, {"keep_ratio": 0.7}),
    "outside": ({}, {"keep_outside": True}),
    "place": ({}, {"sliding": "greedy", "rows_before": 24}, {"rows_before": 16, "rows_behind": 16}),
    "refresh": ({}, {"refresh_interval": 16}, {"refresh_interval": 8}),
    "drafts": ({}, {"drafts": 4}),
}
"""What each part of a setting may be. An empty one leaves the part out."""


# -- the settings ------------------------------------------------------------------------------------------------------


Meaning = Callable[[Setting], tuple[Settings, dict[str, Any]]]


def published() -> list[str]:
    """The presets of the methods, and others of note."""
    names = [*tables().methods, "fast-dllm/dual", "fast-dllm++", "fastest"]
    return [name for name in names if name != "exact"]


def parallel(preset: str) -> Setting:
    """A preset, with a threshold where it does not choose tokens itself."""
    chooses = preset in PRESET_SETTINGS or "frechet_delta" in PRESETS.get(preset, {})
    return {"preset": preset} | ({} if chooses else THRESHOLD)


def compared(presets: Sequence[str], meaning: Meaning) -> dict[str, Setting]:
    """Presets by name, one token a step as they were published, and then :func:`parallel`.

    Raises:
        ValueError: options do not know one.
    """
    alone: Iterable[Setting] = ({"preset": name} for name in presets)
    return {name_of(each): each for each in distinct(itertools.chain(alone, map(parallel, presets)), meaning, False)}


def ranked(path: str, meaning: Meaning) -> dict[str, Setting]:
    """Settings by name that another search ranked, on another model perhaps, and the preset ``fastest``.

    Args:
        path: of the file that ``--json`` named then.
        meaning: see :func:`distinct`; what it refuses is left out.
    """
    with open(path, encoding="utf-8") as file:
        rows = json.load(file)["ranking"]
    lists = ({k: tuple(v) if isinstance(v, list) else v for k, v in row["setting"].items()} for row in rows)
    others = (each for each in lists if each != BASELINE[1])
    return {name_of(each): each for each in distinct([{"preset": "fastest"}, *others], meaning, True)}


def resolved(setting: Setting, response: int, batch: int = 1, mask_id: int = 0) -> tuple[Settings, dict[str, Any]]:
    """What a setting says, for a response of so many tokens: how to sample, and options of the backend, if any.

    Raises:
        ValueError: options refuse it, or no loop takes it. ``generate`` refuses what depends on the model.
    """
    how, options = settings_of({**setting, "gen_length": response})
    if options:
        how, options, _ = for_backend(how, options, Family(mask_id, False))
    how.check_blocks()
    if how.drafts and batch > 1:
        raise ValueError(f"drafts are of one sequence, and the batch is {batch}; leave drafts out")
    return how, options


def distinct(settings: Iterable[Setting], meaning: Meaning, skip: bool) -> Iterator[Setting]:
    """The settings, no two of one meaning.

    Args:
        settings: in which order the first is taken.
        meaning: what a setting says; it raises ``ValueError`` where that is not allowed.
        skip: leave such settings out; else the error is raised.
    """
    known: set[tuple[Settings, Options | None]] = set()
    for setting in settings:
        try:
            how, options = meaning(setting)
        except ValueError:
            if not skip:
                raise
            continue
        meant = how, Options.of(options) if options else None
        if meant not in known:
            known.add(meant)
            yield setting


def drawn(count: int, seed: int, meaning: Meaning) -> dict[str, Setting]:
    """Candidates by name: the presets, then settings drawn from :data:`AXES`, no two of one meaning.

    A part that may be left out is, with a probability of two thirds. Fewer than ``count`` where there are no more.

    Args:
        count: of them.
        seed: of what is drawn.
        meaning: see :func:`distinct`; what it refuses is not a candidate.
    """
    draw = random.Random(seed)

    def made() -> Setting:
        setting: dict[str, Any] = {}
        for parts in AXES.values():
            left_out = {} in parts and draw.random() < 2 / 3
            setting.update({} if left_out else draw.choice(parts))
        return setting

    every = itertools.chain(map(parallel, published()), (made() for _ in range(100 * count)))
    return {name_of(each): each for each in itertools.islice(distinct(every, meaning, True), count)}


def name_of(setting: Setting) -> str:
    """A setting in one line."""
    short = {"preset": "", "cache": "", "block_length": "block ", "method": ""}
    return ", ".join(f"{short.get(name, name.replace('_', ' ') + ' ')}{value}" for name, value in setting.items())


# -- the models --------------------------------------------------------------------------------------------------------


def embedded() -> Evaluate:
    """Evaluates on the embedded model: problems of a batch at once, by ``generate``."""
    model, tokenizer = tiny.load()
    timed = Timed()

    def evaluate(setting: Setting, problems: Sequence[tiny.Problem]) -> Evaluated:
        prompts = tiny.encode(problems, tokenizer)
        given = {"gen_length": tiny.RESPONSE_LENGTH, "mask_id": model.config.mask_token_id, **setting}

        def filled() -> torch.Tensor:
            ids = generate(model, prompts, **given)
            assert isinstance(ids, torch.Tensor)
            return ids

        done, compiling = timed((name_of(setting), prompts.shape), lambda: clocked(filled))
        texts = tiny.decode(done.ids[:, prompts.shape[1] :], tokenizer)
        right = [tiny.is_exact(problem, text) for problem, text in zip(problems, texts, strict=True)]
        return Evaluated(right, sum(each.tokens for each in problems), done.seconds, done.cpu, compiling)

    return evaluate


def of_stretches(setting: Setting) -> tuple[Settings, dict[str, Any]]:
    """As :func:`resolved`, for stretches in the middle of sequences, which ``generate`` does not fill.

    Raises:
        ValueError: likewise, and where the setting means something to ``generate`` alone.
    """
    how, options = resolved(setting, 2 * antibody.STRETCHES[-1], mask_id=antibody.MASK)
    if how.drafts is not None or how.block is not None or how.ends is not None:
        raise ValueError("drafts, moving blocks and ends are of generate alone; leave them out")
    return how, options


def _logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(ids).logits
    return logits


def antibodies() -> Evaluate:
    """Evaluates on AntiBERTy: a batch of stretches of antibody sequences, a residue in place of a problem's answer."""
    model = antibody.load()
    timed = Timed()

    def evaluate(setting: Setting, batch: antibody.Batch) -> Evaluated:
        how, options = of_stretches(setting)
        loop: dict[str, Any] = {"block": how.block_length, "threshold": how.threshold, "factor": how.factor}
        call = partial(_logits, model)
        if options:
            said = Options.of(options)
            loop |= {"delta": said.frechet_delta, "fall": said.threshold_fall, "window": said.suffix_window}
            call = partial(compiled(_logits, model, options), model)

        def filled() -> torch.Tensor:
            ids = batch.job.ids.clone()
            with torch.no_grad():
                for _ in antibody.fill(call, ids, antibody.MASK, **loop):
                    pass
            return ids

        key = name_of(setting), batch.job.ids.shape, batch.job.response
        done, compiling = timed(key, lambda: clocked(filled))
        right = antibody.shares_where(done.ids == batch.truth, batch.masked)
        return Evaluated(right, int(batch.masked.sum()), done.seconds, done.cpu, compiling)

    return evaluate


# -- the table and the command -----------------------------------------------------------------------------------------

_COLUMNS = "right", "less eager's", "tokens/s", "x eager", "compile s", "", "setting"


def table(rows: Iterable[Row]) -> str:
    """How settings stand, a line each."""
    return aligned([_COLUMNS, *map(_cells, rows)], left=_COLUMNS[-2:])


def _cells(row: Row) -> tuple[str, ...]:
    if not row.problems:
        return ("-",) * (len(_COLUMNS) - 2) + (row.verdict, f"{row.name}: {row.why}")
    return (
        f"{100 * row.right:.1f} %",
        f"{100 * row.difference:+.1f}" + ("" if row.error is None else f" +- {100 * row.error:.1f}"),
        f"{row.tokens_per_second:.1f}",
        f"{row.ratio:.2f}" + ("" if row.ratio_error is None else f" +- {row.ratio_error:.2f}"),
        f"{row.compile_seconds:.1f}",
        row.verdict,
        row.name,
    )


def run(
    evaluate: Evaluate,
    candidates: Mapping[str, Setting],
    batches: Sequence[Any],
    baseline: tuple[str, Setting] = BASELINE,
    write: Callable[[dict[str, Any]], None] = lambda _: None,
    **how: Any,
) -> list[Row]:
    """Search with any model's ``evaluate``; print each rung as it ends, then the ranking.

    Args:
        evaluate, candidates, batches, baseline, how: see :func:`dllm_compile.bench.search.search`.
        write: called with the report after each rung, as a time limit may end the search.
    """
    rungs: list[list[Row]] = []

    def report(ranking: Iterable[Row] = ()) -> dict[str, Any]:
        return {**how, "rungs": [list(map(asdict, rows)) for rows in rungs], "ranking": list(map(asdict, ranking))}

    def tell(rows: list[Row]) -> None:
        rungs.append(rows)
        print(f"rung {len(rungs)}: {max(row.problems for row in rows)} problems, {len(rows)} settings")
        print(table(rows), flush=True)
        write(report())

    def told(setting: Setting, batch: Any) -> Evaluated:
        done = evaluate(setting, batch)
        speed = f"{done.tokens / done.seconds:.1f} tokens/s, {done.compile_seconds:.1f} s to compile"
        print(f"{name_of(setting)}: {speed}", file=sys.stderr, flush=True)
        return done

    ranking = search(candidates, told, baseline, batches, tell=tell, **how)
    points = 100 * how.get("bound", 0.01)
    print(f"not worse than {baseline[0]} by more than {points:g} points, on {ranking[0].problems} problems:")
    print(table(ranking))
    write(report(ranking))
    return ranking


def _parser() -> Parser:
    parser = Parser(prog="dllm_compile bench --search", description=ABOUT)
    parser.add_argument("--search", action="store_true", help="this measurement")
    parser.add_argument("--antiberty", action="store_true", help="on AntiBERTy in place of the embedded model")
    for name, value, about in (
        ("candidates", 48, "settings of the first rung: the presets, then drawn ones"),
        ("first", 8, "problems of the first rung, a multiple of the batch; each further one doubles them"),
        ("problems", 128, "problems of the last rung, likewise"),
        ("batch", 8, "problems that are solved together"),
        ("finalists", 4, "settings that are not halved any more"),
        ("seed", 0, "of the settings that are drawn"),
    ):
        parser.add_argument(
            f"--{name}", type=whole(int(name != "seed")), default=value, help=f"{about}; {value} by default"
        )
    parser.add_argument(
        "--bound", type=share, default=0.01, help="how far accuracy may be below eager's, as a share; 0.01 by default"
    )
    parser.add_argument(
        "--presets",
        nargs="*",
        metavar="PRESET",
        help="in place of a search: these presets, as they were published and with a threshold, all of them on all "
        "problems; where none is named, one of each method",
    )
    parser.add_argument(
        "--ranked",
        metavar="FILE",
        help="in place of a search: the settings that an earlier one ranked and wrote to this file by --json, on the "
        "other model perhaps, and the preset fastest, all of them on all problems",
    )
    parser.add_argument("--json", type=target, help="also write rungs and ranking to this file, after each rung")
    return parser


def _candidates(given: argparse.Namespace, meaning: Meaning) -> dict[str, Setting]:
    if given.ranked is not None:
        return ranked(given.ranked, meaning)
    if given.presets is not None:
        return compared(given.presets or published(), meaning)
    return drawn(given.candidates, given.seed, meaning)


def main(argv: list[str]) -> None:
    """Command line: the words behind ``bench``, of which ``--search`` is one."""
    parser = _parser()
    given = parser.parse_args(argv)
    for flag, count in (("--first", given.first), ("--problems", given.problems)):
        if count % given.batch:
            parser.error(f"{flag} {count} is not a multiple of --batch {given.batch}")
    if given.first > given.problems:
        parser.error(f"--first {given.first} is more than --problems {given.problems}")
    batches: Sequence[Any]
    meaning: Meaning
    if given.antiberty:
        require(parser, "antiberty", "transformers", "antiberty", "abnumber")
        evaluate, meaning = antibodies(), of_stretches
        batches = antibody.batches(given.problems, given.batch)
    else:
        require(parser, "demo", "transformers", "safetensors")
        problems = tiny.problems(given.problems, SEED_OF_PROBLEMS)
        batches = [problems[i : i + given.batch] for i in range(0, len(problems), given.batch)]
        evaluate, meaning = embedded(), partial(resolved, response=tiny.RESPONSE_LENGTH, batch=given.batch)

    def write(report: dict[str, Any]) -> None:
        if given.json:
            said = {"command": f"python -m dllm_compile bench {shlex.join(argv)}", **machine(torch.device("cpu"))}
            with open(given.json, "w", encoding="utf-8") as file:
                json.dump({**said, **report}, file, indent=1, allow_nan=False)

    how = {"bound": given.bound, "first": given.first // given.batch, "finalists": given.finalists, "seed": given.seed}
    try:
        candidates = _candidates(given, meaning)
    except (OSError, KeyError, TypeError, ValueError) as error:
        parser.error(f"no settings in what --presets or --ranked names: {error}")
    if given.ranked is not None or given.presets is not None:
        how |= {"bound": 1.0, "finalists": len(candidates)}
    run(evaluate, candidates, batches, write=write, **how)
