"""Method: the base of everything that mmaccel does to a model; the registry and the spec strings that name methods."""

from __future__ import annotations

import dataclasses
import enum
import functools
import importlib
import importlib.metadata
import pkgutil
import types
import typing
import warnings
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self

from mmaccel.errors import MethodError

if TYPE_CHECKING:
    from mmaccel.install import Installer
    from mmaccel.targets import Target

__all__ = ["Info", "Method", "Stage", "Touch", "find", "knob", "parse", "registry"]

_PACKAGES = ("codecs", "encoders", "llm", "decoding", "diffusion")
_ENTRY_POINTS = "mmaccel.methods"


class Stage(enum.IntEnum):
    """Where in the pipeline a method works; methods of a stack run in this order."""

    INPUT = 0
    ENCODER = 1
    BEFORE_LLM = 2
    LLM = 3
    DECODING = 4
    DIFFUSION = 5


@dataclass(frozen=True)
class Info:
    """What a method is, apart from its knobs.

    name: spec name. verb: drop, merge, reuse or guess. needs: what a target must offer, such as "vision attention",
    or a call: "codec signals" (`mmaccel.codecs.using_signals`).
    slots: places that one method at a time can fill; two methods that share one exclude each other. source: title
    and year of the paper, or where the method comes from. licence: that of the authors' public code, if any.
    """

    name: str
    verb: str
    stage: Stage
    summary: str
    source: str
    year: int
    targets: tuple[str, ...]
    slots: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    lossless: bool = False
    trained: bool = False
    licence: str = ""
    baseline: bool = False


@dataclass(frozen=True)
class Touch:
    """One module or method of the target that a method will put a hook or wrapper on, and why."""

    where: str
    why: str


def knob(
    default: Any,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: tuple[Any, ...] | None = None,
) -> Any:
    """A dataclass field with its meaning and range: low <= value <= high, value > above, or value in `choices`."""
    return field(default=default, metadata={"doc": doc, "low": low, "high": high, "above": above, "choices": choices})


@dataclass(frozen=True)
class Method:
    """Base class of all methods: a frozen dataclass whose fields are the knobs.

    Subclasses set `info` and implement `install`. Knobs are checked when an instance is made.

    Raises:
        MethodError: a knob has the wrong type or lies outside of its range.
    """

    info: ClassVar[Info]
    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    streams: ClassVar[bool] = False  # whether a video may come to it frame by frame (`mmaccel.stream`)

    def __post_init__(self) -> None:
        hints = _hints(type(self))
        for entry in fields(self):
            value = getattr(self, entry.name)
            if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
                object.__setattr__(self, entry.name, value.item())
            _check(self.info.name, entry, hints[entry.name], getattr(self, entry.name))

    @classmethod
    def preset(cls, name: str, **knobs: Any) -> Self:
        """The method with the values that `presets` has under a name; `knobs` replace some of them.

        Raises:
            MethodError: no preset has this name.
        """
        if name not in cls.presets:
            known = ", ".join(map(repr, cls.presets)) or "none"
            raise MethodError(f"{cls.info.name} has no preset {name!r}; it has {known}.")
        values = {key: value for key, value in cls.presets[name].items() if key != "source"}
        return cls(**{**values, **knobs})

    @property
    def neutral(self) -> bool:
        """Whether the knobs switch the method off, so that the model is the unmodified one bit for bit."""
        return getattr(self, "keep", None) == 1.0 and isinstance(getattr(self, "keep", None), float)

    @property
    def spec(self) -> str:
        """The spec string that makes this instance again: name, and the knobs that differ from their defaults."""
        changed = [
            f"{entry.name}={getattr(self, entry.name)}"
            for entry in fields(self)
            if entry.default is MISSING or getattr(self, entry.name) != entry.default
        ]
        return self.info.name + (":" + ";".join(changed) if changed else "")

    @property
    def slots(self) -> tuple[str, ...]:
        """The exclusive places that this instance fills."""
        return self.info.slots

    @property
    def needs(self) -> tuple[str, ...]:
        """What this instance needs of a target, of the things in `info.needs`."""
        return self.info.needs

    def plan(self, target: Target) -> list[Touch]:
        """Every module that `install` will touch. Touches nothing.

        Raises:
            NotApplicableError: the method does not fit this target.
        """
        raise NotImplementedError

    def install(self, installer: Installer) -> None:
        """Put the method on the installer's target."""
        raise NotImplementedError


def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _allowed(hint: Any) -> tuple[type, ...]:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return tuple(t for part in typing.get_args(hint) for t in _allowed(part))
    if typing.get_origin(hint) is typing.Literal:
        return tuple({type(value) for value in typing.get_args(hint)})
    origin = typing.get_origin(hint)
    return (origin or hint,)


