"""Errors of arguments as PyTorch has them: what they are called here, and that sizes are not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from typing import Any, TypeVar

Door = TypeVar("Door", bound=Callable)

_INFERRED = "no features needed: their shape is inferred from the input. Leave it out."
_REMEDIES = {
    "eps": "it is called epsilon, as in Flax. Pass epsilon=.",
    "num_features": _INFERRED,
    "num_channels": _INFERRED,
    "normalized_shape": _INFERRED,
}


def keywords(called: str) -> Callable[[Door], Door]:
    """Decorates a function, or a class for its constructor, none of which has those of PyTorch.

    Fields, signature and type are what they were; Python's TypeError is said in a sentence. Flax
    takes the 64 of LayerNorm(64) for epsilon; the first field of most classes is no whole number.
    """

    def decorate(door: Any) -> Any:
        is_class = isinstance(door, type)
        function = door.__init__ if is_class else door
        first = fields(door)[0].name if is_class else "num_groups"

        @wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            for name in kwargs:
                if name in _REMEDIES:
                    got = f"{name}={kwargs[name]!r}, an argument of PyTorch"
                    raise TypeError(f"{called}: got {got}; {_REMEDIES[name]}")
            if first != "num_groups" and len(args) > 1 and type(args[1]) is int:
                got = f"{args[1]} as the first argument, which is {first}"
                raise TypeError(f"{called}: got {got}; {_INFERRED}")
            return function(*args, **kwargs)

        if not is_class:
            return checked
        door.__init__ = checked
        return door

    return decorate
