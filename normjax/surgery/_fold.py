"""Inference without batch norm: every known scale and shift goes into the layer before it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from normjax.surgery._affine import (
    Known,
    Layer,
    Pending,
    evaluate,
    features_of,
    manner,
    whole,
)
from normjax.surgery._program import Equation, Program, trace

LAYERS = {"conv_general_dilated", "dot_general"}
AFFINE = {"add", "add_any", "sub", "mul", "div", "neg"}
CASTS = {"convert_element_type", "copy", "stop_gradient", "name"}
LOOPS = {"scan", "while", "cond", "shard_map"}

ONE_SIZE = (
    "the call repeats variables for each example, as learned queries: fold it with two examples or "
    "more."
)

# How an equation was met, by where it stands, its name and its number there.
Manners = dict[tuple[str, str, int], str]


@dataclass
class FoldReport:
    """What became of every norm of a call; `print` it.

    Attributes:
        folded: pairs (layer, norm): the norm went into the layer's kernel and bias.
        alone: pairs (norm, reason): it became one multiply-add, or could not be reached.
    """

    folded: list[tuple[str, str]] = field(default_factory=list)
    alone: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        total = len(self.folded) + len(self.alone)
        lines = [f"{len(self.folded)} of {total} norms folded into the layer before them"]
        lines += [f"  folded  {norm} into {layer}" for layer, norm in self.folded]
        lines += [f"  alone   {norm}: {reason}" for norm, reason in self.alone]
        return "\n".join(lines)


def fold(
    call: Callable[..., Any], variables: Any, *inputs: Any
) -> tuple[Callable[..., Any], tuple[Array, ...], FoldReport]:
    """Folds batch norms, and whatever else is known before the call, into the layers before them.

        (conv(x, kernel) + b - mean) * s + bias  =  conv(x, kernel * s) + ((b - mean) * s + bias)

    with s = scale / sqrt(var + epsilon). The pairs are found by following the data of one traced
    call, never by name: a scale that comes from the variables alone and reaches the output of a
    convolution (grouped, dilated, transposed) or product feature by feature is folded. A norm that
    follows anything else becomes one multiply-add. What depends on the variables alone, such as
    the kernels of `WeightNorm`, is computed once.

    Args:
        call: `call(variables, *inputs)`, in evaluation mode and traceable by JAX, for example
            `lambda variables, x: model.apply(variables, x, train=False)`.
        variables: pytree of arrays, of a Flax model or any other.
        inputs: examples of the inputs; any batch size.

    Returns:
        `(serve, folded, report)`: `serve(folded, *inputs)` equals `call(variables, *inputs)` and
        may be jitted, for any batch size; `folded` is a tuple of arrays, to be kept as any other
        pytree; `report` is a `FoldReport`.

    Guarantees:
        same output: equal to that of the call within the rounding of one multiply-add.
        no norm is left: the served program has neither root nor quotient of a folded norm.
        only what is safe: a pair is left alone if a nonlinearity stands between, if the layer's
            output is used twice, or if the norm comes first (padding would be shifted with it).
        any batch: nothing in `folded` depends on the batch size of `inputs`.

    Edge cases:
        ===================================  ==================================================
        layer without bias                   gets the shift as its bias
        norm after an activation             one multiply-add
        shared layer                         one kernel for each norm that follows it
        half precision                       folded in float32, kernels keep their dtype
        norm inside a scan                   left as it is, and reported
        variables repeated for each example  fold with two examples or more
        ===================================  ==================================================

    Raises:
        ValueError: no norm is found, as in training mode, where statistics come from the input;
            or `serve` meets an input for which the call computes with other shapes of variables.

    References:
        Jacob et al. (2018), Quantization and Training of Neural Networks, arXiv:1712.05877,
        section 3.2.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from normjax import surgery
        >>> model = nn.Sequential([nn.Conv(4, (3, 3)), nn.BatchNorm(use_running_average=True)])
        >>> x = jnp.ones((8, 6, 6, 3))
        >>> variables = model.init(jax.random.key(0), x)
        >>> serve, folded, report = surgery.fold(model.apply, variables, x)
        >>> print(report)
        1 of 1 norms folded into the layer before them
          folded  Sequential/layers_1 into Sequential/layers_0
        >>> jax.jit(serve)(folded, x[:1]).shape
        (1, 6, 6, 4)
    """
    program = trace(call, variables, *inputs)
    leaves = jax.tree.leaves(variables)
    report, manners = FoldReport(), Manners()

    def stored(leaves: list[Array], inputs: Any) -> list[Array]:
        taken: list[Array] = []

        def take(array: Array) -> Array:
            taken.append(array)
            return array

        _Folding(program, take, report, manners).run(leaves, jax.tree.leaves(inputs))
        return taken

    beforehand = trace(stored, leaves, inputs, effects=False)
    if not report.folded and not report.alone:
        raise ValueError(
            "surgery.fold: no norm found whose statistics come from the variables, expected at "
            "least one. If the call trains, its statistics come from the inputs: pass train=False "
            "(use_running_average=True in Flax)."
        )
    # What is stored depends on no input, so none is needed to compute it.
    nothing = [None] * len(jax.tree.leaves(inputs))
    folded = tuple(jax.jit(lambda leaves: beforehand.run([*leaves, *nothing]))(leaves))
    return _server(call, variables, len(folded), manners), folded, report


def _server(call: Callable, variables: Any, size: int, manners: Manners) -> Callable:
    """The function that serves, traced anew for each shape of its inputs."""
    shapes = jax.eval_shape(lambda variables: variables, variables)
    leaves = jax.tree.leaves(shapes)

    def serve(folded: Sequence[Array], *inputs: Any) -> Any:
        program = trace(call, shapes, *inputs)

        def remaining(leaves: list[Any], folded: Sequence[Array], inputs: Any) -> Any:
            rest = iter(folded)

            def take(array: Array) -> Array:
                given = next(rest, None)
                if given is None or given.shape != array.shape:
                    got = "nothing more" if given is None else f"shape {given.shape}"
                    raise ValueError(
                        f"serve: folded holds {got} where the call on these inputs needs "
                        f"{array.shape}. Pass what fold returned beside serve; if you did, "
                        + ONE_SIZE
                    )
                return given

            walk = _Folding(program, take, FoldReport(), dict(manners))
            return walk.run(leaves, jax.tree.leaves(inputs))

        if len(folded) != size:
            raise ValueError(
                f"serve: folded holds {len(folded)} arrays, expected {size}. Pass what fold "
                "returned beside serve, not the variables of the model."
            )
        rest = trace(remaining, leaves, folded, inputs)
        values = rest.run([*leaves, *jax.tree.leaves((folded, inputs))])
        return jax.tree.unflatten(program.out_tree, values)

    return serve


class _Folding:
    """One walk over a program, which `take`s every array that is known before the call.

    The first walk writes down in which manner it met what is known; later ones, over other shapes,
    follow it, and so take the same arrays.
    """

    def __init__(self, program: Program, take: Callable, report: FoldReport, manners: Manners):
        self.program, self.report, self.manners = program, report, manners
        self.uses = program.uses()
        self.met: Counter[tuple[str, str]] = Counter()
        self.known: dict[int, Any] = {}
        self.reasons: dict[int, str] = dict.fromkeys(program.inputs, "it comes first")
        self.taken: dict[int, tuple[Array, Array]] = {}
        self._take = take

    def run(self, variables: Sequence[Any], inputs: Sequence[Any]) -> list[Array]:
        """The leaves of the result."""
        constants = self.program.constants.items()
        known = [Known(value, value.shape, stored=True) for value in variables]
        self.known = {slot: Known(value, jnp.shape(value)) for slot, value in constants}
        self.known |= dict(zip(self.program.inputs, (*known, *inputs), strict=True))
        for equation in self.program.equations:
            results = self.step(equation, [self.read(slot) for slot in equation.inputs])
            for slot, value in zip(equation.outputs, results, strict=True):
                self.known[slot] = self.settled(equation, slot, value)
        return [self.live(self.read(slot)) for slot in self.program.outputs]

    def read(self, slot: Any) -> Any:
        return self.known[slot] if isinstance(slot, int) else Known(slot.val, jnp.shape(slot.val))

    def take(self, array: Array) -> Array:
        """Each array once. It is held beside its number, which would otherwise be given anew."""
        if id(array) not in self.taken:
            self.taken[id(array)] = array, self._take(jnp.asarray(array))
        return self.taken[id(array)][1]

    def live(self, value: Any) -> Array:
        """A value as an array, whatever was still pending."""
        if isinstance(value, Known):
            return whole(value, self.take)
        if isinstance(value, Pending):
            if value.layer.reason is None:
                self.report.folded.extend((value.layer.where, norm) for norm in value.norms)
            elif value.deviation:
                self.report.alone.extend((norm, value.layer.reason) for norm in value.norms)
            return value.emit(self.take)
        return value

    def settled(self, equation: Equation, slot: int, value: Any) -> Any:
        """A result; computed where it is, if more than one equation reads it."""
        self.reasons[slot] = f"{equation.name} stands between it and any layer"
        if isinstance(value, Pending) and self.uses[slot] > 1:
            self.reasons[slot] = (
                f"the output of {value.layer.where or 'its layer'} is used {self.uses[slot]} times"
            )
            return self.live(value)
        return value

    def step(self, equation: Equation, values: list[Any]) -> Sequence[Any]:
        """The results of one equation."""
        known = [isinstance(value, Known) for value in values]
        if all(known):
            beforehand = self.manner(equation, manner(equation, values)) != "serving"
            return (
                evaluate(equation, values) if beforehand else equation.bind(*map(self.live, values))
            )
        pending = None
        if equation.name in LAYERS and sum(known) == 1:
            pending = self.layer(equation, values, known.index(True))
        elif equation.name in AFFINE:
            pending = self.affine(equation, values, known)
        elif isinstance(values[0], Pending) and len(values) == 1:
            pending = self.moved(equation, values[0])
        if pending is not None:
            return [pending]
        self.look_inside(equation, values)
        return equation.bind(*map(self.live, values))

    def manner(self, equation: Equation, found: str) -> str:
        """That of the first walk."""
        place = (equation.where, equation.name)
        self.met[place] += 1
        first = self.manners.setdefault((*place, self.met[place]), found)
        if found == "serving" != first:
            raise ValueError(
                f"serve: {equation.name} in {equation.where} was computed beforehand, "
                f"which these inputs do not allow: {ONE_SIZE}"
            )
        return first

    def layer(self, equation: Equation, values: list[Any], position: int) -> Pending | None:
        """A convolution or product of an input with a kernel."""
        kernel, out = values[position], equation.avals[0]
        is_kernel = position == 1 or equation.name == "dot_general"
        if not (is_kernel and kernel.stored and _is_inexact(out)):
            return None
        if self.manner(equation, "whole" if kernel.whole else "serving") == "serving":
            return None
        features = features_of(equation, position, len(kernel.shape))
        x = self.live(values[1 - position])
        layer = Layer(equation, x, (kernel.array, position), features, equation.where, None)
        return Pending(layer, tuple(range(len(features))), out.shape, out.dtype)

    def affine(self, equation: Equation, values: list[Any], known: list[bool]) -> Pending | None:
        """A known scale or shift of a value."""
        position = known.index(False)
        value, operand = values[position], values[1 - position] if len(values) > 1 else None
        if sum(known) != len(values) - 1 or (equation.name == "div" and position == 1):
            return None
        if value.shape != equation.avals[0].shape:
            return None  # a scalar that scales something known
        if isinstance(value, Pending) and (operand is None or value.admits(operand)):
            return value.affine(equation, operand, reverse=position == 1)
        if operand is None or not operand.stored or not _is_inexact(equation.avals[0]):
            return None
        reason = self.reasons[equation.inputs[position]]  # type: ignore[index]  # no literal
        if isinstance(value, Pending):
            reason = f"it differs along more than the features of {value.layer.where}"
        x = self.live(value)
        axes = tuple(range(x.ndim))
        start = Pending(Layer(None, x, None, axes, "", reason), axes, x.shape, x.dtype)
        return start.affine(equation, operand, reverse=position == 1)

    def moved(self, equation: Equation, value: Pending) -> Pending | None:
        """A value in another layout or precision."""
        out = equation.avals[0]
        if equation.name in CASTS:
            alike = jnp.iscomplexobj(out) == jnp.iscomplexobj(value.layer.x)
            return value._replace(dtype=out.dtype) if alike and _is_inexact(out) else None
        return value.moved(equation)

    def look_inside(self, equation: Equation, values: list[Any]) -> None:
        """Reports norms that a loop or a branch hides."""
        stored = any(isinstance(value, Known) and value.stored for value in values)
        if equation.name in LOOPS and stored and "rsqrt" in str(equation.params):
            self.report.alone.append((equation.where, f"a {equation.name} is not looked into"))


def _is_inexact(aval: Any) -> bool:
    return jnp.issubdtype(aval.dtype, jnp.inexact)
