"""Options: one frozen value, made of what the mechanisms declare. Unknown names and bad values are refused with the
nearest valid one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from .core.mechanism import Option, count, flag, is_int, nearest, one_of
from .mechanisms import METHODS, OWN, PRESETS, RULES, mechanisms, options_of_others

DEFAULT = "dllm-cache"
LOWERINGS = ("inductor", "eager")
READABLE = ("masked", "all")

_GENERAL = (
    Option(
        "mask_id",
        None,
        lambda v: is_int(v) and v >= 0,
        "the token id of the mask, such as 126336 for LLaDA",
        "token id of the mask; by default the id that ends the first call",
    ),
    Option(
        "shift",
        None,
        lambda v: isinstance(v, bool),
        "True for samplers that read row i - 1 for token i, else False",
        "whether the sampler reads row ``i - 1`` for token ``i``, as Dream's does. ``None`` serves both kinds of "
        "samplers; ``True`` also counts the row before the response as part of it; ``False`` skips the rows before",
    ),
    Option(
        "readable",
        "masked",
        lambda v: v in READABLE,
        " or ".join(READABLE),
        'rows whose logits are current: ``"masked"``, the masked ones and, unless ``shift`` is ``False``, the row '
        'before each; or ``"all"`` that a step computes, for samplers that read those of tokens they have filled',
    ),
    Option(
        "max_state_bytes",
        2**31,
        **count("2**31", 0),
        meaning="bytes that the sequences under way in a model may keep together; beyond them those used longest ago "
        "are dropped and begin anew at their next call. The one that is called always has its rows",
    ),
    Option(
        "verify",
        0,
        lambda v: is_int(v) and v >= 0,
        "a number of steps between checks, or 0 for none",
        "every so many steps the graph also runs without the method, in eager, and ``stats`` reports the difference; 0 "
        "never",
    ),
    Option(
        "cuda_graphs",
        False,
        **flag(),
        meaning="whether partial steps of a model that is one graph are recorded as CUDA graphs, where it is on CUDA; "
        '``mode="reduce-overhead"`` sets it. Rows that differ in number are then padded to multiples of 32',
    ),
    Option(
        "lowering",
        "inductor",
        lambda v: v in LOWERINGS,
        " or ".join(LOWERINGS),
        '``"inductor"``, or ``"eager"``, which runs the rewritten graphs uncompiled',
    ),
)
_METHOD = Option(
    "method",
    "exact",
    lambda v: v in METHODS,
    "a method",
    'the preset; ``"exact"`` reuses nothing but what is provably unchanged',
)
DECLARED = {each.name: each for each in (_METHOD, *(o for mechanism in OWN for o in mechanism.options), *_GENERAL)}
"""The options of the package, by name."""

SYNONYMS = {other: each.name for each in DECLARED.values() for other in each.synonyms}

_T = TypeVar("_T")


def _with_declared_fields(cls: type[_T]) -> type[_T]:
    """Give a class the declared options as fields, and what they mean as its documentation."""
    cls.__annotations__ = dict.fromkeys(DECLARED, "Any") | {"more": "Any"}
    for name, option in DECLARED.items():
        setattr(cls, name, option.default)
    cls.more = ()  # type: ignore[attr-defined]
    lines = [f"        {name}: {option.meaning}." for name, option in DECLARED.items()]
    cls.__doc__ = (cls.__doc__ or "").replace("        ATTRIBUTES", "\n".join(lines))
    return cls


@dataclass(frozen=True, init=False)
@_with_declared_fields
class Options:
    """Everything ``torch.compile(model, backend="dllm", options=...)`` understands.

    ``Options(method="dyllm", mask_id=3)`` is what the mapping ``{"method": "dyllm", "mask_id": 3}`` is: synonyms and
    ``preset`` are names too, a method brings the values of its authors, and with nothing named it is dLLM-Cache. Either
    can be given as ``options``. torch hands a mapping to the backend at the first call of the model, and a mistake in
    it is told there; ``Options(...)`` tells it where it is written.

    Mechanisms are independent; where one is ``None`` (or ``cache="none"``) it is off, and a method is a preset of them.
    Options of registered mechanisms are attributes, too.

    Attributes:
        ATTRIBUTES
        more: names and values of options that registered mechanisms declare, where they are not the default.

    Raises:
        ValueError: an unknown name, a value out of range, one thing said twice, two mechanisms that would both decide
            one thing, or an option that nothing reads beside the others.
    """

    def __getattr__(self, name: str) -> Any:
        """An option of a registered mechanism."""
        values, others = dict(self.__dict__.get("more", ())), options_of_others()
        if name in values:
            return values[name]
        if name in others:
            return others[name].default
        raise AttributeError(f"options have no {name!r}")

    def __init__(self, **names: Any) -> None:
        if names.keys() == {*NAMES, "more"}:  # all of them: a value made from another, as by ``dataclasses.replace``
            self._set(names, {})
        else:
            self._set(*_resolved(None, names))

    def _set(self, values: Mapping[str, Any], written: Mapping[str, Any]) -> None:
        """Take values of all fields; ``written`` are those that a user named."""
        for name in (*NAMES, "more"):
            object.__setattr__(self, name, values[name])
        for name, valid in (("method", METHODS), ("lowering", LOWERINGS), ("cache", RULES), ("readable", READABLE)):
            one_of(name, values[name], valid)
        for name, option in _all_options().items():
            value = getattr(self, name)
            if not (option.fits(value) or (value is None and option.default is None)):
                raise ValueError(f"{name} is {value!r}; give {option.wanted}")
        self._check_method(written)
        self._check_pairs(written)

    def _check_method(self, written: Mapping[str, Any]) -> None:
        """Refuse ``exact`` beside what reuses, and a method whose own mechanisms are all off."""
        options, switches = _all_options(), _switches()
        for name in switches if written.get("method") == "exact" else ():
            value, option = getattr(self, name), options[name]
            if value not in (option.default, *option.neutral):
                raise ValueError(
                    f"method is 'exact', which reuses nothing, and {name} is {value!r}; leave out one of them"
                )
        own = [name for name in METHODS[self.method] if name in switches]
        if own and all(getattr(self, name) == options[name].default for name in own):
            off = " and ".join(f"{name} is {getattr(self, name)!r}" for name in own)
            raise ValueError(
                f"method is {self.method!r}, but {off}, so that nothing of it is left; "
                f"leave out {' and '.join(own)}, or give another method"
            )

    def _check_pairs(self, written: Mapping[str, Any]) -> None:
        """Refuse what two mechanisms would both decide, and what none reads."""
        checks = [each for mechanism in mechanisms() for each in mechanism.checks]
        for check in (*checks, RULES[self.cache].refused):
            sentence = check(self) if check is not None else None
            if sentence is not None:
                raise ValueError(sentence)
        for name, option in _all_options().items():
            value = getattr(self, name)
            said = value is not None and (name in written or value != option.default)
            if said and not self.reads(name):
                raise ValueError(f"{name} is {value!r}, but no mechanism reads it; give {option.beside} too")

    def reads(self, name: str) -> bool:
        """Whether anything reads an option beside the others, whatever it is set to."""
        read = _all_options()[name].read
        return read is None or read(self)

    @property
    def full_steps_of_a_block(self) -> int:
        """Full steps that a block begins with."""
        return 1 + (self.delay if self.delay is not None else int(self.keep_ratio is not None))

    @property
    def share(self) -> float:
        """``transfer_ratio``, or what it is by default."""
        return 0.25 if self.transfer_ratio is None else float(self.transfer_ratio)

    @classmethod
    def of(cls, given: Options | Mapping[str, Any] | None = None, /, **more: Any) -> Options:
        """Options from what a user wrote.

        Args:
            given: options already made, or a mapping of names (synonyms and ``preset`` allowed) to values.
            more: further names.

        Raises:
            TypeError: ``given`` is neither.
            ValueError: an unknown name, a value out of range, or one thing said twice.
        """
        if given is not None and not isinstance(given, (Options, Mapping)):
            raise TypeError(f"options are {given!r}; give a mapping of names to values, or dllm_compile.Options(...)")
        base = given if isinstance(given, Options) else None
        for name in more.keys() & (given.keys() if isinstance(given, Mapping) else ()):
            raise ValueError(f"option {name!r} is given twice; give it once")
        if base is not None and not more:
            return base
        made = cls.__new__(cls)
        made._set(*_resolved(base, {**(given if isinstance(given, Mapping) else {}), **more}))
        return made


def _resolved(base: Options | None, names: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values of all fields from what a user wrote beside ``base``, and what was written under the names of fields."""
    written = dict(names)
    preset = written.pop("preset", None)
    chosen: dict[str, Any] = {}
    if preset is not None:
        one_of("preset", preset, PRESETS)
        chosen.update(PRESETS[preset])
        of = chosen.get("method", DEFAULT)
        if written.get("method", of) != of:
            raise ValueError(f"preset {preset!r} is of the method {of!r}, not {written['method']!r}; give one of them")
    own_names = named(written)
    chosen.update(own_names)
    if "method" in chosen:
        own_names["method"] = chosen["method"]  # by name, or as a preset
    options = _all_options()
    alone = _switches() - METHODS[DEFAULT].keys()  # one of these named without a method: that mechanism alone
    method = chosen.get("method")
    if method is None and "method" not in chosen and base is None and not alone & chosen.keys():
        method = DEFAULT
    if method is not None:
        one_of("method", method, METHODS)
        given = {name for name, value in chosen.items() if value != options[name].default}
        own = {name: value for name, value in METHODS[method].items() if not given.intersection(options[name].yields)}
        off = {name: option.default for name, option in options.items() if name not in _GENERAL_NAMES}
        chosen = {**off, "method": method, **own, **chosen}
    values = {name: getattr(base, name) if base is not None else option.default for name, option in options.items()}
    values |= chosen
    others = options_of_others()
    more = tuple(sorted((name, values.pop(name)) for name in others))
    values["more"] = tuple((name, value) for name, value in more if value != others[name].default)
    return values, own_names


