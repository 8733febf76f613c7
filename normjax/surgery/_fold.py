"""Inference without batch norm: known scales and shifts are folded into the layers before them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from normjax import _errors
from normjax.surgery._affine import DeferredAffine, Layer, features_of
from normjax.surgery._constants import Constant, evaluate, evaluation, whole
from normjax.surgery._jaxpr import Equation, FlatJaxpr, trace
from normjax.surgery._paths import is_nnx

LAYERS = {"conv_general_dilated", "dot_general"}
AFFINE = {"add", "add_any", "sub", "mul", "div", "neg"}
CASTS = {"convert_element_type", "copy", "stop_gradient", "name"}
LOOPS = {"scan", "while", "cond", "shard_map"}

ONE_SIZE = (
    "the call repeats variables for each example, such as learned queries: fold it with two "
    "examples or more."
)

BIND = (
    "Bind all other arguments, such as the mode: functools.partial(model.apply, train=False), or "
    "lambda variables, x: model.apply(variables, x, train=False)."
)
# How an equation of constants was evaluated, by its path, its name and its number there.
Evaluations = dict[tuple[str, str, int], str]


@dataclass
class FoldReport:
    """The result of `fold` for every norm of a call; `print` it.

    Attributes:
        folded: pairs (layer, norm): the norm was folded into the layer's kernel and bias.
        alone: pairs (norm, reason): it became (x - mean) * s + bias, or was not accessible.
        scales: pairs (layer, scale): a scale that is not a norm, such as a layer scale, was folded
            into the layer, too.
    """

    folded: list[tuple[str, str]] = field(default_factory=list)
    alone: list[tuple[str, str]] = field(default_factory=list)
    scales: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        total = len(self.folded) + len(self.alone)
        lines = [f"{len(self.folded)} of {total} norms folded into the layer before them"]
        lines += [f"  folded  {norm} into {layer}" for layer, norm in self.folded]
        lines += [f"  alone   {norm}: {reason}" for norm, reason in self.alone]
        lines += [f"  scale   {scale} into {layer}" for layer, scale in self.scales]
        return "\n".join(lines)


@_errors.named("normjax.surgery.fold", runs_model=True)
def fold(
    call: Callable[..., Any], variables: Any, *inputs: Any
) -> tuple[Callable[..., Any], tuple[Array, ...], FoldReport]:
    """Folds batch norms, and other scales and shifts known before a call, into the layers before.

        (conv(x, kernel) + b - mean) * s + bias  =  conv(x, kernel * s) + ((b - mean) * s + bias)

    with s = scale / sqrt(var + epsilon). The pairs are found in the data flow of one traced call,
    not by name. A scale is folded if it depends only on the variables and multiplies the features
    of the output of a convolution (also grouped, dilated or transposed) or of a matrix product.
    Any other norm becomes (x - mean) * s + bias. The mean is subtracted first, since rounding would
    destroy data of 1e5 +- 1 in x * s - mean * s. Values that depend only on the variables, such as
    the kernels of `WeightNorm`, are computed once.

    A folded kernel and bias are rounded a few times each. In addition to the rounding of the layer
    itself, the output therefore has an error of at most

        4 eps s (sum |kernel| |x| + |b| + |mean|) + 4 eps |bias|

    with the eps of the kernel's dtype. The call itself may have the same error. It is large only if
    the mean is large compared with the deviation.

    Args:
        call: `call(variables, *inputs)`, in evaluation mode and traceable by JAX, for example
            `lambda variables, x: model.apply(variables, x, train=False)`.
        variables: pytree of arrays, of a Flax model or any other; or of their shapes. For a model
            of flax.nnx, call `fold(model, *inputs)`, which runs it after `model.eval()`; or
            `fold(call, model, *inputs)` with `call(model, *inputs)`.
        inputs: examples of the inputs; any batch size.

    Returns:
        `(serve, folded, report)`: `serve(folded, *inputs)` equals `call(variables, *inputs)` and
        may be jitted, for any batch size; `folded` is a tuple of arrays, a pytree that can be
        saved; `report` is a `FoldReport`. The shapes in `folded` depend only on those of the
        variables, so that arrays of one call fit the `serve` of another.

    Guarantees:
        same output: equal to that of the call within the bound above.
        no norm is left: the served program has neither root nor quotient of a folded norm.
        only what is safe: a pair is not folded if a nonlinearity is between them, if the layer's
            output is used twice, or if the norm comes first (padding would be shifted, too).
        any batch: nothing in `folded` depends on the batch size of `inputs`.

    Edge cases:
        ===================================  ==================================================
        layer without bias                   gets the shift as its bias
        norm after an activation             (x - mean) * s + bias
        norm of raw data                     the same, as exact as the norm itself
        layer scale                          folded, and listed in `scales` of the report
        shared layer                         one kernel for each norm that follows it
        layer and norm shared by passes      stored once
        variables stacked for vmap           folded, the members of the ensemble side by side
        shapes in place of arrays            `folded` holds shapes (`jax.ShapeDtypeStruct`), as
                                             to restore a checkpoint; `serve` takes arrays
        half precision                       folded in float32, kernels keep their dtype
        norm inside a scan                   not folded, and reported
        variables repeated for each example  fold with two examples or more
        ===================================  ==================================================

    Raises:
        TypeError: `call` is a module of linen, not a function, or needs other arguments than
            arrays, such as the mode.
        ValueError: there is nothing to fold, as in training mode, where statistics come from the
            input; or `serve` gets an input for which the call uses other shapes of variables.

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
    if is_nnx(call):
        return fold(lambda model, *given: model(*given), call, variables, *inputs)
    if is_nnx(variables):
        from normjax.surgery._nnx.layers import serving

        call, variables = serving(call, variables)
    if isinstance(call, nn.Module) or not callable(call):
        raise TypeError(
            f"normjax: call is {type(call).__name__}, expected a function of the variables "
            "and the inputs. Pass model.apply, or lambda variables, x: model.apply(variables, x, "
            "train=False)."
        )
    modes = [given for given in jax.tree.leaves(inputs) if isinstance(given, bool)]
    if modes:
        raise TypeError(f"normjax: the inputs contain {modes[0]}, expected arrays alone. {BIND}")
    try:
        program = trace(call, variables, *inputs)
    except TypeError as error:
        if not re.search(r"missing \d+ required", str(error)):
            raise
        expected = "expected a function of the variables and the inputs alone"
        raise TypeError(f"normjax: {error}, {expected}. {BIND}") from error
    leaves = jax.tree.leaves(variables)
    report, evaluations = FoldReport(), Evaluations()

    def stored(leaves: list[Array], inputs: Any) -> list[Array]:
        taken: list[Array] = []

        def take(array: Array) -> Array:
            taken.append(array)
            return array

        _Folding(program, take, report, evaluations).run(leaves, jax.tree.leaves(inputs))
        return taken

    beforehand, order = trace(stored, leaves, inputs, effects=False).distinct()
    if not report.folded and not report.alone and not report.scales:
        raise ValueError(
            "normjax: no norm found whose statistics come from the variables, expected at "
            "least one. If the call trains, its statistics come from the inputs: pass train=False "
            "(use_running_average=True in Flax)."
        )
    # The stored arrays depend on no input, so none is needed to compute them.
    nothing = [None] * len(jax.tree.leaves(inputs))
    compute = jax.jit(lambda leaves: tuple(beforehand.run([*leaves, *nothing])))
    abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    folded = jax.eval_shape(compute, leaves) if abstract else compute(leaves)
    return _server(call, variables, order, evaluations), folded, report


