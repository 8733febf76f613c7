"""Errors in the words of the caller: what was called, and options as they are named there."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from normjax._checks.keywords import of_pytorch

P = ParamSpec("P")
R = TypeVar("R")


def named(called: str, **names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Errors of the library that leave the function name `called`, not what that calls itself.

    `names` maps options of the functions within to those of the caller, where they differ. An
    error of another library, or of a function that the user passed, is left as it is.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return function(*args, **kwargs)
            except Exception as error:
                if isinstance(error, TypeError):
                    of_pytorch(called, kwargs)
                _rename(error, called, names)
                raise

        return wrapped

    return decorate


def _rename(error: Exception, called: str, names: dict[str, str]) -> None:
    message = error.args[0] if error.args else None
    if not isinstance(message, str) or not (inner := re.match(r"normjax[\w.]*", message)):
        return
    text = message[inner.end() :]
    if names:
        # An option is written as name=value, a part of it as name.part; or "name has".
        options = "|".join(map(re.escape, names))
        pattern = rf"(?<![\w./'])({options})(?==|\.\w| has | is | with | lie )"
        text = re.sub(pattern, lambda match: names[match[1]], text)
    error.args = (called + text, *error.args[1:])
