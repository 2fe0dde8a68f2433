"""All mechanisms, those of the package and registered ones, and the tables of names that are made of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from .general_options import GENERAL
from .interface.blocks import FindBlock, Masks
from .interface.mechanism import Mechanism, Option, RowRule, asked
from .interface.plan import Skipping
from .passes import (
    block_cache,
    decoded_rows,
    early_skipping,
    eviction,
    falling_threshold,
    feature_cache,
    flashblock,
    frechet,
    length_cut,
    saliency,
    sliding_block,
    suffix_window,
    vicinity,
)

OWN = tuple(
    each.MECHANISM
    for each in (
        feature_cache,
        block_cache,
        decoded_rows,
        eviction,
        flashblock,
        saliency,
        early_skipping,
        sliding_block,
        vicinity,
        suffix_window,
        falling_threshold,
        frechet,
        length_cut,
    )
)
"""Those of the package."""

SAID = (
    *("block", "widens", "narrows", "reach", "refresh", "present", "visible", "salient", "skips"),
    *("unmask", "candidates", "threshold", "ends"),
)
"""What of a mechanism is asked where one of its switches is on."""


@dataclass(frozen=True, eq=False)
class Tables:
    """All valid names of options, methods, presets and caches. Immutable: registering a mechanism builds a new one.

    Attributes:
        registered: the mechanisms of others, by name.
        options: by name: ``method``, those of the package, then those of others.
        others: the options of others alone.
        synonyms: names of options, by synonym.
        switches: options that turn a mechanism on, in the order of ``options``.
        methods, presets: values of ``method`` and ``preset``, and the options that each stands for.
        rules: values of ``cache``.
        checks: what refuses options beside one another.
        rules_of: by method, the values of ``cache`` that it may have, where its own is a rule of its mechanism.
    """

    registered: dict[str, Mechanism]
    options: dict[str, Option]
    others: dict[str, Option]
    synonyms: dict[str, str]
    switches: tuple[str, ...]
    methods: dict[str, dict[str, Any]]
    presets: dict[str, dict[str, Any]]
    rules: dict[str, RowRule]
    checks: tuple[Callable[[Any], str | None], ...]
    rules_of: dict[str, frozenset[str]]


def _made(registered: dict[str, Mechanism]) -> Tables:
    every = (*OWN, *registered.values())
    own = {each.name: each for each in (_METHOD, *(option for m in OWN for option in m.options), *GENERAL)}
    words = "; ".join(f'``"{rule.name}"`` {rule.meaning}' for m in OWN for rule in m.rules)
    cache = own["cache"]
    own["cache"] = replace(
        cache, values=lambda: tables().rules, meaning=f'{cache.meaning}: {words}; ``"none"`` for none'
    )
    others = {option.name: _read_by_rules(option, m) for m in registered.values() for option in m.options}
    options = {**own, **others}
    switches = {name for m in every for name in m.switches}
    methods: dict[str, dict[str, Any]] = {"exact": {}}
    presets: dict[str, dict[str, Any]] = {"exact": {"method": "exact"}}
    for m in every:
        methods.update({name: dict(values) for name, values in m.methods.items()})
        presets.update({name: {"method": name} for name in m.methods})
        of = {"method": next(iter(m.methods))} if m.methods else {}
        presets.update({name: {**of, **values} for name, values in m.presets.items()})
    return Tables(
        registered,
        options,
        others,
        {other: each.name for each in options.values() for other in each.synonyms},
        tuple(name for name in options if name in switches),
        methods,
        presets,
        {**{rule.name: rule for m in every for rule in m.rules}, "none": block_cache.RESPONSE_ROWS},
        tuple(check for m in every for check in m.checks),
        {
            name: frozenset(rule.name for rule in m.rules)
            for m in registered.values()
            for name, values in m.methods.items()
            if values.get("cache") in {rule.name for rule in m.rules}
        },
    )


def _read_by_rules(option: Option, mechanism: Mechanism) -> Option:
    """Give a registered option without ``read`` the default: it is read if ``cache`` is one of the rules of its
    mechanism.
    """
    rules = [rule.name for rule in mechanism.rules]
    if option.read is not None or not rules or option.name in mechanism.switches:
        return option
    return replace(option, read=lambda options: options.cache in rules, beside=f"cache={rules[0]!r}")


_METHOD = Option(
    "method",
    "exact",
    values=lambda: tables().methods,
    meaning="a choice of mechanisms: "
    + ", ".join(f'``"{name}"`` ({m.source})' for m in OWN for name in m.methods)
    + ', or ``"exact"``, which reuses nothing but what is provably unchanged',
)
_TABLES = _made({})
_LOCK = threading.RLock()
_FORMER: dict[str, RowRule] = {}  # rules that were unregistered while a model may be under way
RENEWED: list[Callable[[], None]] = []  # called when names have changed

METHODS, PRESETS = _TABLES.methods, _TABLES.presets
"""Those of the package."""


def tables() -> Tables:
    """The names that are valid now."""
    return _TABLES


def rule_of(cache: str) -> RowRule:
    """The rule that a value of ``cache`` is.

    Raises:
        ValueError: it is of a mechanism that is not registered in this process.
    """
    rule = _TABLES.rules.get(cache) or _FORMER.get(cache)
    if rule is None:
        raise ValueError(f"cache {cache!r} is of a mechanism that is not registered; register it first")
    return rule


def turned_on(options: Any, part: str | None = None) -> tuple[Mechanism, ...]:
    """The mechanisms that an option switches on: those of the package, then others in the order of registration.

    Args:
        options: what the user chose.
        part: the name of an attribute, such as ``"skips"``: only mechanisms that have it.
    """
    known = _TABLES
    on = {name for name in known.switches if getattr(options, name) != known.options[name].default}
    found = (each for each in (*OWN, *known.registered.values()) if on.intersection(each.switches))
    return tuple(each for each in found if part is None or getattr(each, part) is not None)


def find_block(options: Any) -> FindBlock | None:
    """The function that finds the active block, if a mechanism that is on has one; ``None`` for fixed blocks."""
    says = turned_on(options, "block")
    return _found_by(says[0], options) if says else None


@cache
def _found_by(mechanism: Mechanism, options: Any) -> FindBlock:
    """:func:`find_block` for one mechanism; equal arguments give the same function, since graphs are told apart
    by it.
    """

    def find(masked: torch.Tensor, response: torch.Tensor, length: int | None) -> torch.Tensor:
        assert mechanism.block is not None
        told = Masks(masked, response, length or masked.shape[1], options)
        return asked(f"the mechanism {mechanism.name!r} says the block", mechanism.block, told, masked) & response

    return find


def register(mechanism: Mechanism) -> Mechanism:
    """Make a mechanism one of the package's: its methods, presets, options and rules are valid from here on.

    Args:
        mechanism: what it is; see :class:`dllm_compile.Mechanism`. It takes the place of one that was registered under
            its name.

    Returns:
        ``mechanism``.

    Raises:
        TypeError: it is no mechanism, or holds something that is no option or rule.
        ValueError: one of its names is in use or is not an identifier, or ``Options`` refuses one of its values. The
            registry is then unchanged.
    """
    if not isinstance(mechanism, Mechanism):
        raise TypeError(f"what is registered is {mechanism!r}; give a dllm_compile.Mechanism")
    with _LOCK:
        before = _TABLES
        rest = {name: each for name, each in before.registered.items() if name != mechanism.name}
        try:
            _use(_made(rest))
            _check(mechanism)
            _use(_made({**rest, mechanism.name: mechanism}))
            _check_values(mechanism)
        except BaseException:
            _use(before)
            raise
        for renew in RENEWED:
            renew()
    return mechanism


def unregister(name: str) -> None:
    """Undo :func:`register`, if there is such a mechanism. Models that were compiled with it run on."""
    with _LOCK:
        gone = _TABLES.registered.get(name)
        if gone is not None:
            _FORMER.update({rule.name: rule for rule in gone.rules})
            _use(_made({other: each for other, each in _TABLES.registered.items() if other != name}))
            for renew in RENEWED:
                renew()


def _use(new: Tables) -> None:
    global _TABLES
    _TABLES = new


def _check(mechanism: Mechanism) -> None:
    """Refuse a mechanism whose names are taken or cannot be written, or whose parts do not fit each other."""
    from .options import Options, reserved

    for kind, values in ((Option, mechanism.options), (RowRule, mechanism.rules)):
        if not isinstance(values, (tuple, list)):
            raise TypeError(f"{mechanism.name!r} has a {type(values).__name__}; give a tuple of {kind.__name__}s")
        for value in values:
            if not isinstance(value, kind):
                raise TypeError(f"{mechanism.name!r} has {value!r} among its {kind.__name__}s; give a {kind.__name__}")
    own = [name for option in mechanism.options for name in (option.name, *option.synonyms)]
    for name in own:
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"{name!r} cannot be an option of {mechanism.name!r}: it is no identifier of Python")
        if hasattr(Options, name) or name in reserved():
            raise ValueError(f"{name!r} cannot be an option of {mechanism.name!r}: it has a meaning; take another name")
    now = _TABLES
    given: dict[str, tuple[Iterable[str], Iterable[str]]] = {
        "mechanism": ([mechanism.name], [*(each.name for each in OWN), *now.registered]),
        "option": (own, [*now.options, *now.synonyms]),
        "method": (mechanism.methods, now.methods),
        "preset": ([*mechanism.methods, *(p for p in mechanism.presets if p not in mechanism.methods)], now.presets),
        "cache": ([rule.name for rule in mechanism.rules], now.rules),
    }
    for what, (names, taken) in given.items():
        mine = list(names)
        for name in mine:
            if name in taken or mine.count(name) > 1:
                raise ValueError(f"{what} {name!r} is there already; give that of {mechanism.name!r} another name")
    for option in mechanism.options:
        if option.values is None and option.default is not None and not option.fits(option.default):
            raise ValueError(f"the default of {option.name} is {option.default!r}; give {option.wanted}")
        if option.read is not None and not option.beside:
            raise ValueError(f"something reads {option.name} only beside others; say which in `beside`")
    if not isinstance(mechanism.skips, (Skipping, type(None))):
        raise TypeError(f"{mechanism.name!r} skips {mechanism.skips!r}; give a dllm_compile.Skipping")
    if mechanism.salient and len(mechanism.switches) > 1:
        raise ValueError(
            f"{mechanism.name!r} says salient rows, and has several switches; give one, which is its bound"
        )
    if mechanism.block and len(mechanism.switches) > 1:
        raise ValueError(f"{mechanism.name!r} says the block, and has several switches; give one")
    says = any(getattr(mechanism, name) is not None for name in SAID)
    if says and not mechanism.switches:
        raise ValueError(
            f"{mechanism.name!r} says rows, keys or tokens, and nothing switches it on; name an option in `switches`"
        )
    for rule in mechanism.rules:
        if not callable(rule.rows):
            raise TypeError(f"the rows of the rule {rule.name!r} are {rule.rows!r}; give a function of Facts")
    for option in mechanism.options:
        if option.name in mechanism.switches and option.default not in (None, False):
            raise ValueError(
                f"{mechanism.name!r} is switched on by {option.name!r}, whose default is {option.default!r}; give None "
                "or False as its default, which are off, and the usual value in `methods`"
            )
    for name in mechanism.switches:
        if name not in {option.name for option in mechanism.options}:
            raise ValueError(f"{mechanism.name!r} is switched on by {name!r}, which is none of its options")


def _check_values(mechanism: Mechanism) -> None:
    """Refuse methods, presets and a neutral setting that options would refuse."""
    from .options import Options, named

    for values in mechanism.methods.values():
        if not named(values).keys() == set(values) <= {*_TABLES.options} - {"method"}:
            raise ValueError(f"a method of {mechanism.name!r} is {dict(values)}; give options by their own names")
    settings: dict[str, dict[str, Any]] = {
        f"preset {name!r}": {"preset": name} for name in (*mechanism.methods, *mechanism.presets)
    }
    for what, given in {**settings, "neutral setting": dict(mechanism.neutral or {})}.items():
        try:
            Options.of(given)
        except ValueError as error:
            raise ValueError(f"the {what} of {mechanism.name!r}: {error}") from error