def _server(
    call: Callable, variables: Any, order: Sequence[int], evaluations: Evaluations
) -> Callable:
    """The function that serves, traced for each shape of its inputs.

    `order` has the index in `folded` of each array that is needed.
    """
    shapes = jax.eval_shape(lambda variables: variables, variables)
    leaves = jax.tree.leaves(shapes)

    def serve(folded: Sequence[Array], *inputs: Any) -> Any:
        program = trace(call, shapes, *inputs)

        def remaining(leaves: list[Any], folded: Sequence[Array], inputs: Any) -> Any:
            rest = iter([folded[place] for place in order])

            def take(array: Array) -> Array:
                given = next(rest, None)
                if given is None or given.shape != array.shape:
                    got = "nothing more" if given is None else f"shape {given.shape}"
                    raise ValueError(
                        f"serve: folded holds {got} where the call on these inputs needs "
                        f"{array.shape}. Pass the arrays that fold returned with serve; if you "
                        f"did, {ONE_SIZE}"
                    )
                return given

            folding = _Folding(program, take, FoldReport(), dict(evaluations))
            return folding.run(leaves, jax.tree.leaves(inputs))

        size = len(set(order))
        if not isinstance(folded, (tuple, list)) or len(folded) != size:
            is_sequence = isinstance(folded, (tuple, list))
            got = f"holds {len(folded)} arrays" if is_sequence else f"is {type(folded).__name__}"
            raise ValueError(
                f"serve: folded {got}, expected {size} arrays. Pass the arrays that fold "
                "returned with serve, not the variables of the model."
            )
        rest = trace(remaining, leaves, folded, inputs)
        values = rest.run([*leaves, *jax.tree.leaves((folded, inputs))])
        return jax.tree.unflatten(program.out_tree, values)

    return serve


