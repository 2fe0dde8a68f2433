"""``bench --antiberty``: a trained masked language model fills stretches of antibody sequences, by each method.

The model is AntiBERTy (arXiv 2112.07782; a BERT of 8 layers), whose weights and vocabulary the package ``antiberty``
brings; its code is not run. Sequences are human germlines of the package ``abnumber``, V joined to J. Germlines are
surely close to what the model was trained on, so that more residues are recovered than of other sequences: what counts
is how methods compare.

    a batch     sequences of one chain, hence of one length, each with one masked stretch of the same length
    a forward   the logits of the batch, by the contender; then each sequence writes one residue (its surest), or as
                many as a rule of confidence says
"""

from __future__ import annotations

import importlib.util
import json
import random
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from logging import ERROR
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from dllm_compile.declared import loop
from dllm_compile.interface.mechanism import Confidences
from dllm_compile.mechanisms import PRESETS
from dllm_compile.passes import falling_threshold, frechet
from dllm_compile.sampler.rules import written
from dllm_compile.sampler.settings import PRESET_SETTINGS

from .command import Parser, require, target, whole
from .contest import Contender, Job, Row, play
from .means import gained, standard_error
from .shape import machine
from .table import aligned

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
SPECIAL = 5
"""Ids below are no residues: padding, unknown, begin, end and mask."""
BEGIN, END, MASK = 2, 3, 4
JUNCTION = "GSYTDRVAW"
"""What the residues between V and J of a heavy chain are drawn from, about as often as there."""


@dataclass(frozen=True)
class Chain:
    """Variable regions of one kind.

    Attributes:
        name: key of the germline tables.
        length: residues of a region.
        joined: residues between V and J, at least and at most.
    """

    name: str
    length: int
    joined: tuple[int, int]


CHAINS = Chain("H", 121, (3, 9)), Chain("K", 107, (0, 0)), Chain("L", 111, (0, 1))
STRETCHES = 32, 48, 64


@dataclass(frozen=True)
class Batch:
    """Sequences decoded together.

    Attributes:
        job: what is masked of them.
        truth: ``[B, S]`` int64, what they are.
    """

    job: Job
    truth: torch.Tensor

    @property
    def masked(self) -> torch.Tensor:
        """``[B, S]`` bool."""
        return self.job.ids == MASK


