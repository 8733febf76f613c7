"""Variables of Flax and named arrays of other libraries, matched by a table of rules."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

KEEP = "keep"

# A module of Flax, a module of the other library, and what kind of layer it is.
Rule = tuple[str, str, str]


class Layout(NamedTuple):
    """How an array is laid out in Flax, given the leaf to fill, and back."""

    inward: Callable[[np.ndarray, Any], np.ndarray] = lambda array, _: array
    outward: Callable[[np.ndarray], np.ndarray] = lambda array: array


SAME = Layout()

# For each (collection, name) of a Flax layer the other library's name and layout.
Kind = Mapping[tuple[str, str], tuple[str, Layout]]


class Dialect(NamedTuple):
    """How another library names what its layers hold.

    Attributes:
        kinds: the layers that it has.
        separator: between the module and the name of an array.
        optional: names that may be there without a place in Flax.
    """

    kinds: Mapping[str, Kind]
    separator: str
    optional: tuple[str, ...] = ()


class Place(NamedTuple):
    """Where a leaf of the variables is found in the other library; without a name it stays."""

    leaf: Any
    path: str
    name: str | None = None
    layout: Layout = SAME


def take_in(
    called: str, dialect: Dialect, variables: Any, state: Mapping[str, Any], rules: Sequence[Rule]
) -> Any:
    """The variables with the arrays of `state` in their places."""
    places, free = _places(called, dialect, variables, rules)
    given = {name: as_numpy(array) for name, array in state.items()}
    named = [place for place in places if place.name is not None]
    missing = [f"{p.name} (for {p.path})" for p in named if p.name not in given]
    used = {place.name for place in named}
    left = [name for name in given if name not in used and not free(name)]
    arrays = [_laid_out(place, given) for place in places]
    differing = [
        f"{place.name} gives {np.shape(array)} for {place.path} of {place.leaf.shape}"
        for place, array in zip(places, arrays, strict=True)
        if np.shape(array) != place.leaf.shape
    ]
    _complain(
        f"{called}: the state does not fit the variables",
        {"missing in the state": missing, "left over in it": left, "of other shapes": differing},
        "Mend the rules or the fields of the model; a rule of kind 'keep' leaves a module as it "
        "is. Nothing was changed.",
    )
    return jax.tree.unflatten(jax.tree.structure(variables), arrays)


def give_out(
    called: str, dialect: Dialect, variables: Any, rules: Sequence[Rule]
) -> dict[str, np.ndarray]:
    """The arrays of the variables by the names of the other library."""
    places, _ = _places(called, dialect, variables, rules)
    return {
        # A copy in order: files are written from memory without regard to strides, and PyTorch
        # wants memory that it may write to.
        place.name: np.array(place.layout.outward(np.asarray(place.leaf)), order="C")
        for place in places
        if place.name is not None
    }


def _laid_out(place: Place, given: Mapping[str, np.ndarray]) -> Any:
    """The array of a place as Flax has it, or what is there if none is given."""
    if place.name is None or place.name not in given:
        return place.leaf
    array = given[place.name]
    try:
        return place.layout.inward(array, place.leaf)
    except (ValueError, IndexError):  # of another rank, and reported with its shape
        return array


def as_numpy(array: Any) -> np.ndarray:
    """A copy of an array of NumPy, JAX or PyTorch in its own dtype.

    A tensor's memory is not ours: PyTorch goes on training in it.
    """
    if not hasattr(array, "detach"):
        return np.array(array)
    tensor = array.detach().cpu()
    # NumPy knows no bfloat16 by itself, and PyTorch refuses to give it one.
    is_brain = str(tensor.dtype) == "torch.bfloat16"
    return np.array(jnp.from_dlpack(tensor.contiguous()) if is_brain else tensor.numpy())


def _places(
    called: str, dialect: Dialect, variables: Any, rules: Sequence[Rule]
) -> tuple[list[Place], Callable[[str], bool]]:
    """The place of every leaf, and whether a name needs none."""
    for rule in rules:
        if rule[2] not in (*dialect.kinds, KEEP):
            raise ValueError(
                f"{called}: the rule {rule} has kind {rule[2]!r}, expected one of "
                f"{', '.join(dialect.kinds)} or {KEEP}."
            )
    patterns = [re.compile(_regex(flax)) for flax, _, _ in rules]
    found: set[int] = set()
    optional: set[str] = set()
    kept: list[str] = []

    def place(path: tuple[Any, ...], leaf: Any) -> Place:
        text = jax.tree_util.keystr(path, simple=True, separator="/")
        collection, *parents, name = text.split("/") if "/" in text else ("", text)
        for number, (rule, pattern) in enumerate(zip(rules, patterns, strict=True)):
            match = pattern.fullmatch("/".join(parents))
            if match is None:
                continue
            found.add(number)
            module = _name(called, rule, match.groupdict())
            join = dialect.separator.join
            if rule[2] == KEEP:
                kept.append(module)
                return Place(leaf, text)
            optional.update(join(filter(None, (module, name))) for name in dialect.optional)
            if entry := dialect.kinds[rule[2]].get((collection, name)):
                return Place(leaf, text, join(filter(None, (module, entry[0]))), entry[1])
        return Place(None, text)

    leaves = jax.tree_util.tree_leaves_with_path(variables)
    places = [place(*entry) for entry in leaves]
    names = [place.name for place in places if place.name is not None]
    unmatched = [str(rule) for number, rule in enumerate(rules) if number not in found]
    modules = sorted({"/".join(place.path.split("/")[1:-1]) for place in places})
    _complain(
        f"{called}: the rules do not fit the variables",
        {
            "rules that match no module": unmatched,
            "variables without a rule": [place.path for place in places if place.leaf is None],
            "names given twice": sorted({name for name in names if names.count(name) > 1}),
        },
        f"The modules are: {', '.join(map(repr, modules))}.",
    )
    return (
        places,
        lambda name: (
            name in optional
            or any(name == module or name.startswith(module + dialect.separator) for module in kept)
        ),
    )


def _regex(pattern: str) -> str:
    """conv{i} as an expression; a name that comes back stands for the same text."""
    seen: set[str] = set()

    def part(index: int, text: str) -> str:
        if index % 2 == 0:
            return re.escape(text)
        again = text in seen
        seen.add(text)
        return f"(?P={text})" if again else f"(?P<{text}>[^/]+?)"

    return "".join(part(i, text) for i, text in enumerate(re.split(r"\{(\w+)\}", pattern)))


def _name(called: str, rule: Rule, values: Mapping[str, str]) -> str:
    """The other library's module; {i+1} counts on from what {i} matched."""

    def fill(match: re.Match[str]) -> str:
        name, shift = match[1], match[2]
        value = values.get(name)
        if value is None or (shift and not value.isdecimal()):
            got = f"which {rule[0]!r} does not have" if value is None else f"and {name}={value!r}"
            raise ValueError(
                f"{called}: the rule {rule} asks for {match[0]}, {got}, expected a name of the "
                "pattern of Flax, and a number where it is counted on."
            )
        return str(int(value) + int(shift)) if shift else value

    return re.sub(r"\{(\w+)([+-]\d+)?\}", fill, rule[1])


def _complain(sentence: str, problems: Mapping[str, Iterable[str]], remedy: str) -> None:
    """Raises with all that is wrong at once."""
    found = {what: list(items) for what, items in problems.items()}
    if not any(found.values()):
        return
    lines = [f"  {what}: {', '.join(items)}" for what, items in found.items() if items]
    raise ValueError("\n".join([f"{sentence}:", *lines, remedy]))