class _Folding:
    """One pass over a program, which `take`s every array that is known before the call.

    The first pass records how it evaluated known values; later passes, over other shapes, follow
    this record, and so take the same arrays.
    """

    def __init__(
        self, program: FlatJaxpr, take: Callable, report: FoldReport, evaluations: Evaluations
    ):
        self.program, self.report, self.evaluations = program, report, evaluations
        self.uses = program.uses()
        self.counts: Counter[tuple[str, str]] = Counter()
        self.known: dict[int, Any] = {}
        self.reasons: dict[int, str] = dict.fromkeys(program.inputs, "it comes first")
        self.taken: dict[int, tuple[Array, Array]] = {}
        self._take = take

    def run(self, variables: Sequence[Any], inputs: Sequence[Any]) -> list[Array]:
        """The leaves of the result."""
        constants = self.program.constants.items()
        known = [Constant(value, value.shape, stored=True) for value in variables]
        self.known = {slot: Constant(value, jnp.shape(value)) for slot, value in constants}
        self.known |= dict(zip(self.program.inputs, (*known, *inputs), strict=True))
        for equation in self.program.equations:
            results = self.step(equation, [self.read(slot) for slot in equation.inputs])
            for slot, value in zip(equation.outputs, results, strict=True):
                self.known[slot] = self.settled(equation, slot, value)
        return [self.live(self.read(slot)) for slot in self.program.outputs]

    def read(self, slot: Any) -> Any:
        return (
            self.known[slot] if isinstance(slot, int) else Constant(slot.val, jnp.shape(slot.val))
        )

    def take(self, array: Array) -> Array:
        """Takes each array once. The array is stored with its id, so that the id is not reused."""
        if id(array) not in self.taken:
            self.taken[id(array)] = array, self._take(jnp.asarray(array))
        return self.taken[id(array)][1]

    def live(self, value: Any) -> Array:
        """A value as an array; a deferred affine map is computed."""
        if isinstance(value, Constant):
            return whole(value, self.take)
        if isinstance(value, DeferredAffine):
            if value.layer.reason is None:
                self.report.folded.extend((value.layer.where, norm) for norm in value.norms)
                self.report.scales.extend((value.layer.where, scale) for scale in value.scales)
            else:
                self.report.alone.extend((norm, value.layer.reason) for norm in value.norms)
            return value.emit(self.take)
        return value

    def settled(self, equation: Equation, slot: int, value: Any) -> Any:
        """A result; it is computed here if several equations read it."""
        self.reasons[slot] = f"{equation.name} stands between it and any layer"
        if isinstance(value, DeferredAffine) and self.uses[slot] > 1:
            self.reasons[slot] = (
                f"the output of {value.layer.where or 'its layer'} is used {self.uses[slot]} times"
            )
            return self.live(value)
        return value

    def step(self, equation: Equation, values: list[Any]) -> Sequence[Any]:
        """The results of one equation."""
        known = [isinstance(value, Constant) for value in values]
        if all(known):
            beforehand = self.evaluation(equation, evaluation(equation, values)) != "serving"
            return (
                evaluate(equation, values) if beforehand else equation.bind(*map(self.live, values))
            )
        pending = None
        if equation.name in LAYERS and sum(known) == 1:
            pending = self.layer(equation, values, known.index(True))
        elif equation.name in AFFINE:
            pending = self.affine(equation, values, known)
        elif isinstance(values[0], DeferredAffine) and len(values) == 1:
            pending = self.moved(equation, values[0])
        if pending is not None:
            return [pending]
        self.look_inside(equation, values)
        return equation.bind(*map(self.live, values))

    def evaluation(self, equation: Equation, found: str) -> str:
        """The evaluation of the first pass."""
        place = (equation.where, equation.name)
        self.counts[place] += 1
        first = self.evaluations.setdefault((*place, self.counts[place]), found)
        if found == "serving" != first:
            raise ValueError(
                f"serve: {equation.name} in {equation.where} was computed beforehand, "
                f"which these inputs do not allow: {ONE_SIZE}"
            )
        return first

    def layer(self, equation: Equation, values: list[Any], position: int) -> DeferredAffine | None:
        """A convolution or product of an input with a kernel."""
        kernel, out = values[position], equation.avals[0]
        is_kernel = position == 1 or equation.name == "dot_general"
        if not (is_kernel and kernel.stored and _is_inexact(out)):
            return None
        if self.evaluation(equation, "whole" if kernel.whole else "serving") == "serving":
            return None
        features = features_of(equation, position, len(kernel.shape))
        x = self.live(values[1 - position])
        layer = Layer(equation, x, (kernel.array, position), features, equation.where, None)
        return DeferredAffine.start(layer, out.shape, out.dtype)

    def affine(
        self, equation: Equation, values: list[Any], known: list[bool]
    ) -> DeferredAffine | None:
        """A known scale or shift of a value."""
        position = known.index(False)
        value, operand = values[position], values[1 - position] if len(values) > 1 else None
        if sum(known) != len(values) - 1 or (equation.name == "div" and position == 1):
            return None
        if value.shape != equation.avals[0].shape:
            return None  # a scalar that scales something known
        reason = self.reasons[equation.inputs[position]]  # type: ignore[index]  # no literal
        if isinstance(value, DeferredAffine):
            complete = value.complete and equation.name in ("mul", "div")
            if not complete and (operand is None or value.admits(operand)):
                return value.affine(equation, operand, reverse=position == 1)
            reason = value.layer.reason or (
                f"it differs along more than the features of {value.layer.where}"
            )
        if operand is None or not operand.stored or not _is_inexact(equation.avals[0]):
            return None
        x = self.live(value)
        layer = Layer(None, x, None, tuple(range(x.ndim)), "", reason)
        start = DeferredAffine.start(layer, x.shape, x.dtype)
        return start.affine(equation, operand, reverse=position == 1)

    def moved(self, equation: Equation, value: DeferredAffine) -> DeferredAffine | None:
        """A value in another layout or precision."""
        out = equation.avals[0]
        if equation.name in CASTS:
            same_kind = jnp.iscomplexobj(out) == jnp.iscomplexobj(value.layer.x)
            return value._replace(dtype=out.dtype) if same_kind and _is_inexact(out) else None
        return value.moved(equation)

    def look_inside(self, equation: Equation, values: list[Any]) -> None:
        """Reports norms inside a loop or a branch."""
        stored = any(isinstance(value, Constant) and value.stored for value in values)
        if equation.name in LOOPS and stored and "sqrt" in str(equation.params):
            self.report.alone.append(
                (equation.where, f"a norm inside a {equation.name} is not folded")
            )


def _is_inexact(aval: Any) -> bool:
    return jnp.issubdtype(aval.dtype, jnp.inexact)