def folder(package: str) -> Path:
    """Where an installed package is, which is not imported: it may need others that no one needs here."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


def germlines() -> dict[str, tuple[list[str], list[str]]]:
    """Distinct V and J genes by chain, from the tables of ``abnumber``, without the gaps of their alignment."""
    spec = importlib.util.spec_from_file_location("germlines", folder("abnumber") / "germlines.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def genes(table: Any, chain: str) -> list[str]:
        found = {aligned.replace("-", "") for aligned in table[chain]["aligned_sequences"].values()}
        return sorted(each for each in found if set(each) <= set(RESIDUES))

    return {
        each.name: (genes(module.HUMAN_IMGT_IG_V, each.name), genes(module.HUMAN_IMGT_IG_J, each.name))
        for each in CHAINS
    }


def regions(chain: Chain, genes: tuple[list[str], list[str]], count: int, draw: random.Random) -> list[str]:
    """``count`` distinct variable regions of the chain's length; every V that fits is used before one is used again.

    Raises:
        ValueError: there are not so many.
    """
    pairs = [
        (v, j)
        for v in genes[0]
        for j in genes[1]
        if 0 <= chain.length - len(v) - len(j) - chain.joined[0] <= chain.joined[1] - chain.joined[0]
    ]
    draw.shuffle(pairs)
    used: dict[str, int] = {}
    ordered = []
    for pair in pairs:
        used[pair[0]] = used.get(pair[0], 0) + 1
        ordered.append((used[pair[0]], pair))
    ordered.sort(key=lambda each: each[0])
    found: dict[str, None] = {}
    for _, (v, j) in ordered:
        between = "".join(draw.choices(JUNCTION, k=chain.length - len(v) - len(j)))
        found[v + between + j] = None
    if len(found) < count:
        raise ValueError(f"{count} distinct regions of chain {chain.name} are asked for, and there are {len(found)}")
    return list(found)[:count]


def batches(count: int, batch: int, seed: int = 0) -> list[Batch]:
    """``count`` sequences in batches, the chains and the lengths of stretches in turn.

    Args:
        count: sequences, a multiple of ``batch``.
        batch: sequences of a batch.
        seed: of what is drawn.
    """
    draw, genes = random.Random(seed), germlines()
    turns = [i % len(CHAINS) for i in range(count // batch)]
    made = {each: iter(regions(each, genes[each.name], turns.count(i) * batch, draw)) for i, each in enumerate(CHAINS)}
    out = []
    for number, turn in enumerate(turns):
        chain, stretch = CHAINS[turn], STRETCHES[(number + number // len(CHAINS)) % len(STRETCHES)]
        out.append(masked([next(made[chain]) for _ in range(batch)], stretch, draw))
    return out


def masked(sequences: Sequence[str], stretch: int, draw: random.Random) -> Batch:
    """Ids of sequences of one length, in each of which a stretch in the middle half of its places is masked."""
    truth = torch.tensor(
        [[BEGIN, *(SPECIAL + RESIDUES.index(each) for each in text), END] for text in sequences], dtype=torch.int64
    )
    ids, free = truth.clone(), len(sequences[0]) - stretch
    for row in ids:
        start = 1 + draw.randint(free // 4, free - free // 4)
        row[start : start + stretch] = MASK
    return Batch(Job(ids, ids.shape[1] - stretch, stretch, stretch, MASK), truth)


def load() -> torch.nn.Module:
    """AntiBERTy for masked residues, in evaluation mode; ids ``[B, S]`` to logits ``[B, S, 25]``.

    Raises:
        ValueError: its vocabulary is another than :data:`RESIDUES` behind five special tokens.
    """
    from transformers import BertForMaskedLM
    from transformers.utils import logging

    where = folder("antiberty") / "trained_models"
    words = (where / "vocab.txt").read_text(encoding="utf-8").split()
    if words[SPECIAL:] != [*RESIDUES] or words[:SPECIAL] != ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]:
        raise ValueError(f"the vocabulary of antiberty is {words}; install antiberty==0.1.3")
    said = logging.get_verbosity()
    logging.set_verbosity(ERROR)  # it has three heads that are not used here
    try:
        model: torch.nn.Module = BertForMaskedLM.from_pretrained(where / "AntiBERTy_md_smooth", local_files_only=True)
    finally:
        logging.set_verbosity(said)
    return model.eval()


def fill(
    call: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    mask_id: int,
    *,
    block: int | None = None,
    threshold: float | None = None,
    factor: float | None = None,
    delta: float | None = None,
    fall: float | None = None,
    window: int | None = None,
) -> Iterator[torch.Tensor]:
    """Fill the masks of ``x`` ``[B, S]`` in place, wherever they are; yields ``x`` after each forward.

    Args:
        call: ids to logits ``[B, S, V]``.
        x: ids.
        mask_id: the mask token.
        block: masks of a block, counted from the first mask; ``None`` for one block.
        threshold, factor: Fast-dLLM's; with neither, nor ``delta``, a forward writes one residue of each sequence.
        delta: of the Fréchet profile, in place of these.
        fall, window: how far the threshold falls as a block is filled, and the suffix window that counts for it.
    """
    every = x == mask_id
    number = torch.where(every, (every.cumsum(1) - 1) // (block or x.shape[1]), x.shape[1])
    options = SimpleNamespace(frechet_delta=delta, threshold_fall=fall, suffix_window=window)
    one = delta is None and threshold is None and factor is None
    count = torch.ones(len(x), dtype=torch.int64) if one else None

    def told(*given: Any) -> Confidences:
        """What a mechanism is told of a step."""
        sure, candidates, masked, active = given[-4:]
        return Confidences(sure, candidates, masked, options, active, *given[:-4])

    rule = None if delta is None else lambda *given: frechet.jointly_likely(told(*given))
    moved = None if fall is None else lambda *given: falling_threshold.falling(told(*given))
    same = loop()
    while bool((x == mask_id).any()):
        masked = x == mask_id
        active = number == torch.where(masked, number, x.shape[1]).amin(1, keepdim=True)
        with same:
            logits = call(x)
        sure, residue = logits[..., SPECIAL:].softmax(-1).max(-1)
        how = count, 1, threshold, factor
        new = written(sure, masked & active, masked, *how, block=active & every, rule=rule, moved=moved)
        x.copy_(torch.where(new, residue + SPECIAL, x))
        yield x


# -- who takes part ----------------------------------------------------------------------------------------------------

BLOCK = 32
THRESHOLD = 0.7
"""Of all rows with one but ``dual + 0.9``; Streaming-dLLM's falls from there."""
REFUSED = {
    "dkv-cache greedy": "computes what is filled next, which only generate tells it; in this loop it is dkv-cache",
    "drafts": "runs in generate alone, whose masks are behind a prompt, and for one sequence",
    "length cut": "looks for the end of a response, and a stretch has a known length",
}
"""What cannot fill a stretch between two known parts, and why."""