def named(written: Mapping[str, Any]) -> dict[str, Any]:
    """What a user wrote, under the names of options.

    Raises:
        ValueError: an unknown name, or one thing said twice.
    """
    found: dict[str, Any] = {}
    options, synonyms = _all_options(), all_synonyms()
    for name, value in written.items():
        meant = synonyms.get(name, name)
        if meant not in options:
            near = nearest(name, [*options, *synonyms, "preset"])
            raise ValueError(
                f"there is no option {name!r}; did you mean {near!r}? Options: {', '.join(options)}, preset"
            )
        if meant in found:
            raise ValueError(f"option {meant!r} is given twice, once as {name!r}; give it once")
        found[meant] = value
    return found


def _all_options() -> dict[str, Option]:
    """The options there are, those of registered mechanisms last."""
    return {**DECLARED, **options_of_others()}


def all_synonyms() -> dict[str, str]:
    """What else the options are called, also those of registered mechanisms."""
    return {**SYNONYMS, **{other: each.name for each in options_of_others().values() for other in each.synonyms}}


def all_names() -> list[str]:
    """Every name that ``options={...}`` may have."""
    return [*_all_options(), *all_synonyms(), "preset"]


def _switches() -> set[str]:
    return {name for mechanism in mechanisms() for name in mechanism.switches}


def check_vocabulary(mask_id: int | None, vocabulary: int | None) -> None:
    """Refuse a mask past the ids that a model embeds, ``vocabulary`` of them; ``None`` where either is not known.

    Raises:
        ValueError: it is past them.
    """
    if mask_id is not None and vocabulary is not None and mask_id >= vocabulary:
        raise ValueError(
            f"mask_id is {mask_id}, but the model embeds {vocabulary} tokens, 0 to {vocabulary - 1}; "
            "give the token id of its mask"
        )


_GENERAL_NAMES = {"method", *(each.name for each in _GENERAL)}
NAMES = tuple(each.name for each in fields(Options) if each.name != "more")
"""The options of the package."""
