"""Batch norms seen from outside: recognized while a model runs, changed, and run again.

Every tool here that alters how a model acts is an `Edit`, which is shown each batch norm of a
call and returns it as it is or changed. This works on models whose code cannot be changed.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar, NamedTuple, cast

import flax.linen as nn
import jax
from flax.core import meta
from jax import lax

import normjax.linen
from normjax import BatchStats
from normjax.surgery._paths import Apply, chosen, expect_matches, written

_OURS: Any = normjax.linen.BatchNorm

# Layers with code of their own before those that they extend.
_OWN: Any = (normjax.linen.BatchNormAct, normjax.linen.BatchRenorm, _OURS)

# The bodies of the methods: a subclass that calls its parent's is met there, in the parent.
KINDS = {inspect.unwrap(kind.__call__) for kind in (nn.BatchNorm, *_OWN)}


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
    frozen: bool = False

    def stats(self) -> BatchStats:
        """The running statistics that the layer has now."""
        held = {n: _variable(self.module, "batch_stats", n) for n in BatchStats._fields}
        if held["mean"] is None or held["var"] is None:
            raise ValueError(
                f"normjax.surgery: the batch norm at '{self.path}' has no running statistics. "
                "Pass all that model.init returns, 'batch_stats' included."
            )
        return BatchStats(**held)


class Edit:
    """What a tool does to the batch norms of a call, at the paths that match."""

    called: ClassVar[str]

    def __init__(self, at: tuple[str, ...] | None):
        self.at = at
        self.known: set[str] = set()

    def __call__(self, layer: Layer) -> Layer:
        """The layer as it should run; itself if nothing is to be changed."""
        return layer


def wrap(apply: Apply, edit: type[Edit], at: Any, *options: Any) -> Apply:
    """`apply` with an edit in force during each call of it."""
    if isinstance(apply, nn.Module) or not callable(apply):
        raise TypeError(
            f"{edit.called}: got {type(apply).__name__}, expected a function that runs a "
            "model, such as model.apply."
        )
    # Edits are part of the key of jit's cache. Wrapping one model's apply twice gives one edit,
    # and what was compiled for it is found again.
    made = _made(cast(Any, edit), id(getattr(apply, "__self__", apply)), at, *options)

    @functools.wraps(apply)
    def edited(*args: Any, **kwargs: Any) -> Any:
        with editing(made):
            return apply(*args, **kwargs)

    return cast(Apply, edited)


@functools.lru_cache(maxsize=256)
def _made(edit: type[Edit], _: int, *arguments: Any) -> Edit:
    return edit(*arguments)


class _Met(NamedTuple):
    """What a call was seen to run. Nothing at all where jit remembers an earlier trace."""

    methods: list[str]
    norms: set[str]


_met: ContextVar[tuple[_Met, ...]] = ContextVar("met", default=())


@contextmanager
def editing(edit: Edit) -> Iterator[None]:
    """Puts an edit in force, after those of the wrappers inside."""
    outer, mine = _edits.value, _Met([], set())
    token = _met.set((*_met.get(), mine))
    try:
        with ExitStack() as stack:
            if not outer:
                stack.enter_context(nn.intercept_methods(_intercept))
            stack.enter_context(_edits((edit, *outer)))
            yield
    finally:
        _met.reset(token)
    edit.known |= mine.norms
    if mine.methods and not edit.known:
        raise ValueError(
            f"{edit.called}: no batch norm ran that is or extends flax.linen.BatchNorm, "
            "normjax.linen.BatchNorm or normjax.linen.BatchRenorm."
        )
    if mine.norms:
        expect_matches(edit.called, edit.at, edit.known)


def _intercept(next_fun: Callable, args: tuple, kwargs: dict[str, Any], context: Any) -> Any:
    for met in _met.get():
        met.methods.append(context.method_name)
    layer = _recognize(args, kwargs, context)
    if layer is None:
        return next_fun(*args, **kwargs)
    for met in _met.get():
        met.norms.add(layer.path)
    if layer.module.is_initializing():
        return next_fun(*args, **kwargs)
    changed = layer
    for edit in _edits.value:
        if chosen(layer.path, edit.at):
            changed = edit(changed)
    return next_fun(*args, **kwargs) if changed is layer else _run(changed)


def _recognize(args: tuple, kwargs: dict[str, Any], context: Any) -> Layer | None:
    """The batch norm that is called here, if it is one."""
    module: Any = context.module
    body: Any = getattr(context.orig_method, "func", None)
    if body not in KINDS:
        return None
    try:
        given = inspect.signature(body).bind(module, *args, **kwargs).arguments
    except TypeError:
        return None  # The layer itself says what is wrong with its arguments.
    average = given.get("use_running_average")
    if given.get("train") is None:
        average = nn.merge_param("use_running_average", module.use_running_average, average)
    elif average is not None or module.use_running_average is not None:
        return None  # Likewise: two modes.
    return Layer(
        path=written(module.path),
        module=module,
        x=given["x"],
        train=bool(given["train"]) if given.get("train") is not None else not average,
        mask=given.get("mask"),
        scale=given.get("scale"),
        bias=given.get("bias"),
        axis_name=module.axis_name,
        axis_index_groups=module.axis_index_groups,
    )


def _run(layer: Layer) -> Any:
    """Runs a changed layer: by the code of normjax, whichever library it comes from."""
    kind = next((kind for kind in _OWN if isinstance(layer.module, kind)), _OURS)
    body: Any = inspect.unwrap(kind.__call__)
    vectors = {name: _held(layer, getattr(layer, name)) for name in ("scale", "bias")}
    return body(_Edited(layer), layer.x, train=layer.train, mask=layer.mask, **vectors)


class _Edited:
    """A module as its code should see it: its variables, some of its fields in other values."""

    use_running_average = None

    def __init__(self, layer: Layer):
        self._layer = layer
        self.axis_name, self.axis_index_groups = layer.axis_name, layer.axis_index_groups

    def __getattr__(self, name: str) -> Any:
        # What a layer of Flax has no field for is as normjax has it by default.
        held = hasattr(self._layer.module, name)
        return getattr(self._layer.module if held else _OURS, name)

    def param(self, *arguments: Any) -> Any:
        """A frozen layer has parameters, and no gradient for them."""
        return _held(self._layer, self._layer.module.param(*arguments))


# The name that errors say.
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
            # Metadata of the compiler, which it ignores, is all that old JAX lets into the key.
            with set_xla_metadata(normjax_edits="-".join(str(id(edit)) for edit in edits)):
                yield
        finally:
            self._var.reset(token)


# A jitted function inside the model, or around it, must not run from a trace that was made
# without these edits.
_edits: Any = jax.make_user_context(()) if hasattr(jax, "make_user_context") else _Context()
