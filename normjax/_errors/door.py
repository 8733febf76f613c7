"""Errors in the words of the caller: what was called, and options as they are named there.

Every message of the library starts with `normjax`. The door of a public function puts the name of
what was called in its place, so that no function within needs to know it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
Class = TypeVar("Class", bound=type)

# The first fields of classes of linen that are whole numbers.
WHOLE = ("num_groups", "size")
_INFERRED = "no features needed: their shape is inferred from the input. Leave it out."


def named(
    called: str, *, runs_model: bool = False, **names: str
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """The door of a function: errors of the library that leave it name it `called`.

    The outermost door has the last word, unless it `runs_model`: what a model of the user raises
    is named already. `names` maps options of the functions within to those of the caller, where
    they differ. An error of another library, or of a function that the user passed, is left as it
    is.
    """
    inner = re.compile(r"normjax\b(?!\.)" if runs_model else r"normjax[\w.]*")

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def door(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return function(*args, **kwargs)
            except Exception as error:
                own = isinstance(error, TypeError) and not runs_model
                if own and (foreign := _of_pytorch(function, kwargs)):
                    raise TypeError(f"{called}: got {foreign}") from None
                _rename(error, inner, called, names)
                raise

        return door

    return decorate


def keywords(cls: Class) -> Class:
    """The door of a class of Flax: its constructor refuses arguments of PyTorch in a sentence.

    Fields, signature and type are what they were. In linen, Flax takes the 64 of LayerNorm(64) for
    epsilon; the first field of most classes is no whole number.
    """
    construct: Any = cls.__init__  # type: ignore[misc]
    known = [field.name for field in fields(cls)]
    first = known[0]
    room = cls.__module__.split(".")[1]
    names: dict[str, Any] = {"feature_axis": "feature_axes"} if "feature_axes" in known else {}

    @named(f"normjax.{room}.{cls.__name__}", **names)
    @wraps(construct)
    def checked(*args: Any, **kwargs: Any) -> None:
        if room == "linen" and first not in WHOLE and len(args) > 1 and type(args[1]) is int:
            got = f"{args[1]} as the first argument, which is {first}"
            raise TypeError(f"normjax: got {got}; {_INFERRED}")
        construct(*args, **kwargs)

    cls.__init__ = checked  # type: ignore[misc]
    return cls


def _of_pytorch(function: Callable[..., Any], given: dict[str, Any]) -> str | None:
    """The first argument of PyTorch, which the function does not have, and what to do."""
    known = signature(function).parameters
    features = _INFERRED
    if "num_features" in known:
        features = "it is called num_features. Pass num_features=."
    remedies = {
        "eps": "it is called epsilon, as in Flax. Pass epsilon=.",
        "affine": "scale and bias have a switch each. Pass use_scale= and use_bias=.",
        "elementwise_affine": "scale and bias have a switch each. Pass use_scale= and use_bias=.",
        "num_features": features,
        "num_channels": features,
        "normalized_shape": features,
    }
    for name, remedy in remedies.items():
        if name in given and name not in known:
            return f"{name}={given[name]!r}, an argument of PyTorch; {remedy}"
    return None


def _rename(error: Exception, inner: re.Pattern[str], outer: str, names: dict[str, str]) -> None:
    message = error.args[0] if error.args else None
    if not isinstance(message, str) or not (found := inner.match(message)):
        return
    text = message[found.end() :]
    if names:
        # An option is written as name=value, a part of it as name.part; or "name has".
        options = "|".join(map(re.escape, names))
        pattern = rf"(?<![\w./'])({options})(?==|\.\w| has | is | with | lie )"
        text = re.sub(pattern, lambda match: names[match[1]], text)
    error.args = (outer + text, *error.args[1:])
    if isinstance(error, ImportError):
        # The one class that does not show its arguments.
        error.msg = outer + text
