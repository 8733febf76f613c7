"""Variables of Flax and named arrays of other libraries, matched by a table of rules."""

from __future__ import annotations

import re
from collections import Counter
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

    def join(self, module: str, name: str) -> str:
        return f"{module}{self.separator}{name}" if module else name


class Place(NamedTuple):
    """Where a leaf of the variables is found in the other library; without a name it stays."""

    leaf: Any
    path: str
    rule: Rule | None = None
    module: str = ""
    name: str | None = None
    layout: Layout = SAME


def take_in(
    called: str, dialect: Dialect, variables: Any, state: Mapping[str, Any], rules: Sequence[Rule]
) -> Any:
    """The variables with the arrays of `state` in their places."""
    places = _places(called, dialect, variables, rules)
    given = {name: as_numpy(array) for name, array in state.items()}
    named = [place for place in places if place.name is not None]
    missing = [f"{p.name} (for {p.path})" for p in named if p.name not in given]
    used = {place.name for place in named}
    free = _free(dialect, places)
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
    places = _places(called, dialect, variables, rules)
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


def _places(called: str, dialect: Dialect, variables: Any, rules: Sequence[Rule]) -> list[Place]:
    """The place of every leaf; an error if there is a leaf or a rule without the other."""
    for rule in rules:
        if rule[2] not in (*dialect.kinds, KEEP):
            raise ValueError(
                f"{called}: the rule {rule} has kind {rule[2]!r}, expected one of "
                f"{', '.join(dialect.kinds)} or {KEEP}."
            )
    patterns = [(rule, re.compile(_regex(rule[0]))) for rule in rules]
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    places = [
        _place(called, dialect, patterns, path, leaf)
        for path, (_, leaf) in zip(paths, leaves, strict=True)
    ]
    named = Counter(place.name for place in places if place.name is not None)
    modules = sorted({"/".join(path.split("/")[1:-1]) for path in paths})
    _complain(
        f"{called}: the rules do not fit the variables",
        {
            "rules that match nothing": [
                str(rule) for rule in rules if rule not in [place.rule for place in places]
            ],
            "variables without a rule": [place.path for place in places if place.rule is None],
            "names given twice": [name for name, times in sorted(named.items()) if times > 1],
        },
        f"The modules are: {', '.join(map(repr, modules))}.",
    )
    return places


def _place(
    called: str,
    dialect: Dialect,
    patterns: Sequence[tuple[Rule, re.Pattern[str]]],
    path: str,
    leaf: Any,
) -> Place:
    """By the first rule that fits."""
    collection, _, rest = path.partition("/")
    parents, _, leaf_name = rest.rpartition("/")
    for rule, pattern in patterns:
        match = pattern.fullmatch(parents)
        if match is None:
            continue
        module = _name(called, rule, match.groupdict())
        if rule[2] == KEEP:
            return Place(leaf, path, rule, module)
        if entry := dialect.kinds[rule[2]].get((collection, leaf_name)):
            name = dialect.join(module, entry[0])
            return Place(leaf, path, rule, module, name, entry[1])
    return Place(leaf, path)


def _free(dialect: Dialect, places: Sequence[Place]) -> Callable[[str], bool]:
    """Which names need no place: optional ones, and those of a module that is kept."""
    optional = {dialect.join(p.module, extra) for p in places for extra in dialect.optional}
    kept = {p.module for p in places if p.rule is not None and p.rule[2] == KEEP}
    inside = tuple(dialect.join(module, "") for module in kept)
    return lambda name: name in optional or name in kept or name.startswith(inside)


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
