"""The mechanisms there are: those of the package, and what others register."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from .core.mechanism import Mechanism, Option, RowRule
from .passes import block_cache, decoded_rows, eviction, feature_cache, saliency

OWN = tuple(each.MECHANISM for each in (feature_cache, block_cache, decoded_rows, eviction, saliency))
"""Those of the package."""

REGISTERED: dict[str, Mechanism] = {}
"""What :func:`register` was given, by name."""

METHODS: dict[str, dict[str, Any]] = {"exact": {}}
"""Values of ``method``: each is a choice of mechanisms, with the values of its authors."""

PRESETS: dict[str, dict[str, Any]] = {"exact": {"method": "exact"}}
"""Values of ``preset``."""

RULES: dict[str, RowRule] = {}
"""Values of ``cache``."""


def mechanisms() -> Iterator[Mechanism]:
    """All of them."""
    yield from OWN
    yield from REGISTERED.values()


def options_of_others() -> dict[str, Option]:
    """The options that registered mechanisms add, by name; where they do not say it, their rules alone read them."""
    return {option.name: _read_by_rules(option, each) for each in REGISTERED.values() for option in each.options}


def _read_by_rules(option: Option, mechanism: Mechanism) -> Option:
    rules = [rule.name for rule in mechanism.rules]
    if option.read is not None or not rules:
        return option
    return replace(option, read=lambda options: options.cache in rules, beside=f"cache={rules[0]!r}")


def register(mechanism: Mechanism) -> Mechanism:
    """Make a mechanism one of the package's: its methods, presets, options and rules are valid from here on.

    Args:
        mechanism: what it is; see :class:`dllm_compile.Mechanism`. It takes the place of one that was registered under
            its name.

    Returns:
        ``mechanism``.

    Raises:
        TypeError: it is no mechanism.
        ValueError: a name of it is taken, or a method or preset of it is refused.
    """
    if not isinstance(mechanism, Mechanism):
        raise TypeError(f"what is registered is {mechanism!r}; give a dllm_compile.Mechanism")
    before = REGISTERED.get(mechanism.name)
    unregister(mechanism.name)
    try:
        _check_names(mechanism)
        _add(mechanism)
        REGISTERED[mechanism.name] = mechanism
        _check_values(mechanism)
    except ValueError:
        unregister(mechanism.name)
        if before is not None:
            register(before)
        raise
    return mechanism


def unregister(name: str) -> None:
    """Undo :func:`register`, if there is such a mechanism. What was compiled with it runs on."""
    mechanism = REGISTERED.pop(name, None)
    if mechanism is not None:
        for table, names in ((METHODS, mechanism.methods), (PRESETS, _presets(mechanism)), (RULES, _rules(mechanism))):
            for each in names:
                table.pop(each, None)


def _check_names(mechanism: Mechanism) -> None:
    from .options import all_names
    from .sampler.settings import SETTINGS

    own = [name for option in mechanism.options for name in (option.name, *option.synonyms)]
    given: dict[str, tuple[list[str], Iterable[str]]] = {
        "mechanism": ([mechanism.name], [each.name for each in mechanisms()]),
        "option": (own, [*all_names(), *SETTINGS]),
        "method": (list(mechanism.methods), METHODS),
        "preset": (list(_presets(mechanism)), PRESETS),
        "cache": (list(_rules(mechanism)), RULES),
    }
    for kind, (names, taken) in given.items():
        for name in names:
            if name in taken or names.count(name) > 1:
                raise ValueError(f"there is a {kind} {name!r} already; give the one of {mechanism.name!r} another name")


def _check_values(mechanism: Mechanism) -> None:
    from .options import Options, named

    for values in (*mechanism.methods.values(), *mechanism.presets.values()):
        named(values)
    for name in _presets(mechanism):
        Options.of(preset=name)
    if mechanism.neutral is not None:
        Options.of(mechanism.neutral)


def _presets(mechanism: Mechanism) -> dict[str, dict[str, Any]]:
    """Presets of a mechanism; each method is one."""
    of_methods = {name: {"method": name} for name in mechanism.methods}
    return {**of_methods, **{name: dict(values) for name, values in mechanism.presets.items()}}


def _rules(mechanism: Mechanism) -> dict[str, RowRule]:
    return {rule.name: rule for rule in mechanism.rules}


def _add(mechanism: Mechanism) -> None:
    METHODS.update({name: dict(values) for name, values in mechanism.methods.items()})
    PRESETS.update(_presets(mechanism))
    RULES.update(_rules(mechanism))


for _each in OWN:
    _add(_each)
RULES["none"] = block_cache.RESPONSE_ROWS
