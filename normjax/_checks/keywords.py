"""Errors of arguments as PyTorch has them: what they are called here, and that sizes are not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from typing import Any, TypeVar

Class = TypeVar("Class", bound=type)

_INFERRED = "no features needed: their shape is inferred from the input. Leave it out."
_REMEDIES = {
    "eps": "it is called epsilon, as in Flax. Pass epsilon=.",
    "num_features": _INFERRED,
    "num_channels": _INFERRED,
    "normalized_shape": _INFERRED,
}


def of_pytorch(called: str, given: dict[str, Any]) -> None:
    """Keyword arguments of PyTorch, which nothing here has."""
    for name, remedy in _REMEDIES.items():
        if name in given:
            got = f"{name}={given[name]!r}, an argument of PyTorch"
            raise TypeError(f"{called}: got {got}; {remedy}") from None


def keywords(called: str) -> Callable[[Class], Class]:
    """Decorates a class: its constructor refuses arguments of PyTorch in a sentence.

    Fields, signature and type are what they were. Flax takes the 64 of LayerNorm(64) for epsilon;
    the first field of most classes is no whole number.
    """

    def decorate(cls: Class) -> Class:
        construct: Any = cls.__init__  # type: ignore[misc]
        first = fields(cls)[0].name

        @wraps(construct)
        def checked(*args: Any, **kwargs: Any) -> None:
            of_pytorch(called, kwargs)
            if first != "num_groups" and len(args) > 1 and type(args[1]) is int:
                got = f"{args[1]} as the first argument, which is {first}"
                raise TypeError(f"{called}: got {got}; {_INFERRED}")
            construct(*args, **kwargs)

        cls.__init__ = checked  # type: ignore[misc]
        return cls

    return decorate
