"""A cache of values for objects of the user, which are dropped with their object."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Hashable
from typing import Any


class Kept:
    """Values made once for each object; none of them keeps its object alive.

    The key is the id of the object. An id may be reused when its object is gone, which a weak
    reference detects.
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
        # Objects without weak references are not cached.
        with contextlib.suppress(TypeError):
            self._held[name] = weakref.ref(owner, lambda _: self._held.pop(name, None)), value
        return value

    def forget(self, owner: Any, key: Hashable) -> None:
        """Drops the value, so that it is made again."""
        self._held.pop((id(owner), key), None)
