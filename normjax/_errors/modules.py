"""Errors of NNX modules: mode, number of features, missing variables."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import jax
import numpy as np

from normjax._errors.arrays import Features, number_of_groups, whole
from normjax._errors.options import Mode, mode, switch


def mode_of(held: bool | None, frozen: bool, at_call: dict[str, bool | None]) -> Mode:
    """The mode at the call, `train` or `use_running_average`, overrides that of the module."""
    name = "use_running_average"
    is_asked = any(value is not None for value in at_call.values())
    if is_asked:
        found = mode(at_call["train"], None, at_call[name])
    elif held is None:
        raise ValueError(
            f"normjax: no mode was given. No `{name}` argument was provided to BatchNorm. Expected "
            "one: call model.train() or model.eval(), pass train=True or train=False at the call, "
            f"or set {name} at construction or by nnx.view."
        )
    else:
        average = switch(name, held)
        found = Mode(not average, f"{name}={average}", "call model.eval(), or pass train=False.")
    if not switch("frozen", frozen):
        return found
    if is_asked and found.train:
        raise ValueError(
            f"normjax: {found.asked} asks a frozen layer to train. Leave the mode out at the call, "
            "or unfreeze the layer: model.set_attributes(frozen=False)."
        )
    return found._replace(train=False)


def feature_count(given: Any) -> int:
    """How many features a module is built for."""
    expected = "a whole number of at least 0, the size of the feature axes."
    number = whole("num_features", given, expected)
    if number < 0:
        raise ValueError(f"normjax: num_features={given}, expected {expected}")
    return number


def num_features(name: str, held: tuple[int, ...], features: Features) -> None:
    """A variable has an entry for each feature of x."""
    if prod(held) != prod(features.shape):
        raise ValueError(
            f"normjax: x with shape {features.x} has {prod(features.shape)} features along "
            f"feature_axis={features.given!r}, expected num_features={prod(held)}, the size of "
            f"{name}. If the features lie on another axis, pass feature_axis=."
        )


def random_streams(value: Any) -> None:
    """The random streams of the initializers."""
    if not hasattr(value, "params"):
        raise TypeError(
            f"normjax: rngs is {type(value).__name__}, expected nnx.Rngs. Pass rngs=nnx.Rngs(0), "
            "or nnx.Rngs(key)."
        )


def restored(name: str, value: Any) -> Any:
    """The value of a variable, which a restored state may have left abstract."""
    if not isinstance(value, (jax.Array, np.ndarray, np.generic, int, float, complex)):
        raise ValueError(
            f"normjax: {name} is {type(value).__name__}, expected an array: the restored state "
            "does not contain it. Restore both nnx.Param and nnx.BatchStat."
        )
    return value


def groups_of_features(
    num_groups: int | None, group_size: int | None, features: int
) -> tuple[int, int]:
    """How many groups of features there are, and how large each is."""
    features = feature_count(features)
    groups = number_of_groups(num_groups, group_size, features, "features")
    return groups, features // groups


def has_count(needed: bool, held: bool) -> None:
    """A layer that needs the number of batches must count them from the start."""
    if needed and not held:
        raise ValueError(
            "normjax: momentum=None, debias=True and schedules need the variable count, which the "
            "layer does not have. Build the layer with these arguments."
        )


def some_batch_norm(number: int, model: Any) -> None:
    """A model without a batch norm is most likely the wrong model."""
    if not number:
        raise ValueError(
            f"normjax: {type(model).__name__} has no batch norm of normjax.nnx, expected a module "
            "of flax.nnx that has at least one. Pass the whole model."
        )


def some_moments(number: int) -> None:
    """Statistics are updated by kept moments."""
    if not number:
        raise ValueError(
            "normjax: no batch norm has kept moments, expected at least one that did. Run the "
            "model in training with accumulate=True: model.set_attributes(accumulate=True)."
        )


def moments_to_share(accumulate: bool, held: bool) -> None:
    """A view shares the variables of its layer; a new variable would be lost with the view."""
    if accumulate and not held:
        raise ValueError(
            "normjax: accumulate=True in a view of a layer without the variable moments, expected "
            "a layer that has it, since a view cannot add it. Build the layer with "
            "accumulate=True, or call normjax.nnx.empty_batch_moments(model) before."
        )


def of_weight(held: Mapping[Any, Any] | None, path: tuple[Any, ...]) -> Any:
    """The variable that a wrapper keeps for a weight of its layer."""
    if held is None or path not in held:
        raise RuntimeError(
            f"normjax: the layer has the param {path}, for which the wrapper has no variable, "
            f"expected one of {list(held or ())}. Parameters of the layer_instance should not "
            "change! Wrap the layer when it is complete."
        )
    restored("/".join(map(str, path)), held[path].get_value())
    return held[path]
