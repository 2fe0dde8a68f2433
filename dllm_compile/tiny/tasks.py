"""Synthetic problems with checkable answers for the embedded model: few tokens of a long prompt matter to each answer.

A prompt is 192 records and a template of 64 tokens.  The answer fills the template in, so that answer token ``i``
always sits 64 tokens behind template token ``i``.  A record is a key and a digit from 0 to 3 in one token, ``ba2``; no
two records of a prompt have the same key.  Tokens are separated by spaces.

====== ========================== ===================== ==============================================================
task   template                   answer                order
====== ========================== ===================== ==============================================================
lookup keys: ``ke ba tou``        their records:        any: each record depends on the prompt alone
                                  ``ke0 ba2 tou1``
sudoku three 4x4 sudokus with     the sudokus solved    the surest cell first; the records do not matter
       gaps: ``1 _ _ 4 / _ ...``
====== ========================== ===================== ==============================================================
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import permutations, product

FILLER = "."
GAP, ROW_END, SUDOKU_END = "_", "/", "="
CELLS = "1234"
KEYS = tuple(map("".join, product([*"bcdfghjklmnpqrstvwxyz", "ch", "sh", "th"], [*"aeiou", "ai", "ea", "ou"])))
DIGITS = 4
VOCABULARY = (
    *(FILLER, GAP, ROW_END, SUDOKU_END, *CELLS),
    *KEYS,
    *(f"{key}{digit}" for key in KEYS for digit in range(DIGITS)),
)

RECORDS = len(KEYS)
RESPONSE_LENGTH = 64
PROMPT_LENGTH = RECORDS + RESPONSE_LENGTH
SUDOKUS, SUDOKU_LENGTH = 3, 20


@dataclass(frozen=True)
class Problem:
    """One problem: ``prompt`` has exactly PROMPT_LENGTH tokens, ``answer`` at most RESPONSE_LENGTH (no filler)."""

    task: str
    prompt: str
    answer: str

    @property
    def tokens(self) -> int:
        """Tokens of the answer, without filler."""
        return len(self.answer.split())


def _lookup(rng: random.Random, digit: dict[str, int]) -> tuple[list[str], list[str]]:
    keys = rng.sample(KEYS, rng.randint(48, RESPONSE_LENGTH))
    return keys, [f"{key}{digit[key]}" for key in keys]


@cache
def _solutions() -> list[str]:
    """All 288 solved 4x4 sudokus, each as 16 digits row by row."""
    rows = list(permutations(CELLS))

    def fits(above: tuple[tuple[str, ...], ...], row: tuple[str, ...]) -> bool:
        if any(other[i] == row[i] for other in above for i in range(4)):
            return False
        return len(above) % 2 == 0 or not ({*row[:2]} & {*above[-1][:2]} or {*row[2:]} & {*above[-1][2:]})

    grids: list[tuple[tuple[str, ...], ...]] = [()]
    for _ in range(4):
        grids = [(*grid, row) for grid in grids for row in rows if fits(grid, row)]
    return ["".join("".join(row) for row in grid) for grid in grids]


def _written(cells: str) -> list[str]:
    """The 16 cells of a sudoku as the prompt and the answer have them."""
    return [*ROW_END.join(cells[i : i + 4] for i in range(0, 16, 4)), SUDOKU_END]


def _sudoku(rng: random.Random, digit: dict[str, int]) -> tuple[list[str], list[str]]:
    given, solved = list[str](), list[str]()
    for _ in range(SUDOKUS):
        solution = rng.choice(_solutions())
        order = rng.sample(range(16), 16)
        count = rng.randint(5, 9)
        while sum(all(other[i] == solution[i] for i in order[:count]) for other in _solutions()) > 1:
            count += 1  # until the cells shown leave one solution
        shown = order[:count]
        given += _written("".join(cell if i in shown else GAP for i, cell in enumerate(solution)))
        solved += _written(solution)
    return given, solved


_MAKERS: dict[str, Callable[[random.Random, dict[str, int]], tuple[list[str], list[str]]]] = {
    "lookup": _lookup,
    "sudoku": _sudoku,
}
TASKS = tuple(_MAKERS)


def make_problem(rng: random.Random, task: str | None = None) -> Problem:
    """Draws one problem of ``task`` (any of TASKS where None)."""
    task = task or rng.choice(TASKS)
    digit = {key: rng.randrange(DIGITS) for key in rng.sample(KEYS, RECORDS)}
    template, answer = _MAKERS[task](rng, digit)
    template += [FILLER] * (RESPONSE_LENGTH - len(template))
    return Problem(task, " ".join([*(f"{key}{digit[key]}" for key in digit), *template]), " ".join(answer))


def problems(count: int, seed: int) -> list[Problem]:
    """``count`` problems, the tasks in turn; the same for the same seed."""
    rng = random.Random(seed)
    return [make_problem(rng, TASKS[i % len(TASKS)]) for i in range(count)]


def is_exact(problem: Problem, text: str) -> bool:
    """Whether ``text``, a response with or without its filler at the end, is the answer, token for token."""
    return text.rstrip(f" {FILLER}") == problem.answer
