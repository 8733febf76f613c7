"""Variables of Flax and named arrays of other libraries, matched by a table of rules."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from normjax.surgery._layouts import ANY, PARTS, Layout, NameMapping
from normjax.surgery._paths import is_nnx

KEEP = "keep"

# A module of Flax, a module of the other library, and what kind of layer it is.
Rule = tuple[str, str, str]


class Place(NamedTuple):
    """The counterpart of a leaf in the other library; a leaf without a name is not changed."""

    leaf: Any
    path: str
    rule: Rule | None = None
    module: str = ""
    name: str | None = None
    layout: Layout = ANY

    @property
    def shape(self) -> tuple[int, ...]:
        return np.shape(self.leaf)


def import_arrays(
    name_mapping: NameMapping,
    variables: Any,
    state: Mapping[str, Any],
    rules: Sequence[Rule],
) -> Any:
    """The variables with the arrays of `state` in their places; a copy of a model of NNX."""
    if is_nnx(variables):
        from normjax.surgery._nnx.layers import filled, variables_of

        held = variables_of(variables)
        return filled(variables, import_arrays(name_mapping, held, state, rules))
    places = _places(name_mapping, variables, rules)
    named = [place for place in places if place.name is not None]
    names = {str(place.name): place.path for place in reversed(named)}
    missing = {name: path for name, path in reversed(names.items()) if name not in state}
    found = {name: _numbers(state[name]) for name in names if name in state}
    given = {name: array for name, array in found.items() if array is not None}
    free = _free(name_mapping, places)
    _complain(
        "normjax: the state does not fit the variables",
        {
            "missing in the state": [f"{name} (for {path})" for name, path in missing.items()],
            "left over in it": [str(n) for n in state if n not in names and not free(str(n))],
            "no arrays": [
                f"{name} is {type(state[name]).__name__}" for name in found if name not in given
            ],
            "of other shapes": [
                _differs(place, given[str(place.name)])
                for place in named
                if place.name in given
                and given[str(place.name)].shape != place.layout.shape_there(place.shape)
            ],
        },
        f"{_cause(name_mapping, list(missing), state)}Fix the rules or the fields of the model; a "
        "rule of kind 'keep' leaves a module unchanged. Nothing was changed.",
    )
    arrays = [place.leaf if place.name is None else _laid_out(place, given) for place in places]
    return jax.tree.unflatten(jax.tree.structure(variables), arrays)


def export_arrays(
    name_mapping: NameMapping, variables: Any, rules: Sequence[Rule]
) -> dict[str, np.ndarray]:
    """The arrays of the variables by the names of the other library."""
    if is_nnx(variables):
        from normjax.surgery._nnx.layers import variables_of

        variables = variables_of(variables)
    found: dict[str, list[tuple[int, np.ndarray]]] = {}
    for place in _places(name_mapping, variables, rules):
        if place.name is None:
            continue
        array = _numbers(place.leaf)
        if array is None:
            raise ValueError(
                f"normjax: {place.path} is {type(place.leaf).__name__}, expected an array. Pass "
                "variables that model.init returned or that were trained."
            )
        found.setdefault(place.name, []).append(
            (place.layout.part or 0, place.layout.outward(array))
        )
    # In C order, since files are written from memory without regard to strides.
    return {name: np.asarray(_joined(name, parts), order="C") for name, parts in found.items()}


def _joined(name: str, parts: list[tuple[int, np.ndarray]]) -> np.ndarray:
    """The array of a name; query, key and value are concatenated if it holds all three."""
    arrays = [array for _, array in sorted(parts, key=lambda part: part[0])]
    if len({array.shape for array in arrays}) > 1:
        raise ValueError(
            f"normjax: query, key and value of {name} have shapes "
            f"{', '.join(str(array.shape) for array in arrays)}, expected one shape, since they "
            "are one array there."
        )
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _laid_out(place: Place, given: Mapping[str, np.ndarray]) -> np.ndarray:
    """The array of a place in the layout of Flax."""
    array, part = given[str(place.name)], place.layout.part
    array = array if part is None else np.split(array, PARTS)[part]
    return place.layout.inward(array, place.leaf)


def _differs(place: Place, array: np.ndarray) -> str:
    """How the shape of an array differs from that of its kind."""
    kind = place.rule[2] if place.rule else KEEP
    return (
        f"{place.name} gives {array.shape} for {place.path} of {place.shape}, expected "
        f"{place.layout.shape_there(place.shape)}, since {kind} is ({place.layout.there}) "
        f"there and ({place.layout.here}) here"
    )


def _numbers(array: Any) -> np.ndarray | None:
    """A copy of an array; None if it holds no numbers."""
    try:
        copy = as_numpy(array)
    except (ValueError, TypeError, RuntimeError):
        return None
    return None if copy.dtype.kind in "OSUMm" else copy


def _cause(name_mapping: NameMapping, missing: Sequence[str], state: Mapping[str, Any]) -> str:
    """Where most of the missing arrays are: a level deeper, or under longer or shorter names."""
    levels = {"state": state}
    levels |= {f"state[{k!r}]": held for k, held in state.items() if isinstance(held, Mapping)}
    found: Counter[tuple[str, str, str]] = Counter()
    for level, held in levels.items():
        for key, name in itertools.product(map(str, held), missing):
            bare, how, change = key.removesuffix(":0"), [], "name"
            if bare != key:
                how, change = ["end in ':0'"], "name.removesuffix(':0')"
            if bare.endswith(name_mapping.separator + name):
                prefix = bare.removesuffix(name)
                how, change = [f"begin with {prefix!r}", *how], f"{change}.removeprefix({prefix!r})"
            elif name.endswith(name_mapping.separator + bare):
                prefix = name.removesuffix(bare)
                how, change = [f"lack {prefix!r}", *how], f"{prefix!r} + {change}"
            elif bare != name:
                continue
            found[level, " and ".join(how), change] += 1
    if not found:
        return ""
    (level, names, change), times = found.most_common(1)[0]
    if 2 * times <= len(missing):
        return ""
    passed = f"{{{change}: array for name, array in {level}.items()}}" if names else level
    where = f"{level}, where they {names}" if names else level
    return f"{times} of the {len(missing)} missing names are in {where}: pass {passed}. "


def as_numpy(array: Any) -> np.ndarray:
    """A copy of an array of NumPy, JAX or PyTorch in its own dtype.

    PyTorch may change the memory of a tensor later.
    """
    if not hasattr(array, "detach"):
        return np.array(array)
    tensor = array.detach().cpu()
    # NumPy itself has no bfloat16, so PyTorch does not convert to it.
    is_brain = str(tensor.dtype) == "torch.bfloat16"
    return np.array(jnp.from_dlpack(tensor.contiguous()) if is_brain else tensor.numpy())


def _places(name_mapping: NameMapping, variables: Any, rules: Sequence[Rule]) -> list[Place]:
    """The place of every leaf; an error if a leaf has no rule or a rule has no leaf."""
    if not isinstance(variables, Mapping):
        raise TypeError(
            f"normjax: variables is {type(variables).__name__}, expected the collections of a "
            "Flax model, as {'params': ..., 'batch_stats': ...}. Pass what model.init returns."
        )
    rules = _checked(name_mapping, rules)
    patterns = [(rule, re.compile(_regex(rule[0]))) for rule in rules]
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    paths = [_path_name(path) for path, _ in leaves]
    places = [
        _place(name_mapping, patterns, path, leaf)
        for path, (_, leaf) in zip(paths, leaves, strict=True)
    ]
    named = [place for place in places if place.name is not None]
    times = Counter((place.name, place.layout.part) for place in named)
    parts = Counter(place.name for place in named if place.layout.part is not None)
    modules = {re.sub(r"\d+", "*", "/".join(path.split("/")[1:-1])) for path in paths}
    hint = "" if "params" in variables else " Pass all that model.init returns, 'params' included."
    _complain(
        "normjax: the rules do not fit the variables",
        {
            "rules that match nothing": [
                str(rule) for rule in rules if rule not in [place.rule for place in places]
            ],
            "variables without a rule": [place.path for place in places if place.rule is None],
            "variables of another kind": [
                _misfit(name_mapping, place)
                for place in named
                if not place.layout.takes(place.shape)
            ],
            "names given twice": sorted({str(name) for (name, _), n in times.items() if n > 1}),
            "names given in part": [str(name) for name, n in parts.items() if n % PARTS],
        },
        f"The modules are: {_few([repr(module) for module in sorted(modules)], 10)}.{hint}",
    )
    return places


def _path_name(path: Sequence[Any]) -> str:
    """The path of a leaf without the box that `flax.linen.with_partitioning` puts it in."""
    keys = tuple(key for key in path if not isinstance(key, jax.tree_util.GetAttrKey))
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def _checked(name_mapping: NameMapping, rules: Any) -> list[Rule]:
    """The rules as a list of three names each."""
    wanted = "(module of Flax, module of the other library, kind)"
    if isinstance(rules, (str, Mapping)) or not isinstance(rules, Iterable):
        raise TypeError(
            f"normjax: rules is {type(rules).__name__}, expected a list of rules {wanted}. Pass "
            f"for example [('Conv_{{i}}', 'conv{{i+1}}', 'conv')]."
        )
    rules = list(rules)
    for rule in rules:
        is_list = isinstance(rule, (tuple, list)) and len(rule) == 3
        if not is_list or not all(isinstance(part, str) for part in rule):
            raise TypeError(
                f"normjax: rules holds {rule!r}, expected three strings, {wanted}. Pass a list "
                "of such rules, also for a single one."
            )
        if rule[2] not in (*name_mapping.kinds, KEEP):
            raise ValueError(
                f"normjax: the rule {rule} has kind {rule[2]!r}, expected one of "
                f"{', '.join(name_mapping.kinds)} or {KEEP}."
            )
    return [(here, there, kind) for here, there, kind in rules]


def _place(
    name_mapping: NameMapping,
    patterns: Sequence[tuple[Rule, re.Pattern[str]]],
    path: str,
    leaf: Any,
) -> Place:
    """The place of a leaf by the first rule that fits."""
    collection, *parts = path.split("/")
    last = path.rpartition("/")[2]
    # A leaf is named by itself, by its module, or, as in attention, by the module of its module.
    splits = [("/".join(parts[:n]), "/".join(parts[n:])) for n in range(len(parts), -1, -1)][:3]
    for rule, pattern in patterns:
        for depth, (parents, leaf_name) in enumerate(splits):
            match = pattern.fullmatch(parents)
            if match is None:
                continue
            # A rule names the layer of an array: "a/{b}" is not a rule for the kernel of a.
            held_by_a_layer = depth == 0 and name_mapping.owns(last)
            if rule[2] == KEEP:
                if depth < 2 and not held_by_a_layer:
                    return Place(leaf, path, rule, _name(rule, match.groupdict()))
            elif depth == 0 and last == "kernel":
                continue  # The layout of a kernel differs, so it is never a bare parameter.
            elif entry := name_mapping.kinds[rule[2]].get((collection, leaf_name)):
                module = _name(rule, match.groupdict())
                return Place(
                    leaf, path, rule, module, name_mapping.join(module, entry[0]), entry[1]
                )
    return Place(leaf, path)


def _misfit(name_mapping: NameMapping, place: Place) -> str:
    """Why a leaf does not fit the kind of its rule, and which kinds it fits."""
    kind = place.rule[2] if place.rule else KEEP
    leaf_name = place.path.rpartition("/")[2]
    others = {
        name: None
        for name, entries in name_mapping.kinds.items()
        for (_, held), (_, layout) in entries.items()
        if held.rpartition("/")[2] == leaf_name and layout.takes(place.shape)
    }
    text = f"{place.path} has shape {place.shape}, and {kind} takes ({place.layout.here})"
    return f"{text}; its rank fits {', '.join(others)}" if others else text


def _free(name_mapping: NameMapping, places: Sequence[Place]) -> Callable[[str], bool]:
    """Which names need no place: optional ones, and those of a module that is kept."""
    optional = {
        name_mapping.join(p.module, extra) for p in places for extra in name_mapping.optional
    }
    kept = {p.module for p in places if p.rule is not None and p.rule[2] == KEEP}
    inside = tuple(f"{module}{name_mapping.separator}" for module in kept if module)

    def free(name: str) -> bool:
        # Arrays of the model outside of its modules have no separator in their names.
        at_root = "" in kept and name_mapping.separator not in name
        return at_root or name in optional or name in kept or name.startswith(inside)

    return free


def _regex(pattern: str) -> str:
    """conv{i} as a regular expression; a repeated name matches the same text."""
    seen: set[str] = set()

    def part(index: int, text: str) -> str:
        if index % 2 == 0:
            return re.escape(text)
        again = text in seen
        seen.add(text)
        # With an underscore, a number is a valid group name, too.
        return f"(?P=_{text})" if again else f"(?P<_{text}>[^/]+?)"

    return "".join(part(i, text) for i, text in enumerate(re.split(r"\{(\w+)\}", pattern)))


def _name(rule: Rule, values: Mapping[str, str]) -> str:
    """The other library's module; {i+1} is one more than the number that {i} matched."""

    def fill(match: re.Match[str]) -> str:
        name, shift = match[1], match[2]
        value = values.get(f"_{name}")
        if value is None or (shift and not value.isdecimal()):
            got = f"which {rule[0]!r} does not have" if value is None else f"and {name}={value!r}"
            raise ValueError(
                f"normjax: the rule {rule} asks for {match[0]}, {got}, expected a name of the "
                "pattern of Flax, and a number if a number is added."
            )
        return str(int(value) + int(shift)) if shift else value

    return re.sub(r"\{(\w+)([+-]\d+)?\}", fill, rule[1])


def _complain(sentence: str, problems: Mapping[str, Sequence[str]], remedy: str) -> None:
    """Raises one error with all problems, the first few of each kind."""
    if not any(problems.values()):
        return
    lines = [f"  {what}: {_few(items)}" for what, items in problems.items() if items]
    raise ValueError("\n".join([f"{sentence}:", *lines, remedy]))


def _few(items: Sequence[str], most: int = 5) -> str:
    """The first of many, and how many there are."""
    more = f", ... ({len(items)} in all)" if len(items) > most else ""
    return ", ".join(items[:most]) + more
