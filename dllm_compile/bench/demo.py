"""``python -m dllm_compile demo``: the embedded model solves problems, eagerly, by Inductor, and by this backend."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

from dllm_compile import tiny
from dllm_compile.mechanisms import PRESETS
from dllm_compile.runtime.lower import trusting_cpu

from .command import Parser, require, target, whole
from .contest import Contender, Job, Row, Show, finish, play
from .table import print_rows

ABOUT = "the embedded model solves problems: in eager mode, by Inductor, and by each method of this backend"
HELD_OUT_SEED = 1
THRESHOLD = 0.9
FEW = 8
"""Forwards of each batch that plain Inductor is timed for: all cost the same, and its answers would be eager's."""
FEATURES = PRESETS["dllm-cache/llada-instruct-longbench"]
"""Of the authors' settings those for answers found in long prompts, as here. The prompt is computed anew every 100
steps, so not within a response of 64: one kind of step less to compile.
"""


def contenders(block: int) -> list[Contender]:
    """Baselines and every method, as published."""
    blocks = {"method": "fast-dllm", "block_length": block}
    parallel = {"threshold": THRESHOLD}
    return [
        Contender("eager"),
        Contender("inductor", plain=True),
        Contender("dllm-cache", FEATURES),
        Contender("fast-dllm prefix", {**blocks, "cache": "prefix"}),
        Contender("fast-dllm dual", {**blocks, "cache": "dual"}),
        Contender("sparse-dllm", {**blocks, "method": "sparse-dllm"}),
        Contender("dyllm", {"method": "dyllm", "shift": False}),
        Contender("threshold, eager", settings=parallel),
        Contender("dual + threshold", {**blocks, "cache": "dual"}, settings=parallel),
        Contender("sparse + threshold", {**blocks, "method": "sparse-dllm"}, settings=parallel),
        Contender("dyllm + threshold", {"method": "dyllm"}, settings=parallel),
        Contender("es-dllm + threshold", {"method": "es-dllm"}, settings=parallel),
        fastest(),
    ]


def fastest() -> Contender:
    """The preset, in blocks of its own."""
    return Contender("fastest", {"preset": "fastest"}, settings={"block_length": PRESETS["fastest"]["block_length"]})


def jobs_of(problems: list[tiny.Problem], tokenizer: Any, mask_id: int, batch: int, block: int) -> list[Job]:
    """Batches of problems, each prompt followed by a masked response."""
    out = []
    for i in range(0, len(problems), batch):
        prompts = tiny.encode(problems[i : i + batch], tokenizer)
        masks = torch.full((len(prompts), tiny.RESPONSE_LENGTH), mask_id)
        out.append(Job(torch.cat([prompts, masks], 1), tiny.PROMPT_LENGTH, tiny.RESPONSE_LENGTH, block, mask_id))
    return out


def score(
    row: Row, results: list[torch.Tensor], problems: list[tiny.Problem], tokenizer: Any, finished: bool = True
) -> None:
    """Accuracy of a row, over all problems, and tokens of the batches that were timed; the filler behind an answer does
    not count as tokens. Where generations were not finished, as few forwards were asked for, there is no accuracy, and
    tokens count by the share that is written.
    """
    responses = [ids[:, tiny.PROMPT_LENGTH :] for ids in results]
    timed = responses[-len(row.jobs) :]
    row.tokens = sum(problem.tokens for problem in problems[-sum(map(len, timed)) :])
    if not finished:
        written = [ids != tokenizer.mask_token_id for ids in timed]
        row.tokens *= sum(int(at.sum()) for at in written) / sum(at.numel() for at in written)
        return
    texts = [text for ids in responses for text in tiny.decode(ids, tokenizer)]
    row.right = [tiny.is_exact(problem, text) for problem, text in zip(problems, texts, strict=True)]
    row.accuracy = sum(row.right) / len(row.right)


