"""Adapts a module of linen or NNX for the functions: its fields, parameters and devices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from normjax import _errors


class Call(NamedTuple):
    """The arguments of a module's call; scale and bias replace its parameters."""

    x: Any
    mask: Any = None
    scale: Any = None
    bias: Any = None


class Adapter(NamedTuple):
    """A module of either framework.

    Attributes:
        fields: the module; its fields are attributes that have the names of Flax.
        param: `param(name, features)` is the parameter of that name and of the shape of the
            features; without features it is a number.
        initializing: whether the call only creates parameters; it shares nothing over devices.
        alone: whether this batch is the whole batch, even if the fields name a device axis.
        frozen: whether no gradient reaches the parameters.
        promote: `promote(arrays, dtype=...)`, a rule of the user for the dtypes of x, the running
            statistics, scale and bias. None: only y has the dtype to which they promote.
        promotes_stats: whether the dtype of y depends on that of the running statistics.
    """

    fields: Any
    param: Callable[[str, _errors.Features | None], Any]
    initializing: bool = False
    alone: bool = False
    frozen: bool = False
    promote: Callable[..., Any] | None = None
    promotes_stats: bool = False

    def affine(self, features: _errors.Features, call: Call) -> tuple[Any, Any]:
        """Scale and bias: those of the call, or else the parameters that the module uses."""

        def vector(name: str, given: Any) -> Any:
            if given is not None:
                return _errors.inexact(name, given)
            return self.held(name, features) if getattr(self.fields, f"use_{name}", False) else None

        # In the order of Flax, which decides what the initializers draw.
        return vector("scale", call.scale), vector("bias", call.bias)

    def held(self, name: str, features: _errors.Features | None = None) -> Any:
        """The parameter `name`; a constant if the module is frozen."""
        value = self.param(name, features)
        return lax.stop_gradient(value) if self.frozen else value

    def devices(self) -> dict[str, Any]:
        """Which devices share statistics; none in init, as in Flax."""
        none = self.initializing or self.alone
        names = () if none else ("axis_name", "axis_index_groups")
        return {name: getattr(self.fields, name) for name in names if hasattr(self.fields, name)}

    def promoted(self, *arrays: Any) -> tuple[Any, ...]:
        """The arrays in the dtypes of the user's rule, if there is one."""
        if self.promote is None:
            return arrays
        return tuple(self.promote(arrays, dtype=self.fields.dtype))


def operands(
    adapter: Adapter, call: Call, feature_axes: int | Iterable[int]
) -> tuple[tuple[Any, Any, Any], dict[str, Any]]:
    """x, scale and bias, and the options that all norms within an example have."""
    x = _errors.inexact("x", call.x)
    scale, bias = adapter.affine(_errors.features(x.shape, feature_axes), call)
    x, scale, bias = adapter.promoted(x, scale, bias)
    options = dict(
        epsilon=adapter.fields.epsilon,
        mask=_errors.nonzero(call.mask),
        dtype=output_dtype(adapter.fields.dtype, x, scale, bias),
        **adapter.devices(),
    )
    return (x, scale, bias), options


def make_param(init: Any, name: str, key: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    """A new parameter; `init` is the field `<name>_init` of the module."""
    expect_initializer(name, init, dtype)
    return init(key, shape, dtype)


def expect_initializer(name: str, init: Any, dtype: Any) -> None:
    """Checks the initializer of the parameter `name`, and its dtype."""
    _errors.initializer(f"{name}_init", init)
    _errors.floating_dtype("param_dtype", dtype)


def feature_shape(
    feature_axes: int | Iterable[int] | None, shape: tuple[int, ...]
) -> tuple[int, ...]:
    """The shape of a parameter over these axes; None names none."""
    if feature_axes is None:
        return ()
    return _errors.features(shape, feature_axes).shape


def output_dtype(dtype: DTypeLike | None, *arrays: Any) -> DTypeLike:
    """`dtype` if given, else what the input and the parameters promote to, as in Flax."""
    if dtype is not None:
        _errors.floating_dtype("dtype", dtype)
        return dtype
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*(v for v in arrays if v is not None))
