"""Decorators that rename errors: they start with the called function and use its option names.

Every message of the library starts with `normjax`. The decorator of a public function replaces it
by the name of that function, so that inner functions need not know the name.
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
    """Decorates a public function: errors of the library that it raises start with `called`.

    The outermost decorator decides, unless it `runs_model`: errors of a user's model have a name
    already. `names` maps options of inner functions to those of the caller, where they differ.
    Errors of other libraries, or of functions that the user passed, are not changed.
    """
    inner = re.compile(r"normjax\b(?!\.)" if runs_model else r"normjax[\w.]*")

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return function(*args, **kwargs)
            except Exception as error:
                own = isinstance(error, TypeError) and not runs_model
                if own and (foreign := _of_pytorch(function, kwargs)):
                    raise TypeError(f"{called}: got {foreign}") from None
                _rename(error, inner, called, names)
                raise

        return wrapper

    return decorate


def keywords(cls: Class) -> Class:
    """Decorates a Flax module: its constructor rejects arguments of PyTorch with a clear error.

    Fields, signature and type do not change. In linen, LayerNorm(64) would set epsilon=64, so an
    integer is rejected unless the first field is one.
    """
    construct: Any = cls.__init__  # type: ignore[misc]
    known = [field.name for field in fields(cls)]
    first = known[0]
    package = cls.__module__.split(".")[1]
    names: dict[str, Any] = {"feature_axis": "feature_axes"} if "feature_axes" in known else {}

    @named(f"normjax.{package}.{cls.__name__}", **names)
    @wraps(construct)
    def checked(*args: Any, **kwargs: Any) -> None:
        if package == "linen" and first not in WHOLE and len(args) > 1 and type(args[1]) is int:
            got = f"{args[1]} as the first argument, which is {first}"
            raise TypeError(f"normjax: got {got}; {_INFERRED}")
        construct(*args, **kwargs)

    cls.__init__ = checked  # type: ignore[misc]
    return cls


def _of_pytorch(function: Callable[..., Any], given: dict[str, Any]) -> str | None:
    """The first PyTorch argument that the function does not have, and what to do."""
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
        # An option appears as name=value, as name.part, or as "name has".
        options = "|".join(map(re.escape, names))
        pattern = rf"(?<![\w./'])({options})(?==|\.\w| has | is | with | lie )"
        text = re.sub(pattern, lambda match: names[match[1]], text)
    error.args = (outer + text, *error.args[1:])
    if isinstance(error, ImportError):
        # str() of an ImportError shows msg, not args.
        error.msg = outer + text