def _check(method: str, entry: dataclasses.Field[Any], hint: Any, value: Any) -> None:
    allowed = _allowed(hint)
    numeric_ok = float in allowed and isinstance(value, int) and not isinstance(value, bool)
    if not (type(value) in allowed or numeric_ok or (value is None and type(None) in allowed)):
        names = " or ".join(sorted(t.__name__ for t in allowed))
        raise MethodError(f"{method}: {entry.name} must be {names}, not {value!r}.")
    meta = entry.metadata
    if entry.name == "keep" and value is not None:
        if isinstance(value, int) and value < 1:
            raise MethodError(
                f"{method}: keep={value} keeps nothing; give a count of at least 1 or a fraction in (0, 1]."
            )
        if isinstance(value, float) and not 0.0 < value <= 1.0:
            raise MethodError(
                f"{method}: keep={value} is outside (0, 1]; give a fraction in (0, 1] or a whole number of tokens."
            )
    choices = meta.get("choices")
    if choices is not None and value not in choices:
        raise MethodError(f"{method}: {entry.name}={value!r} is none of {', '.join(map(repr, choices))}.")
    if value is None or isinstance(value, (str, bool)):
        return
    low, high, above = meta.get("low"), meta.get("high"), meta.get("above")
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        raise MethodError(f"{method}: {entry.name}={value} is outside {_range(low, high)}.")
    if above is not None and not value > above:
        raise MethodError(f"{method}: {entry.name}={value} must be greater than {above}.")


def _range(low: float | None, high: float | None) -> str:
    if low is None:
        return f"<= {high}"
    return f">= {low}" if high is None else f"{low} .. {high}"


@functools.cache
def registry() -> dict[str, type[Method]]:
    """All methods by spec name: those in the stage packages, and those that installed packages offer.

    A third party adds a method by an entry point in the group "mmaccel.methods".

    Raises:
        MethodError: two methods have the same name, or an entry point is no method.
    """
    found: dict[str, type[Method]] = {}
    for package in _PACKAGES:
        module = importlib.import_module(f"mmaccel.{package}")
        for entry in pkgutil.iter_modules(module.__path__):
            inside = importlib.import_module(f"mmaccel.{package}.{entry.name}")
            for cls in vars(inside).values():
                if _is_method(cls) and cls.__module__ == inside.__name__:
                    _add(found, cls)
    for entry_point in importlib.metadata.entry_points(group=_ENTRY_POINTS):
        try:
            cls = entry_point.load()
        except Exception as error:  # whatever the other package stumbles over must not take our own methods away
            owner = entry_point.dist.name if entry_point.dist is not None else "an installed package"
            warnings.warn(
                f"the method {entry_point.name!r} of {owner} ({entry_point.value}) cannot be loaded and is left out: "
                f"{type(error).__name__}: {error}",
                stacklevel=2,
            )
            continue
        if not _is_method(cls):
            raise MethodError(f"entry point {entry_point.name!r} ({entry_point.value}) is not a Method with an info.")
        _add(found, cls)
    return dict(sorted(found.items(), key=lambda item: (item[1].info.stage, item[1].info.baseline, item[0])))


def _is_method(cls: Any) -> bool:
    return isinstance(cls, type) and issubclass(cls, Method) and "info" in vars(cls)


def _add(found: dict[str, type[Method]], cls: type[Method]) -> None:
    other = found.get(cls.info.name)
    if other is not None and other is not cls:
        raise MethodError(f"two methods are called {cls.info.name!r}: {other.__module__} and {cls.__module__}.")
    found[cls.info.name] = cls


def find(name: str) -> type[Method]:
    """The method class of a spec name.

    Raises:
        MethodError: there is none; the message names the nearest.
    """
    known = registry()
    if name in known:
        return known[name]
    import difflib

    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}."
    raise MethodError(f"no method is called {name!r}; {hint}")


def parse(spec: str) -> list[Method]:
    """The methods of a spec string: `name:knob=value;knob=value`, several joined by `+`.

    Raises:
        MethodError: the string is malformed, or names an unknown method or knob, or a value out of range.
    """
    return [_parse_one(part.strip()) for part in spec.split("+")]


def _parse_one(spec: str) -> Method:
    name, _, rest = spec.partition(":")
    if not name:
        raise MethodError(f"{spec!r} names no method; write name:knob=value;knob=value.")
    cls = find(name.strip())
    known = {entry.name: entry for entry in fields(cls)}
    values: dict[str, Any] = {}
    for pair in filter(None, (p.strip() for p in rest.split(";"))):
        key, equals, text = pair.partition("=")
        key = key.strip()
        if not equals:
            raise MethodError(f"{cls.info.name}: {pair!r} is not knob=value.")
        if key not in known:
            raise MethodError(f"{cls.info.name} has no knob {key!r}; its knobs are {', '.join(known) or 'none'}.")
        if key in values:
            raise MethodError(f"{cls.info.name}: knob {key!r} is given twice.")
        values[key] = _value(text.strip())
    missing = [n for n, entry in known.items() if entry.default is MISSING and n not in values]
    if missing:
        raise MethodError(f"{cls.info.name} needs {', '.join(missing)}.")
    return cls(**values)


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    if text[:1] == "(" and text[-1:] == ")":
        return tuple(_value(part.strip()) for part in text[1:-1].split(",") if part.strip())
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
