"""Changes how the batch norms of a model run: frozen, or synchronized over devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from normjax import _errors
from normjax.surgery._layers import Edit, Layer, wrap
from normjax.surgery._paths import Apply, At, at_path, is_nnx, norms, patterns


@_errors.named("normjax.surgery.freeze")
def freeze(apply: Apply, *, at: At = None) -> Apply:
    """Makes batch norms use their running statistics and learn nothing, in any mode.

        y = (x - running mean) / sqrt(running var + epsilon) * scale + bias,   d scale = d bias = 0

    To unfreeze them, call the original function.

    Args:
        apply: the function that runs the model, such as `model.apply`. Or a model of flax.nnx.
        at: patterns over the paths of the layers ("block_*/bn", one or several), all if None. In
            NNX paths are those of attributes ("blocks/0/bn").

    Returns:
        A function of the arguments of `apply`; or a copy of the model, whose layers have
        `frozen=True`, also after `model.train()`.

    Guarantees:
        any model: layers of Flax and of normjax, linen and NNX, inside jit, remat, scan and vmap of
            Flax.
        copies too: another class that keeps mean and var in `batch_stats`, has no submodules and
            takes `use_running_average` (or `train`, `training`, `is_training`) is a batch norm.
        statistics stay: `batch_stats` is returned unchanged, also with train=True.
        learns nothing: gradients of scale and bias are zero.
        never a stale trace: a function that jit has compiled before is compiled again.

    Edge cases:
        ===================================  ==================================================
        no batch_stats of a layer            an error
        unrecognized module with statistics  an error, unless `at` leaves it out
        at= inside of nn.jit                 an error: equal blocks there share one trace
        frozen layer of nnx, train=True      an error; model.train() is not
        copy of batch norm in nnx            an error, and so is a subclass of flax.nnx.BatchNorm
                                             with a __call__ of its own
        init                                 runs unchanged; there is nothing to freeze yet
        ===================================  ==================================================

    Raises:
        TypeError: `apply` is a module of linen, or cannot be called.
        ValueError: when called (for NNX at once): no batch norm ran (as in a model that is not of
            Flax), a module with a mean and a var is not recognized, or a pattern matches none
            (they are listed).

    References:
        He et al. (2016), arXiv:1512.03385, appendix A: batch norm fixed while fine-tuning.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from normjax import surgery
        >>> model, x = nn.BatchNorm(use_running_average=False), jnp.array([[0.0], [4.0]])
        >>> variables = model.init(jax.random.key(0), x)
        >>> surgery.freeze(model.apply)(variables, x).round(2).ravel()
        Array([0., 4.], dtype=float32)
    """
    if is_nnx(apply):
        from normjax.surgery._nnx import modes

        return modes.freeze(apply, patterns(at))
    return wrap(apply, _Freeze, patterns(at))


class _Freeze(Edit):
    called = "normjax.surgery.freeze"

    def __call__(self, layer: Layer) -> Layer:
        layer.stats()
        return layer._replace(train=False, frozen=True)


@_errors.named("normjax.surgery.frozen_mask")
def frozen_mask(variables: Any, *, at: At = None) -> Any:
    """An optax mask of the parameters of frozen batch norms.

        True for scale and bias of a chosen layer, False elsewhere

    The gradients of a frozen layer are zero, but weight decay and the momentum of an optimizer
    still change its parameters. To keep them, use
    `optax.chain(optimizer, optax.masked(optax.set_to_zero(), frozen_mask(variables)))`.

    Args:
        variables: all variables of the model, since `batch_stats` shows which layers are batch
            norms. Or a model of flax.nnx.
        at: as in `freeze`.

    Returns:
        A tree of booleans of the structure of `variables["params"]`; for NNX of the parameters as
        `nnx.Optimizer` passes them to optax.

    Guarantees:
        by role: a layer is a batch norm by its statistics, not by its name.

    Raises:
        TypeError: `variables` is not a dictionary.
        ValueError: there are no statistics or no params, or a pattern matches none (they are
            listed).

    References:
        Loshchilov, Hutter (2019), arXiv:1711.05101: decay that is no gradient.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from normjax import surgery
        >>> model = nn.Sequential([nn.Dense(2), nn.BatchNorm(use_running_average=True)])
        >>> variables = model.init(jax.random.key(0), jnp.ones((2, 3)))
        >>> surgery.frozen_mask(variables)["layers_1"]
        {'bias': True, 'scale': True}
    """
    if is_nnx(variables):
        from normjax.surgery._nnx import modes

        return modes.frozen_mask(variables, patterns(at))
    frozen = norms(variables, at)
    if "params" not in variables:
        raise ValueError(
            f"normjax: the variables have no 'params'; their collections are {sorted(variables)}. "
            "Pass all that model.init returns."
        )
    params = variables["params"]

    def belongs(path: tuple, _: Any) -> bool:
        names = tuple(str(getattr(key, "key", key)) for key in path)
        return any(names[: len(norm)] == norm and at_path(params, norm) for norm in frozen)

    return jax.tree_util.tree_map_with_path(belongs, params)


@_errors.named("normjax.surgery.synchronize")
def synchronize(apply: Apply, axis_name: str | Sequence[str], *, at: At = None) -> Apply:
    """Makes batch norms share their batch statistics over `axis_name`.

        moments = merge of the moments of all devices along axis_name

    Args:
        apply: the function that runs the model, such as `model.apply`. Call the result where the
            axis is bound by pmap, shard_map or vmap. Or a model of flax.nnx.
        axis_name: one name or several.
        at: as in `freeze`.

    Returns:
        A function of the arguments of `apply`; or a copy of the model with this `axis_name`.

    Guarantees:
        shared exactly: equal to one call on the whole batch, in value, gradient and statistics,
            for layers of Flax too.
        evaluation unchanged: layers that use their running statistics share nothing.

    Edge cases:
        ===================================  ==================================================
        the layer has an axis_name           it is replaced by this one
        ===================================  ==================================================

    Raises:
        TypeError: `apply` is a module of linen, or cannot be called.
        ValueError: when called (for NNX at once): no batch norm ran (as in a model that is not of
            Flax), a module with a mean and a var is not recognized, or a pattern matches none
            (they are listed).
        NameError: when called: `axis_name` is not bound.

    References:
        Peng et al. (2018), MegDet, arXiv:1711.07240: batch norm across devices.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from normjax import surgery
        >>> model, x = nn.BatchNorm(use_running_average=False), jnp.array([[[0.0]], [[4.0]]])
        >>> variables = model.init(jax.random.key(0), x[0])
        >>> apply = surgery.synchronize(model.apply, "batch")
        >>> step = lambda x: apply(variables, x, mutable=["batch_stats"])[0]
        >>> jax.vmap(step, axis_name="batch")(x).round(2).ravel()
        Array([-1.,  1.], dtype=float32)
    """
    names = axis_name if isinstance(axis_name, str | int) else tuple(axis_name)
    if isinstance(names, int) or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"normjax: axis_name={axis_name!r}, expected the name of a mapped axis or several, "
            "such as 'batch'."
        )
    if is_nnx(apply):
        from normjax.surgery._nnx import modes

        return modes.synchronize(apply, names, patterns(at))
    return wrap(apply, _Synchronize, patterns(at), names)


class _Synchronize(Edit):
    called = "normjax.surgery.synchronize"

    def __init__(self, at: tuple[str, ...] | None, axis_name: str | tuple[str, ...]):
        super().__init__(at)
        self.axis_name = axis_name

    def __call__(self, layer: Layer) -> Layer:
        if not layer.train:
            return layer
        if not hasattr(layer.module, "axis_name"):
            raise ValueError(
                f"normjax: the {type(layer.module).__name__} at '{layer.path}' has no field "
                "axis_name, so it cannot share its statistics. Name the others: at=."
            )
        return layer._replace(axis_name=self.axis_name, axis_index_groups=None)
