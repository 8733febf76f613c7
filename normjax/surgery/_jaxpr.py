"""One traced call as a flat list of equations: calls inlined, unused equations removed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Primitive

# Calls that equal their body if nothing is differentiated or compiled separately.
CALLS = {
    "jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint",
    "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr",
}  # fmt: skip

Slot = int | Literal


class Equation(NamedTuple):
    """One primitive, from slots to slots.

    `lasting` equations, which print, run even if nothing reads their results. `where` is the path
    of the module, for reports.
    """

    primitive: Primitive
    params: dict[str, Any]
    inputs: tuple[Slot, ...]
    outputs: tuple[int, ...]
    avals: tuple[Any, ...]
    lasting: bool
    context: Any
    where: str

    @property
    def name(self) -> str:
        return self.primitive.name

    def bind(self, *values: Any) -> list[Any]:
        """Its results for these values."""
        # JAX 0.7 returns the functions among the parameters separately.
        bound = self.primitive.get_bind_params(self.params)
        functions, params = bound if isinstance(bound, tuple) else ((), bound)
        with self.context.manager:
            results = self.primitive.bind(*functions, *values, **params)
        return list(results) if self.primitive.multiple_results else [results]


class FlatJaxpr(NamedTuple):
    """Equations in order; every slot is assigned once."""

    equations: tuple[Equation, ...]
    constants: dict[int, Any]
    inputs: tuple[int, ...]
    outputs: tuple[Slot, ...]
    out_tree: Any

    def uses(self) -> Counter[int]:
        """How often each slot is read, the result included."""
        read = [slot for equation in self.equations for slot in equation.inputs]
        return Counter(slot for slot in (*read, *self.outputs) if isinstance(slot, int))

    def run(self, values: Sequence[Any]) -> Any:
        """The result for these leaves of the arguments."""
        known = self.constants | dict(zip(self.inputs, values, strict=True))

        def read(slot: Slot) -> Any:
            return known[slot] if isinstance(slot, int) else slot.val

        for equation in self.equations:
            results = equation.bind(*map(read, equation.inputs))
            known.update(zip(equation.outputs, results, strict=True))
        return jax.tree.unflatten(self.out_tree, map(read, self.outputs))

    def distinct(self) -> tuple[FlatJaxpr, tuple[int, ...]]:
        """The program without repeated results, and for each old result its index among the new.

        Equal operations on equal operands are merged.
        """
        slots: dict[int, int] = {}
        by_key: dict[Any, tuple[int, ...]] = {}
        equations = []
        for equation in self.equations:
            given = tuple(slots.get(s, s) if isinstance(s, int) else s for s in equation.inputs)
            equation = equation._replace(inputs=given)
            key = _key(equation)
            if (first := by_key.get(key) if key is not None else None) is not None:
                slots.update(zip(equation.outputs, first, strict=True))
                continue
            equations.append(equation)
            if key is not None:
                by_key[key] = equation.outputs
        results = [slots.get(s, s) if isinstance(s, int) else s for s in self.outputs]
        places: dict[Any, int] = {}
        order = tuple(places.setdefault(_operand(slot), len(places)) for slot in results)
        outputs = tuple(results[order.index(place)] for place in range(len(places)))
        tree = jax.tree.structure([0] * len(outputs))
        return self._replace(equations=tuple(equations), outputs=outputs, out_tree=tree), order


def _key(equation: Equation) -> Any:
    """A key that is equal for equations with equal results; None if that is unknown."""
    if equation.lasting:
        return None
    operands = tuple(map(_operand, equation.inputs))
    key = equation.primitive, tuple(sorted(equation.params.items())), operands
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _operand(slot: Slot) -> Any:
    """A slot, or the value of a literal, as a key."""
    if isinstance(slot, int):
        return slot
    value = np.asarray(slot.val)
    return str(slot.aval), value.tobytes()


def trace(function: Callable, *args: Any, effects: bool = True) -> FlatJaxpr:
    """The program of one call, with or without its prints; `args` are arrays or their shapes."""
    closed, out = jax.make_jaxpr(function, return_shape=True)(*args)
    slots = count()
    inputs = tuple(next(slots) for _ in closed.jaxpr.invars)
    equations: list[Equation] = []
    constants: dict[int, Any] = {}

    def inline(closed: ClosedJaxpr, arguments: Sequence[Slot], where: str) -> list[Slot]:
        held = {var: next(slots) for var in closed.jaxpr.constvars}
        constants.update(zip(held.values(), closed.consts, strict=True))
        known: dict[Any, Slot] = {
            **held,
            **dict(zip(closed.jaxpr.invars, arguments, strict=True)),
        }

        def read(atom: Any) -> Slot:
            return atom if isinstance(atom, Literal) else known[atom]

        for eqn in closed.jaxpr.eqns:
            given = tuple(map(read, eqn.invars))
            place = _place(where, eqn)
            body = _body(eqn)
            results: Sequence[Slot]
            if eqn.primitive.name == "name":
                # Names are only for checkpoint policies; the result is the operand itself.
                results = given
            elif body is None:
                name = eqn.primitive.name
                new = tuple(next(slots) for _ in eqn.outvars)
                avals = tuple(var.aval for var in eqn.outvars)
                lasting = effects and bool(eqn.effects)
                entry = (
                    eqn.primitive,
                    eqn.params,
                    given,
                    new,
                    avals,
                    lasting,
                    eqn.ctx,
                    place or name,
                )
                equations.append(Equation(*entry))
                results = new
            else:
                results = inline(body, given, place)
            known.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in closed.jaxpr.outvars]

    outputs = tuple(inline(closed, inputs, ""))
    tree = jax.tree.structure(out)
    return _alive(FlatJaxpr(tuple(equations), constants, inputs, outputs, tree))


def _place(where: str, eqn: Any) -> str:
    """The module's path, without the functions of this library below it.

    Where no module has a name the path of a transformation is empty, too: `vmap()`.
    """
    parts = (*where.split("/"), *str(eqn.source_info.name_stack).split("/"))
    return "/".join(
        part for part in parts if part and not part.startswith("normjax.") and "()" not in part
    )


def _body(eqn: Any) -> ClosedJaxpr | None:
    if eqn.primitive.name not in CALLS:
        return None
    inner = next(v for v in eqn.params.values() if isinstance(v, (ClosedJaxpr, Jaxpr)))
    return inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())


def _alive(program: FlatJaxpr) -> FlatJaxpr:
    """Without the equations whose results are not used."""
    needed = {slot for slot in program.outputs if isinstance(slot, int)}
    kept = []
    for equation in reversed(program.equations):
        if equation.lasting or needed.intersection(equation.outputs):
            kept.append(equation)
            needed.update(slot for slot in equation.inputs if isinstance(slot, int))
    return program._replace(equations=tuple(reversed(kept)))
