"""Synthetic problems with checkable answers for the embedded model.

A prompt is ``tag key payload... key``, filled on the right of the payload with ``.`` to a fixed length; the answer has
one character per payload character.  Because of the fixed length, answer character ``i`` always sits at the same
distance from payload character ``i`` and directly after answer character ``i - 1`` (or the key, for ``i = 0``).

====== === ======== =========================================== ======================================================
task   tag payload  answer                                      order
====== === ======== =========================================== ======================================================
shift  ``~`` letters  payload letter moved on by the key (mod 26) any: each character depends on the prompt alone
diff   ``-`` digits   digit minus the digit before it (mod 10)    any: each character depends on the prompt alone
sum    ``+`` digits   running sum, from the key (mod 10)          in order: each character needs the one before it
peak   ``^`` letters  running maximum, from the key               mostly in order: a new maximum can be seen early
====== === ======== =========================================== ======================================================
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from string import ascii_lowercase, ascii_uppercase, digits

FILLER = "."
TAGS = {"shift": "~", "diff": "-", "sum": "+", "peak": "^"}
TASKS = tuple(TAGS)
ALPHABET = FILLER + "".join(TAGS.values()) + digits + ascii_lowercase + ascii_uppercase

PROMPT_LENGTH = 96
RESPONSE_LENGTH = 96
SHORTEST_PAYLOAD = 64
LONGEST_PAYLOAD = PROMPT_LENGTH - 3  # the tag and the key twice take the rest of the prompt


@dataclass(frozen=True)
class Problem:
    """One problem: ``prompt`` has exactly PROMPT_LENGTH characters, ``answer`` at most RESPONSE_LENGTH (no filler)."""

    task: str
    prompt: str
    answer: str


# Half of the problems of the first three tasks use small numbers.  Modulo 10 (or 26) a sum of two uniform terms says
# nothing about either, so that training would have to find both at once; with small terms the other is a good guess.


def _shift(rng: random.Random, length: int) -> tuple[str, str, str]:
    # The key is a capital letter, which occurs nowhere else, so that it can be found by its looks.
    key = rng.randrange(26) if rng.random() < 0.5 else rng.randint(1, 3)
    letters = [rng.randrange(26) for _ in range(length)]
    moved = [ascii_lowercase[(letter + key) % 26] for letter in letters]
    return ascii_uppercase[key], "".join(ascii_lowercase[letter] for letter in letters), "".join(moved)


def _digits(rng: random.Random, length: int) -> list[int]:
    top = 9 if rng.random() < 0.5 else rng.randint(1, 3)
    return [rng.randint(0, top) for _ in range(length)]


def _diff(rng: random.Random, length: int) -> tuple[str, str, str]:
    numbers = _digits(rng, length + 1)  # the first is the key
    answer = [(digit - before) % 10 for before, digit in pairwise(numbers)]
    return str(numbers[0]), "".join(map(str, numbers[1:])), "".join(map(str, answer))


def _sum(rng: random.Random, length: int) -> tuple[str, str, str]:
    key, payload = rng.randrange(10), _digits(rng, length)
    totals = [total % 10 for total in accumulate(payload, initial=key)]
    return str(key), "".join(map(str, payload)), "".join(map(str, totals[1:]))


def _peak(rng: random.Random, length: int) -> tuple[str, str, str]:
    # The letters range higher toward the end: the maximum then keeps rising instead of reaching "z" at once.
    payload = [ascii_lowercase[rng.randrange(1 + 26 * (i + 1) // (length + 1))] for i in range(length)]
    key = rng.choice("abc")
    return key, "".join(payload), "".join(accumulate(payload, max, initial=key))[1:]


_MAKERS: dict[str, Callable[[random.Random, int], tuple[str, str, str]]] = {
    "shift": _shift,
    "diff": _diff,
    "sum": _sum,
    "peak": _peak,
}


def make_problem(rng: random.Random, task: str | None = None) -> Problem:
    """Draws one problem of ``task`` (any of TASKS where None) with a payload of 64 to 93 characters."""
    task = task or rng.choice(TASKS)
    key, payload, answer = _MAKERS[task](rng, rng.randint(SHORTEST_PAYLOAD, LONGEST_PAYLOAD))
    return Problem(task, TAGS[task] + key + payload.ljust(LONGEST_PAYLOAD, FILLER) + key, answer)


def problems(count: int, seed: int) -> list[Problem]:
    """``count`` problems, the tasks in turn; the same for the same seed."""
    rng = random.Random(seed)
    return [make_problem(rng, TASKS[i % len(TASKS)]) for i in range(count)]


def is_exact(problem: Problem, text: str) -> bool:
    """Whether ``text``, a response with or without its filler at the end, is the answer, character for character."""
    return text.rstrip(FILLER) == problem.answer
