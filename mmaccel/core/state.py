"""State: what several parties remember in one place, each under a class of its own."""

from __future__ import annotations

import copy
from typing import Any, Self, TypeVar

__all__ = ["State"]

T = TypeVar("T")


class State:
    """Objects by class, made on first use."""

    def __init__(self) -> None:
        self._state: dict[type, Any] = {}

    def get(self, kind: type[T]) -> T:
        """The state object of class `kind`, made on first use."""
        state = self._state.get(kind)
        if state is None:
            state = self._state[kind] = kind()
        return state

    def copy(self) -> Self:
        """The same objects once more, one level deep: what they refer to is shared."""
        twin = type(self)()
        twin._state = {kind: copy.copy(state) for kind, state in self._state.items()}
        return twin