def agreement(results: list[torch.Tensor], reference: list[torch.Tensor], mask_id: int) -> float:
    """The share of response tokens, of those that were written, that are as in the reference."""
    written = [ids[:, tiny.PROMPT_LENGTH :] != mask_id for ids in results]
    same = [(a == b)[:, tiny.PROMPT_LENGTH :] & at for a, b, at in zip(results, reference, written, strict=True)]
    return sum(int(each.sum()) for each in same) / sum(int(at.sum()) for at in written)


def run(
    count: int,
    batch: int,
    block: int,
    show: Any = None,
    entrants: list[Contender] | None = None,
    few: int | None = None,
) -> list[Row]:
    """Solve ``count`` held-out problems with each contender. Of several batches the first is not timed: it compiles.

    Args:
        count: problems, a multiple of ``batch``.
        batch: problems solved together.
        block: block length of the loop.
        show: makes a context that gives a function to show the first sequence with, by contender name.
        entrants: who takes part; :func:`contenders` by default.
        few: forwards of each batch that plain Inductor is timed for; ``None`` for all.
    """
    model, tokenizer = tiny.load()
    mask_id = model.config.mask_token_id
    problems = tiny.problems(count, HELD_OUT_SEED)
    jobs = jobs_of(problems, tokenizer, mask_id, batch, block)
    rows: list[Row] = []
    reference: list[torch.Tensor] = []
    for contender in entrants or contenders(block):
        with (show or _quiet)(contender.name, tokenizer) as step:
            limit = few if contender.plain else None
            row, results = play(contender, model, jobs, limit, step, compile_first=True)
        score(row, results, problems, tokenizer, limit is None)
        reference = reference or results
        row.same_tokens = agreement(results, reference, mask_id)
        rows.append(row)
    return finish(rows)


@contextmanager
def _quiet(name: str, tokenizer: Any) -> Iterator[Show | None]:
    print(f"{name} ...", file=sys.stderr, flush=True)
    yield None


@contextmanager
def _live(name: str, tokenizer: Any) -> Iterator[Show]:
    """Show the first sequence of the batch while it is denoised."""
    from rich.live import Live
    from rich.text import Text

    with Live(refresh_per_second=20, transient=False) as live:

        def show(x: torch.Tensor) -> None:
            text = tokenizer.decode(x[0, tiny.PROMPT_LENGTH :])
            shown = text.replace(tokenizer.mask_token, "\N{MIDDLE DOT}")
            live.update(
                Text.assemble(
                    (f"{name:<18}", "bold"), tokenizer.decode(x[0, : tiny.PROMPT_LENGTH]), "\n", (shown, "green")
                )
            )

        yield show


def main(argv: list[str]) -> None:
    """Command line."""
    parser = Parser(prog="dllm_compile demo", description=ABOUT)
    for name, value, about in (
        ("--problems", 8, "held-out problems, a multiple of the batch"),
        ("--batch", 4, "problems solved together"),
        ("--block", 32, f"block length, a divisor of {tiny.RESPONSE_LENGTH}"),
    ):
        parser.add_argument(name, type=whole(), default=value, help=f"{about}; {value} by default")
    parser.add_argument("--json", type=target, help="also write the rows to this file")
    given = parser.parse_args(argv)
    if given.problems % given.batch:
        parser.error(f"--problems {given.problems} is not a multiple of --batch {given.batch}")
    if tiny.RESPONSE_LENGTH % given.block:
        parser.error(f"--block {given.block} does not divide the response of {tiny.RESPONSE_LENGTH} tokens")
    require(parser, "demo", "transformers", "safetensors", "rich")
    show = _live if sys.stdout.isatty() else None
    with trusting_cpu():
        rows = run(given.problems, given.batch, given.block, show, few=FEW)
    print_rows(
        f"{given.problems} held-out problems, batch {given.batch}, block {given.block}, dLLM-Cache with "
        f"{FEATURES}, threshold {THRESHOLD}",
        rows,
    )
    if given.json:
        with open(given.json, "w", encoding="utf-8") as file:
            json.dump(
                {
                    "problems": given.problems,
                    "batch": given.batch,
                    "block": given.block,
                    "rows": [asdict(r) for r in rows],
                },
                file,
                indent=1,
            )
