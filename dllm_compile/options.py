"""Options: one frozen value, made of what the mechanisms declare. Unknown names and bad values are refused with the
nearest valid one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from .general_options import GENERAL
from .interface.mechanism import Mechanism, nearest, one_of
from .mechanisms import tables, turned_on

DEFAULT = "dllm-cache"
DECLARED = tables().options
"""The options of the package, by name."""

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
        more: names and values of the options of registered mechanisms that are in use.

    Raises:
        ValueError: an unknown name, a value out of range, one thing said twice, two mechanisms that would both decide
            one thing, or an option that nothing reads beside the others.
    """

    if TYPE_CHECKING:  # what ``DECLARED`` says
        method: str
        prompt_interval: int | None
        response_interval: int | None
        transfer_ratio: float | None
        cache: str
        block_length: int | None
        refresh_interval: int | None
        delay: int | None
        window_size: int
        keep_ratio: float | None
        kernel_size: int | None
        keep_outside: bool
        outside_interval: int | None
        saliency_threshold: float | None
        full_steps: int
        response_only: bool
        whole_interval: int
        sliding: str | None
        refresh_tokens: int | None
        rows_before: int | None
        rows_behind: int | None
        warmup_steps: int | None
        row_shares: tuple[float, ...] | None
        row_depths: tuple[float, ...]
        confidence_weight: float
        unskipped_interval: int | None
        suffix_window: int | None
        threshold_fall: float | None
        frechet_delta: float | None
        length_cut: float | None
        mask_id: int | None
        shift: bool | None
        readable: str
        max_state_bytes: int
        verify: int
        cuda_graphs: bool
        lowering: str
        more: tuple[tuple[str, Any], ...]
    else:

        def __getattr__(self, name: str) -> Any:
            """An option of a registered mechanism."""
            for known, value in self.__dict__.get("more", ()):
                if known == name:
                    return value
            if name in tables().others:
                return tables().others[name].default
            raise AttributeError(f"options have no {name!r}")

    def __init__(self, **names: Any) -> None:
        if names.keys() >= DECLARED.keys():  # all of them: a value made from another, as by ``dataclasses.replace``
            given = dict(names)
            given = {**dict(given.pop("more", ())), **given}
            self._set({**{name: option.default for name, option in tables().others.items()}, **named(given)}, {})
        else:
            self._set(*_resolved(None, names))

    def _set(self, values: Mapping[str, Any], written: Mapping[str, Any]) -> None:
        """Take values of all options; ``written`` are those that a user named."""
        known = tables()
        for name in DECLARED:
            object.__setattr__(self, name, values[name])
        object.__setattr__(self, "more", tuple((name, values[name]) for name in known.others))  # all: checks read them
        for name, option in known.options.items():
            value = values[name]
            if option.values is not None:
                one_of(name, value, option.values())
            elif not (option.fits(value) or (value is None and option.default is None)):
                raise ValueError(f"{name} is {value!r}; give {option.wanted}")
        self._check_method(written)
        self._check_pairs(written)
        more = [
            (name, values[name])
            for name, option in known.others.items()
            if values[name] != option.default or (option.read is not None and option.read(self))
        ]
        object.__setattr__(self, "more", tuple(more))

    def _check_method(self, written: Mapping[str, Any]) -> None:
        """Refuse ``exact`` beside what reuses, and a method whose own mechanisms are all off."""
        known = tables()
        for name in known.switches if written.get("method") == "exact" else ():
            value, option = getattr(self, name), known.options[name]
            if value not in (option.default, *option.neutral):
                raise ValueError(
                    f"method is 'exact', which reuses nothing, and {name} is {value!r}; leave out one of them"
                )
        theirs = known.rules_of.get(self.method, frozenset())
        if theirs and self.cache not in theirs:
            raise ValueError(
                f"method is {self.method!r}, whose rows are those of cache={' or '.join(map(repr, sorted(theirs)))}, "
                f"and cache is {self.cache!r}; leave out one of them"
            )
        own = [name for name in known.methods[self.method] if name in known.switches]
        if own and all(getattr(self, name) == known.options[name].default for name in own):
            off = " and ".join(f"{name} is {getattr(self, name)!r}" for name in own)
            raise ValueError(
                f"method is {self.method!r}, but {off}, so that nothing of it is left; "
                f"leave out {' and '.join(own)}, or give another method"
            )

    def _check_pairs(self, written: Mapping[str, Any]) -> None:
        """Refuse what two mechanisms would both decide, and what none reads."""
        known = tables()
        for check in (*known.checks, known.rules[self.cache].refused):
            sentence = check(self) if check is not None else None
            if sentence is not None:
                raise ValueError(sentence)
        self._check_axes()
        for name, option in known.options.items():
            value = getattr(self, name)
            said = value is not None and (name in written or value != option.default)
            if said and not self.reads(name):
                raise ValueError(f"{name} is {value!r}, but no mechanism reads it; give {option.beside} too")
        if self.cache == "none" and self.saliency is None:
            self._check_needs_cache()

    def _check_axes(self) -> None:
        """Refuse what has no place in the steps of the other mechanisms."""
        salient = [name for mechanism in turned_on(self, "salient") for name in mechanism.switches]
        if len(salient) > 1:
            raise ValueError(f"{' and '.join(salient)} each decide which rows are salient; leave out all but one")
        kept = "keep_ratio" if self.keep_ratio is not None else "".join(salient)
        if tables().rules[self.cache].after_layer is not None and kept:
            raise ValueError(
                f"cache {self.cache!r} measures whole layers and recomputes those behind them, and {kept} keeps no "
                "whole layers; leave out one of them"
            )
        if tables().rules[self.cache].after_layer is not None and self.keep_outside:
            raise ValueError(
                f"cache {self.cache!r} measures attention over all keys, and keep_outside reads none outside of a "
                "block; leave out one of them"
            )
        for name, what in _OF_ONE.items():
            deciding = [each.name for each in turned_on(self, name)]
            if len(deciding) > 1:
                raise ValueError(f"{' and '.join(deciding)} each decide {what}; leave out all but one")
        self._check_skipping(bool(salient))

    def _check_needs_cache(self) -> None:
        """Refuse what changes the steps of a cache of blocks where there is none, and does nothing else."""
        for mechanism in turned_on(self):
            for name, what in _OF_A_CACHE.items():
                if mechanism.block is None and getattr(mechanism, name) is not None:
                    raise ValueError(
                        f"the mechanism {mechanism.name!r} {what} a cache of blocks; give cache='dual' too"
                    )

    def _check_skipping(self, salient: bool) -> None:
        """Refuse rows that deeper layers skip where nothing keeps them."""
        skipping = next((each.name for each in turned_on(self, "skips")), None)
        if skipping is None:
            return
        if self.cache == "none" and not salient:
            raise ValueError(
                f"the mechanism {skipping!r} skips rows of a cache of blocks in deeper layers; give cache='dual' too"
            )
        if tables().rules[self.cache].after_layer is not None:
            raise ValueError(
                f"cache {self.cache!r} recomputes the layers behind one, and the mechanism {skipping!r} skips rows "
                "of them; leave out one of them"
            )
        if self.keep_outside:
            raise ValueError(
                f"keep_outside keeps attention of every row of the block, and the mechanism {skipping[0]!r} skips "
                "rows; leave out one of them"
            )

    def reads(self, name: str) -> bool:
        """Whether anything reads an option beside the others, whatever it is set to."""
        read = tables().options[name].read
        return read is None or bool(read(self))

    @property
    def saliency(self) -> Mechanism | None:
        """The mechanism that says which rows are salient, if one is on."""
        return next(iter(turned_on(self, "salient")), None)

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
    """Values of all options (``base`` overridden by ``names``), and the part of ``names`` that the user gave, with
    synonyms replaced by option names.
    """
    known, written = tables(), dict(names)
    preset = written.pop("preset", None)
    chosen: dict[str, Any] = {}
    if preset is not None:
        one_of("preset", preset, known.presets)
        chosen.update(known.presets[preset])
        of = chosen.get("method")
        if of is not None and written.get("method", of) != of:
            raise ValueError(f"preset {preset!r} is of the method {of!r}, not {written['method']!r}; give one of them")
    own_names = named(written)
    chosen.update(own_names)
    if "method" in chosen:
        own_names["method"] = chosen["method"]  # by name, or as a preset
    alone = {*known.switches} - known.methods[DEFAULT].keys()  # one of these without a method: that mechanism alone
    method = chosen.get("method")
    if method is None and "method" not in chosen and base is None and not alone & chosen.keys():
        method = DEFAULT
    if method is not None:
        one_of("method", method, known.methods)
        given = {name for name, value in chosen.items() if value != known.options[name].default}
        own = {
            n: value for n, value in known.methods[method].items() if not given.intersection(known.options[n].yields)
        }
        off = {name: option.default for name, option in known.options.items() if name not in _GENERAL}
        chosen = {**off, "method": method, **own, **chosen}
    before = {name: option.default if base is None else getattr(base, name) for name, option in known.options.items()}
    return {**before, **chosen}, own_names


