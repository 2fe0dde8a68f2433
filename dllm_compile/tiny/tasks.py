"""Synthetic problems with checkable answers for the embedded model: few tokens of a long prompt matter to each answer.

A prompt is a context of 192 tokens and a template of 64.  The answer fills the template in, so that answer token ``i``
always sits 64 tokens behind template token ``i``.  The context is 32 records in four groups among words that mean
nothing.  A record is a key and a digit from 0 to 3 in one token, ``ba2``; no two records of a prompt have the same key.
Tokens are separated by spaces.

====== ========================== ===================== ==============================================================
task   template                   answer                order
====== ========================== ===================== ==============================================================
lookup keys: ``ke ba ke tou``     their records:        any: each record depends on the prompt alone
                                  ``ke0 ba2 ke0 tou1``
sudoku three 4x4 sudokus with     the sudokus solved    the surest cell first; the records do not matter
       gaps: ``1 _ _ 4 / _ ...``
====== ========================== ===================== ==============================================================
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from itertools import permutations, product

FILLER = "."
GAP, ROW_END, SUDOKU_END = "_", "/", "="
CELLS = "1234"
KEYS = tuple(map("".join, product([*"bcdfghjklmnpqrstvwxyz", "ch", "sh", "th"], [*"aeiou", "ai", "ea", "ou"])))
DIGITS = 4
WORDS = tuple(map("".join, product([*"bdkr"], [*"aeio"], [*"nt"])))  # what no answer needs
VOCABULARY = (
    *(FILLER, GAP, ROW_END, SUDOKU_END, *CELLS),
    *WORDS,
    *KEYS,
    *(f"{key}{digit}" for key in KEYS for digit in range(DIGITS)),
)

RECORDS, GROUPS = 32, 4
CONTEXT_LENGTH = 192
RESPONSE_LENGTH = 64
PROMPT_LENGTH = CONTEXT_LENGTH + RESPONSE_LENGTH
SUDOKUS, SUDOKU_LENGTH = 3, 20
SHOWN = 8, 11
"""Cells of a sudoku that are not gaps: at least, and at most but where these leave several solutions."""


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
    keys = rng.choices([*digit], k=rng.randint(48, RESPONSE_LENGTH))
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


def _sudoku(rng: random.Random, least: int) -> tuple[list[str], list[str]]:
    given, solved = list[str](), list[str]()
    for _ in range(SUDOKUS):
        solution = rng.choice(_solutions())
        order = rng.sample(range(16), 16)
        count = rng.randint(least, SHOWN[1])
        fitting = [other for other in _solutions() if all(other[i] == solution[i] for i in order[:count])]
        while len(fitting) > 1:  # until the cells shown leave one solution
            fitting = [other for other in fitting if other[order[count]] == solution[order[count]]]
            count += 1
        shown = order[:count]
        given += _written("".join(cell if i in shown else GAP for i, cell in enumerate(solution)))
        solved += _written(solution)
    return given, solved


TASKS = "lookup", "sudoku"


def _context(rng: random.Random, records: list[str], groups: int | None) -> list[str]:
    """Words with so many groups of records, of equal length, between them; each record anywhere where it is None."""
    context = rng.choices(WORDS, k=CONTEXT_LENGTH - RECORDS)
    if groups is None:
        context = [*records, *context]
        rng.shuffle(context)
        return context
    size = RECORDS // groups
    places = sorted(rng.sample(range(len(context) + 1), groups))
    for i in reversed(range(groups)):
        context[places[i] : places[i]] = records[i * size : (i + 1) * size]
    return context


def make_problem(
    rng: random.Random, task: str | None = None, shown: int = SHOWN[0], groups: int | None = GROUPS
) -> Problem:
    """Draws one problem.

    Args:
        rng: to draw with.
        task: any of TASKS where None.
        shown: the first of SHOWN.
        groups: of records, a divisor of RECORDS; None to put each record anywhere.
    """
    task = task or rng.choice(TASKS)
    digit = {key: rng.randrange(DIGITS) for key in rng.sample(KEYS, RECORDS)}
    template, answer = _lookup(rng, digit) if task == "lookup" else _sudoku(rng, shown)
    template += [FILLER] * (RESPONSE_LENGTH - len(template))
    context = _context(rng, [f"{key}{digit[key]}" for key in digit], groups)
    return Problem(task, " ".join([*context, *template]), " ".join(answer))


def problems(count: int, seed: int) -> list[Problem]:
    """``count`` problems, the tasks in turn; the same for the same seed."""
    rng = random.Random(seed)
    return [make_problem(rng, TASKS[i % len(TASKS)]) for i in range(count)]


def is_exact(problem: Problem, text: str) -> bool:
    """Whether ``text``, a response with or without its filler at the end, is the answer, token for token."""
    return text.rstrip(f" {FILLER}") == problem.answer
