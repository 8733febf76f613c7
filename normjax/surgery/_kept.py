"""What belongs to an object of the user, and is forgotten with it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Hashable
from typing import Any


class Kept:
    """Values made once for each object; none of them keeps its object alive.

    An object is known by its identity, and an id is given to another object once the first is
    gone. A weak reference tells both apart.
    """

    def __init__(self) -> None:
        self._held: dict[Hashable, tuple[weakref.ref, Any]] = {}

    def get(self, owner: Any, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value of `owner` under `key`, made if there is none."""
        name = (id(owner), key)
        held = self._held.get(name)
        if held is not None and held[0]() is owner:
            return held[1]
        value = make()
        # What takes no weak reference has its value made anew each time.
        with contextlib.suppress(TypeError):
            self._held[name] = weakref.ref(owner, lambda _: self._held.pop(name, None)), value
        return value

    def forget(self, owner: Any, key: Hashable) -> None:
        """Makes the value anew the next time."""
        self._held.pop((id(owner), key), None)