def named(written: Mapping[str, Any]) -> dict[str, Any]:
    """What a user wrote, under the names of options.

    Raises:
        ValueError: an unknown name, or one thing said twice.
    """
    known, found = tables(), dict[str, Any]()
    for name, value in written.items():
        meant = known.synonyms.get(name, name)
        if meant not in known.options:
            near, valid = nearest(name, all_names()), ", ".join((*known.options, "preset"))
            raise ValueError(f"there is no option {name!r}; did you mean {near!r}? Options: {valid}")
        if meant in found:
            raise ValueError(f"option {meant!r} is given twice, once as {name!r}; give it once")
        found[meant] = value
    return found


def all_names() -> list[str]:
    """Every name that ``options={...}`` may have."""
    return [*tables().options, *tables().synonyms, "preset"]


def reserved() -> set[str]:
    """Names that no registered option may have: they mean something to :class:`Options` or :func:`generate`."""
    from .generate import PLAIN
    from .sampler.settings import SETTINGS, SYNONYMS

    return {"preset", "more", *SETTINGS, *SYNONYMS, *PLAIN.parameters}


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


_OF_ONE = {"skips": "which rows go on", "unmask": "which tokens are written", "block": "where the block is"}
"""Functions that one mechanism at most may have among those that are on, and what they decide."""
_OF_A_CACHE = {
    **{"narrows": "narrows the rows of", "widens": "widens the rows of", "refresh": "refreshes"},
    "present": "leaves out rows of",
}
"""Functions of mechanisms that are asked only where ``cache`` or saliency chooses rows, and what they do."""
_GENERAL = {"method", *(each.name for each in GENERAL)}