def methods() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Options of the backend and of the loop by the name of a method."""
    block: dict[str, Any] = {"block": BLOCK}
    of_blocks = {"block_length": BLOCK, "shift": False}
    dual = {**of_blocks, "method": "fast-dllm", "cache": "dual"}
    narrow = {"block_length": BLOCK // 2, "suffix_window": BLOCK // 2}
    return {
        "dllm-cache": ({"method": "dllm-cache", "shift": False}, {}),
        "fast-dllm prefix": ({**dual, "cache": "prefix"}, block),
        "fast-dllm dual": (dual, block),
        "sparse-dllm": ({**of_blocks, "method": "sparse-dllm"}, block),
        "dyllm": ({"method": "dyllm", "shift": False}, {}),
        "dkv-cache": ({"method": "dkv-cache", "shift": False}, {}),
        "es-dllm": ({**of_blocks, "method": "es-dllm"}, block),
        "flashblock": ({**of_blocks, "method": "flashblock"}, block),
        "streaming-dllm": ({**of_blocks, "method": "streaming-dllm", **narrow}, {"block": BLOCK // 2}),
        "dinfer": ({**of_blocks, "method": "dinfer", "rows_before": 8, "rows_behind": 8, "warmup_steps": 1}, block),
    }


def contenders() -> list[Contender]:
    """Baselines; methods and compositions that write as many residues a forward as a rule of confidence says; and each
    method with one residue a forward.
    """
    known = methods()
    dual, of_blocks = known["fast-dllm dual"]
    whole = {name: value for name, value in dual.items() if name != "block_length"}
    sure: dict[str, Any] = {"threshold": THRESHOLD}
    out = [Contender("eager", loop=fill), Contender("inductor", plain=True, loop=fill)]

    def parallel(name: str, options: dict[str, Any] | None, **how: Any) -> None:
        out.append(Contender(name, options, loop=partial(fill, **how)))

    parallel("threshold, eager", None, **sure)
    parallel("dual, one block + threshold", whole, **sure)
    parallel("dual + 0.9", dual, **of_blocks, threshold=0.9)
    fastest = {**PRESETS["fastest"], "shift": False}
    parallel("fastest", fastest, block=fastest["block_length"], delta=PRESET_SETTINGS["fastest"]["frechet_delta"])
    parallel("fast-dllm++: dual + Frechet", dual, **of_blocks, delta=0.25)
    parallel("dual, one block + Frechet", whole, delta=0.25)
    parallel("dual, one block + factor", whole, factor=1.0)
    streaming, how = known["streaming-dllm"]
    parallel("streaming-dllm, falling", streaming, **how, **sure, fall=0.3, window=BLOCK // 2)
    for name, (options, how) in known.items():
        if name != "streaming-dllm":
            begins = {"full_steps": 1} if name == "dyllm" else {}  # else a stretch is filled before it saves anything
            parallel(f"{name} + threshold", {**options, **begins}, **how, **sure)
    for name, (options, how) in known.items():
        out.append(Contender(name, options, loop=partial(fill, **how)))
    return out


def one_a_forward(contender: Contender) -> bool:
    """Whether it writes one residue of each sequence a forward."""
    return not {"threshold", "factor", "delta"} & set(getattr(contender.loop, "keywords", {}))


# -- the measurement ---------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """What one contender did.

    Attributes:
        row: speed and forwards; its accuracy is the share of masked residues that were recovered, its ``same_tokens``
            the share that are as eager's, of the batches of both.
        recovered: the same of each sequence.
        error: standard error of ``row.accuracy`` over sequences; ``None`` of one.
        of_eager, of_inductor: speed against theirs by time on a processor, which other work on the machine changes
            little; on the batches of both.
        gain, gain_error: points recovered more than by eager, on the sequences of both, and its standard error.
    """

    row: Row
    recovered: list[float]
    error: float | None = None
    of_eager: float = 1.0
    of_inductor: float = 1.0
    gain: float = 0.0
    gain_error: float | None = None


def shares_where(equal: torch.Tensor, masked: torch.Tensor) -> list[float]:
    """By sequence, the share of masked positions ``[B, S]`` bool at which something is equal."""
    shares: list[float] = ((equal & masked).sum(1).double() / masked.sum(1)).tolist()
    return shares


def measure(
    contender: Contender, model: torch.nn.Module, given: Sequence[Batch], eager: list[torch.Tensor] | None = None
) -> tuple[Found, list[torch.Tensor]]:
    """Fill the stretches of every batch, and compare with the truth and with what eager wrote, of as many as it ran."""
    row, results = play(contender, model, [each.job for each in given])
    recovered = [shares_where(ids == each.truth, each.masked) for ids, each in zip(results, given, strict=True)]
    found = Found(row, [share for shares in recovered for share in shares])
    row.accuracy = sum(found.recovered) / len(found.recovered)
    row.tokens = sum(int(each.masked.sum()) for each in given)
    found.error = standard_error(found.recovered)
    same, mine, first = list[float](), list[float](), list[float]()
    for ids, theirs, each, shares in zip(results, eager or results, given, recovered, strict=False):
        same += shares_where(ids == theirs, each.masked)
        mine += [100 * share for share in shares]
        first += [100 * share for share in shares_where(theirs == each.truth, each.masked)]
    row.same_tokens = sum(same) / len(same)
    found.gain, found.gain_error = gained(mine, first)
    return found, results


def rate(row: Row, given: Sequence[Batch], count: int, clock: str = "seconds") -> tuple[float, float]:
    """Residues a second and a forward of each sequence, over the first ``count`` batches."""
    jobs = row.jobs[:count]
    residues = sum(int(each.masked.sum()) for each in given[: len(jobs)])
    sequences = len(given[0].truth)
    seconds, forwards = (sum(job[name] for job in jobs) for name in (clock, "forwards"))
    return residues / seconds, residues / sequences / forwards


def compared(every: Sequence[Found], given: Sequence[Batch]) -> None:
    """Fill in ratios: each of what both did, as one residue a forward is measured on fewer batches."""
    by_name = {each.row.name: each.row for each in every}
    for found in every:
        row = found.row
        row.tokens_per_second = rate(row, given, len(row.jobs))[0]
        for name in ("eager", "inductor"):
            if name not in by_name:
                continue
            both = min(len(row.jobs), len(by_name[name].jobs))
            (speed, filled), (base, one) = rate(row, given, both), rate(by_name[name], given, both)
            on_processor = rate(row, given, both, "cpu")[0] / rate(by_name[name], given, both, "cpu")[0]
            if name == "inductor":
                row.vs_inductor, found.of_inductor = speed / base, on_processor
            else:
                row.vs_eager, row.fewer, found.of_eager = speed / base, filled / one, on_processor
                row.cheaper = found.of_eager / row.fewer


COLUMNS = (
    *("", "sequences", "recovered, %", "beyond eager", "as eager", "residues/s", "x eager"),
    *("CPU time: x eager", "cheaper", "fewer", "x inductor", "FLOPs", "forwards", "compile s"),
)


def cells(found: Found) -> tuple[str, ...]:
    """One row as text."""
    row = found.row
    return (
        row.name,
        str(len(found.recovered)),
        f"{100 * (row.accuracy or 0.0):.1f}" + ("" if found.error is None else f" +- {100 * found.error:.1f}"),
        f"{found.gain:+.1f}" + ("" if found.gain_error is None else f" +- {found.gain_error:.1f}"),
        f"{100 * row.same_tokens:.1f} %",
        f"{row.tokens_per_second:.1f}",
        f"{row.vs_eager:.2f}",
        f"{found.of_eager:.2f}",
        f"{row.cheaper:.2f}",
        f"{row.fewer:.2f}",
        f"{found.of_inductor:.2f}",
        f"{row.flops:.3f}",
        str(row.forwards),
        f"{row.compile_seconds:.1f}",
    )


def table(every: Sequence[Found]) -> str:
    """All rows, and below them what takes no part."""
    refused = [f"{name}: refused; {why}" for name, why in REFUSED.items()]
    return "\n".join([aligned([COLUMNS, *map(cells, every)]), *refused])


def run(
    model: torch.nn.Module, given: Sequence[Batch], entrants: Sequence[Contender], few: int, of_eager: int
) -> Iterator[list[Found]]:
    """Measure the entrants, the first of which is eager; yields all rows so far behind each.

    Args:
        model: whom to run.
        given: what to fill.
        entrants: who takes part.
        few: batches for those that write one residue a forward.
        of_eager: batches for eager, with which the others are compared on the batches of both.
    """
    every: list[Found] = []
    eager: list[torch.Tensor] | None = None
    for contender in entrants:
        count = of_eager if eager is None else few if one_a_forward(contender) else len(given)
        found, results = measure(contender, model, given[:count], eager)
        eager = eager or results
        every.append(found)
        compared(every, given)
        print("  ".join(cells(found)), file=sys.stderr, flush=True)
        yield every


def main(argv: list[str]) -> None:
    """Command line: the words behind ``bench``, of which ``--antiberty`` is one."""
    parser = Parser(prog="dllm_compile bench --antiberty", description="a trained model fills antibody sequences")
    parser.add_argument("--antiberty", action="store_true", help="this measurement")
    for name, value, about in (
        ("--sequences", 200, "sequences, a multiple of the batch"),
        ("--one", 24, "of these, for rows that write one residue a forward; likewise"),
        ("--eager", 72, "of these, for eager, with which the others are compared; likewise"),
        ("--batch", 8, "sequences decoded together"),
        ("--seed", 0, "of the sequences and stretches"),
    ):
        parser.add_argument(name, type=whole(int(name != "--seed")), default=value, help=f"{about}; {value} by default")
    names = [each.name for each in contenders()]
    parser.add_argument("--methods", nargs="+", metavar="ROW", help=f"rows beside eager's, of {', '.join(names)}")
    parser.add_argument("--json", type=target, help="also write the rows to this file, after each of them")
    asked = parser.parse_args(argv)
    for flag, count in (("--sequences", asked.sequences), ("--one", asked.one), ("--eager", asked.eager)):
        if count % asked.batch:
            parser.error(f"{flag} {count} is not a multiple of --batch {asked.batch}")
    for name in asked.methods or ():
        if name in REFUSED:
            parser.error(f"argument --methods: {name} {REFUSED[name]}")
        if name not in names:
            parser.error(f"argument --methods: there is no row {name!r}; give some of {', '.join(map(repr, names))}")
    require(parser, "antiberty", "transformers", "antiberty", "abnumber")
    given = batches(asked.sequences, asked.batch, asked.seed)
    named = {each.name: each for each in contenders()}
    entrants = [named[name] for name in dict.fromkeys(["eager", *(asked.methods or names)])]
    every: list[Found] = []
    for every in run(load(), given, entrants, asked.one // asked.batch, asked.eager // asked.batch):
        if asked.json:
            _write(asked.json, argv, asked, every)
    print(f"AntiBERTy, {asked.sequences} germlines, batch {asked.batch}, stretches of {STRETCHES}, blocks of {BLOCK}")
    print(table(every))


def _write(path: str, argv: list[str], asked: Any, every: Sequence[Found]) -> None:
    where = machine(torch.device("cpu"))
    said = {name: getattr(asked, name) for name in ("sequences", "one", "eager", "batch", "seed")}
    rows = [{**asdict(each.row), **{k: v for k, v in vars(each).items() if k != "row"}} for each in every]
    content = {"command": f"python -m dllm_compile bench {shlex.join(argv)}", **said, **where}
    with open(path, "w", encoding="utf-8") as file:
        json.dump({**content, "refused": REFUSED, "rows": rows}, file, indent=1)
