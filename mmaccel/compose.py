"""Several methods on one target: their order, and which of them exclude each other."""

from __future__ import annotations

from collections.abc import Iterable

from mmaccel.errors import ConflictError, MethodError
from mmaccel.method import Method, parse

__all__ = ["arrange", "check", "normalise"]


def normalise(methods: Iterable[Method | str | Iterable[Method | str]]) -> list[Method]:
    """Instances of all that was given: instances, spec strings, stacks, and lists of these.

    Raises:
        MethodError: something is none of these, or nothing is left.
    """
    found: list[Method] = []
    for entry in methods:
        if isinstance(entry, Method):
            found.append(entry)
        elif isinstance(entry, str):
            found += parse(entry)
        elif isinstance(entry, type) and issubclass(entry, Method):
            raise MethodError(f"{entry.__name__} is a class; give an instance, such as {entry.__name__}(...).")
        elif isinstance(entry, Iterable):
            found += normalise(entry)
        else:
            raise MethodError(f"{entry!r} is no method; give an instance or a spec string such as 'holitom:keep=0.15'.")
    if not found:
        raise MethodError("no method given; see mmaccel list.")
    return found


def arrange(methods: list[Method]) -> list[Method]:
    """The order in which a stack works: by stage, else as given."""
    return sorted(methods, key=lambda method: method.info.stage)


def check(new: list[Method], present: list[Method]) -> None:
    """Refuse what cannot work together.

    Raises:
        ConflictError: a method is there twice, or two fill the same place.
    """
    holders: dict[str, Method] = {slot: method for method in present for slot in method.slots}
    names = {method.info.name for method in present}
    for method in new:
        if method.info.name in names:
            raise ConflictError(f"{method.info.name} is on this model already; remove it first or change its knobs.")
        names.add(method.info.name)
        for slot in method.slots:
            if slot in holders:
                other = holders[slot].info.name
                raise ConflictError(f"{method.info.name} and {other} exclude each other: both work {slot}; use one.")
            holders[slot] = method
