"""Intercepts batch norms while a model runs, without changes to its code.

Every tool that changes how a model runs is an `Edit`: it gets each batch norm of a call, and
returns it unchanged or changed.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, ParamSpec, TypeVar, cast

import flax.linen as nn
import jax
from flax.core import meta
from jax import lax

import normjax.linen
from normjax import BatchStats, _errors
from normjax._errors.devices import bound_names
from normjax.surgery._copies import copy_of, run_copy, statistics_of
from normjax.surgery._kept import Kept
from normjax.surgery._paths import Apply, chosen, expect_matches, expect_no_state, is_nnx, path_name

P = ParamSpec("P")
R = TypeVar("R")

_OURS: Any = normjax.linen.BatchNorm

# The bodies of the methods. A subclass that calls its parent's method is recognized in that call.
KINDS = {inspect.unwrap(kind.__call__) for kind in (nn.BatchNorm, _OURS)}


class Layer(NamedTuple):
    """One call of one batch norm. Edits return it with other values."""

    path: str
    module: Any
    x: Any
    train: bool
    mask: Any
    scale: Any
    bias: Any
    axis_name: Any
    axis_index_groups: Any
    run: Callable[[Layer], Any]
    frozen: bool = False

    @property
    def axis(self) -> Any:
        """The feature axes; the default of Flax if a copy has no such field."""
        return getattr(self.module, "axis", _OURS.axis)

    @property
    def epsilon(self) -> float:
        """Added to the variance; likewise."""
        return float(getattr(self.module, "epsilon", getattr(self.module, "eps", _OURS.epsilon)))

    def unmapped(self) -> Layer:
        """Without its device axis if no axis is bound: then this batch is the whole batch."""
        alone = self.train and self.axis_name is not None and not bound_names()
        return self._replace(axis_name=None, axis_index_groups=None) if alone else self

    def stats(self) -> BatchStats:
        """The running statistics that the layer has now."""
        held = {n: _variable(self.module, "batch_stats", n) for n in BatchStats._fields}
        if held["mean"] is None or held["var"] is None:
            raise ValueError(
                f"normjax: the batch norm at '{self.path}' has no running statistics. "
                "Pass all that model.init returns, 'batch_stats' included."
            )
        return BatchStats(**held)


class Edit:
    """The change of a tool to the batch norms of a call, at the paths that match.

    Its errors get its name where they are raised, since they pass through wrappers of other tools.
    """

    called: ClassVar[str]
    _numbers = itertools.count()

    def __init__(self, at: tuple[str, ...] | None):
        self.at = at
        self.known: set[str] = set()
        self.number = next(Edit._numbers)

    def __call__(self, layer: Layer) -> Layer:
        """The layer as it should run; the same object if nothing changes."""
        return layer

    def unrecognized(self, path: str, module: Any, collection: str) -> None:
        """Called for a module that ran and has statistics, but is not a known batch norm."""
        raise ValueError(
            f"normjax: the {type(module).__name__} at '{path}' {not_recognized(collection)} "
            "If it is no batch norm, name those that are: at=."
        )


def not_recognized(collection: str) -> str:
    """Why a module with statistics is not treated as a batch norm, and what is."""
    return (
        f"holds a mean and a var in '{collection}', as a batch norm does, and was not recognized "
        "as one. Recognized are flax.linen.BatchNorm, normjax.linen.BatchNorm and BatchRenorm, "
        "what extends them, and modules that keep mean and var in 'batch_stats', have no "
        "submodules, and take use_running_average (or train, training, is_training) as a field "
        "or when called."
    )


def expect_function(function: Any, expected: str) -> None:
    """Rejects models and other objects in place of a function that runs a model."""
    expect_no_state(function)
    if isinstance(function, nn.Module) or is_nnx(function) or not callable(function):
        raise TypeError(f"normjax: got {type(function).__name__}, expected {expected}")


# Edits are part of the key of jit's cache. Wrapping a model's apply twice gives the same edit, so
# that compiled functions are found again.
_made = Kept()


def wrap(apply: Apply, edit: Callable[..., Edit], *arguments: Any) -> Apply:
    """`apply` with an edit in force during each call of it."""
    expect_function(apply, "a function that runs a model, such as model.apply.")
    # Each access of `model.apply` makes a new method of the same model.
    owner = getattr(apply, "__self__", apply)
    key = (edit, getattr(apply, "__func__", None), *arguments)
    made = _made.get(owner, key, lambda: edit(*arguments))

    @functools.wraps(apply)
    @_errors.named(made.called, runs_model=True)
    def edited(*args: Any, **kwargs: Any) -> Any:
        with editing(made):
            return apply(*args, **kwargs)

    return cast(Apply, edited)


@dataclass
class _Observed:
    """The modules that ran in a call; none if jit uses an earlier trace.

    Attributes:
        ran: whether any module of linen did.
        initialized: whether that was init.
        norms: the paths of the batch norms.
        jitted: the names of modules under nn.jit.
    """

    ran: bool = False
    initialized: bool = False
    norms: set[str] = field(default_factory=set)
    jitted: set[str] = field(default_factory=set)


_observed: ContextVar[tuple[_Observed, ...]] = ContextVar("observed", default=())


@contextmanager
def editing(edit: Edit) -> Iterator[None]:
    """Puts an edit in force, after those of the wrappers inside."""
    outer, mine = _edits.value, _Observed()
    token = _observed.set((*_observed.get(), mine))
    try:
        with ExitStack() as stack:
            if not outer:
                stack.enter_context(nn.intercept_methods(_intercept))
            stack.enter_context(_edits((edit, *outer)))
            yield
    finally:
        _observed.reset(token)
    edit.known |= mine.norms
    if not edit.known and mine.ran and not mine.initialized:
        raise ValueError(
            "normjax: no batch norm ran. Recognized are flax.linen.BatchNorm, "
            "normjax.linen.BatchNorm and BatchRenorm, what extends them, and copies that keep "
            "mean and var in 'batch_stats' and take use_running_average."
        )
    if not edit.known and not mine.ran:
        raise ValueError(
            "normjax: no module of flax.linen ran. A function is one that traces a model of "
            "flax.linen, such as model.apply or jax.jit of it. A model of flax.nnx is passed "
            "itself, in place of a function."
        )
    if mine.norms:
        expect_matches(edit.at, edit.known)
        _expect_own_traces(edit, mine)


def _expect_own_traces(edit: Edit, observed: _Observed) -> None:
    """Equal blocks under nn.jit share one trace, so a path cannot select one of them."""
    if edit.at is None:
        return
    for path in sorted(observed.norms):
        inside = observed.jitted.intersection(path.split("/"))
        if inside and chosen(path, edit.at):
            raise ValueError(
                f"normjax: at={edit.at!r} names '{path}', which is inside of '{min(inside)}' "
                "under nn.jit. Equal blocks under nn.jit share one trace, so what is done to one "
                "of them is done to all. Leave out nn.jit and compile the whole: "
                "jax.jit(model.apply)."
            )


def _is_jitted(kind: type) -> bool:
    """Whether a class is made by nn.jit, or has a method that is."""
    makers = ("module_class_lift_transform_cached", "decorator_lift_transform_cached")
    codes = (getattr(method, "__code__", None) for method in vars(kind).values())
    return any(code is not None and code.co_qualname.startswith(makers) for code in codes)


def _intercept(next_fun: Callable, args: tuple, kwargs: dict[str, Any], context: Any) -> Any:
    module: Any = context.module
    for observed in _observed.get():
        observed.ran = True
        observed.initialized |= module.scope is not None and module.is_initializing()
        if module.name and _is_jitted(type(module)):
            observed.jitted.add(module.name)
    body: Any = getattr(context.orig_method, "func", None)
    path = path_name(module.path) if module.scope is not None else ""
    layer = _recognize(path, next_fun, args, kwargs, context, body)
    if layer is None:
        out = next_fun(*args, **kwargs)
        if context.method_name != "setup" and module.scope is not None:
            _report_unrecognized(path, module)
        return out
    for observed in _observed.get():
        observed.norms.add(path)
    if module.is_initializing():
        return next_fun(*args, **kwargs)
    changed = layer
    for edit in _edits.value:
        if chosen(path, edit.at):
            changed = _named(edit)(edit.__call__)(changed)
    return next_fun(*args, **kwargs) if changed is layer else changed.run(changed)


def _named(edit: Edit) -> Callable[[Callable[P, R]], Callable[P, R]]:
    return _errors.named(edit.called, runs_model=True, feature_axis="axis")


def _report_unrecognized(path: str, module: Any) -> None:
    """Reports a module that ran with its own statistics and was not recognized."""
    if module.is_initializing() or any(path in observed.norms for observed in _observed.get()):
        return
    if collection := statistics_of(module):
        for edit in _edits.value:
            if chosen(path, edit.at):
                _named(edit)(edit.unrecognized)(path, module, collection)


def _recognize(
    path: str, next_fun: Callable, args: tuple, kwargs: dict[str, Any], context: Any, body: Any
) -> Layer | None:
    """The batch norm of this call, if it is one."""
    module: Any = context.module
    if body in KINDS:
        return _recognize_kind(path, args, kwargs, module, body)
    if context.method_name != "__call__" or module.scope is None or module.is_initializing():
        return None
    copy = copy_of(module, body, args, kwargs)
    if copy is None:
        return None

    def run(layer: Layer) -> Any:
        devices = {name: getattr(layer, name) for name in ("axis_name", "axis_index_groups")}
        return run_copy(copy, next_fun, module, layer.train, layer.frozen, devices)

    return Layer(
        path=path,
        module=module,
        x=copy.x,
        train=copy.train,
        mask=copy.bound.arguments.get("mask"),
        scale=None,
        bias=None,
        axis_name=getattr(module, "axis_name", None),
        axis_index_groups=getattr(module, "axis_index_groups", None),
        run=run,
    )


def _recognize_kind(
    path: str, args: tuple, kwargs: dict[str, Any], module: Any, body: Any
) -> Layer | None:
    """A batch norm whose code is known, by the arguments that it is called with."""
    try:
        given = inspect.signature(body).bind(module, *args, **kwargs).arguments
    except TypeError:
        return None  # The layer itself raises for its arguments.
    average = given.get("use_running_average")
    if given.get("train") is None:
        average = nn.merge_param("use_running_average", module.use_running_average, average)
    elif average is not None or module.use_running_average is not None:
        return None  # Likewise: two modes.
    return Layer(
        path=path,
        module=module,
        x=given["x"],
        train=bool(given["train"]) if given.get("train") is not None else not average,
        mask=given.get("mask"),
        scale=given.get("scale"),
        bias=given.get("bias"),
        axis_name=module.axis_name,
        axis_index_groups=module.axis_index_groups,
        run=_run,
    )


def _run(layer: Layer) -> Any:
    """Runs a changed layer with the code of normjax, also if it is a layer of Flax."""
    body: Any = inspect.unwrap(_OURS.__call__)
    vectors = {name: _held(layer, getattr(layer, name)) for name in ("scale", "bias")}
    return body(_Edited(layer), layer.x, train=layer.train, mask=layer.mask, **vectors)


class _Edited:
    """A module with its own variables, and other values of some fields."""

    use_running_average = None

    def __init__(self, layer: Layer):
        self._layer = layer
        self.axis_name, self.axis_index_groups = layer.axis_name, layer.axis_index_groups

    def __getattr__(self, name: str) -> Any:
        # Fields that a layer of Flax does not have get the defaults of normjax.
        held = hasattr(self._layer.module, name)
        return getattr(self._layer.module if held else _OURS, name)

    def param(self, *arguments: Any) -> Any:
        """A parameter, which gets no gradient if the layer is frozen."""
        return _held(self._layer, self._layer.module.param(*arguments))


# The name in errors.
_Edited.__name__ = _OURS.__name__


def _held(layer: Layer, value: Any) -> Any:
    return lax.stop_gradient(value) if layer.frozen and value is not None else value


def _variable(module: Any, collection: str, name: str) -> Any:
    return meta.unbox(module.get_variable(collection, name))


class _Context:
    """The edits in force, in the key of jit's cache, for JAX before `jax.make_user_context`."""

    def __init__(self) -> None:
        self._var: ContextVar[tuple[Edit, ...]] = ContextVar("edits", default=())

    @property
    def value(self) -> tuple[Edit, ...]:
        return self._var.get()

    @contextmanager
    def __call__(self, edits: tuple[Edit, ...]) -> Iterator[None]:
        from jax.experimental.xla_metadata import set_xla_metadata

        token = self._var.set(edits)
        try:
            # Old JAX lets only compiler metadata into the key; the compiler ignores this one.
            key = "-".join(str(edit.number) for edit in edits)
            with set_xla_metadata(normjax_edits=key):
                yield
        finally:
            self._var.reset(token)


# A jitted function inside the model, or around it, must not run from a trace that was made
# without these edits.
_edits: Any = jax.make_user_context(()) if hasattr(jax, "make_user_context") else _Context()
