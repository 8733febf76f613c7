"""Wrappers that normalize the weights of a layer; its own parameters do not change."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import initializers
from flax.typing import Dtype, Initializer
from jax import Array

from normjax import _errors
from normjax._functions import SpectralStats
from normjax._modules import weight
from normjax._modules.adapter import feature_shape
from normjax.linen._adapter import MissingStatsError, param


@_errors.keywords
class WeightNorm(nn.Module):
    """`normjax.weight_norm` around a layer; a drop-in for `flax.linen.WeightNorm`.

    Attributes are those of Flax. `variable_filter` names the variables that are normalized, all
    if None; the parameter `<layer>/<path>/scale` is their length.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, normjax.linen
        >>> layer = normjax.linen.WeightNorm(nn.Dense(3))
        >>> variables = layer.init(jax.random.key(0), jnp.ones((2, 4)))
        >>> sorted(variables["params"])
        ['layer_instance', 'layer_instance/kernel/scale']
    """

    layer_instance: nn.Module
    epsilon: float = 1e-12
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_scale: bool = True
    scale_init: Initializer = initializers.ones
    feature_axes: int | Collection[int] | None = -1
    variable_filter: Iterable[str] | None = field(default_factory=lambda: {"kernel"})

    @nn.compact
    @_errors.named("normjax.linen.WeightNorm", runs_model=True)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the layer with normalized weights."""
        _errors.variable_names(self.variable_filter)

        def transform(path: str, w: Array) -> Array:
            if not _chosen(path, self.variable_filter):
                return w
            scale = None
            if self.use_scale:
                shape = feature_shape(self.feature_axes, w.shape)
                scale = param(self, "scale", shape, f"{path}/scale")
            return weight.normalized(self, w, scale)

        return _call(self, transform, args, kwargs)


@_errors.keywords
class SpectralNorm(nn.Module):
    """`normjax.spectral_norm` around a layer; a drop-in for `flax.linen.SpectralNorm`.

    Attributes are those of Flax. A call takes `update_stats`, as in Flax, or `train`.

    `epsilon` is relative to the largest entry of each vector, so that a weight of any size is
    normalized; Flax adds it to the squared length. With a large epsilon, such as 0.1, results
    differ from those of Flax.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, normjax.linen
        >>> layer = normjax.linen.SpectralNorm(nn.Dense(3))
        >>> variables = layer.init(jax.random.key(0), jnp.ones((2, 4)), train=False)
        >>> sorted(variables["batch_stats"])
        ['layer_instance/kernel/sigma', 'layer_instance/kernel/u']
    """

    layer_instance: nn.Module
    n_steps: int = 1
    epsilon: float = 1e-12
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    error_on_non_matrix: bool = False
    collection_name: str = "batch_stats"

    @nn.compact
    @_errors.named("normjax.linen.SpectralNorm", runs_model=True)
    def __call__(
        self,
        *args: Any,
        update_stats: bool | None = None,
        train: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Calls the layer with normalized weights; `train=True` updates the power iteration.

        If `update_stats` is given too, `train` is passed to the layer.
        """
        moves = _errors.moves(train, update_stats)
        n_steps = _errors.steps(self.n_steps)
        _errors.text("collection_name", self.collection_name)
        _errors.floating_dtype("param_dtype", self.param_dtype)
        if train is not None and update_stats is not None:
            kwargs["train"] = train

        def transform(path: str, w: Array) -> Array:
            if w.ndim < 2 or n_steps < 1:
                return w
            if self.error_on_non_matrix:
                _errors.only_matrix("Input", path, w.shape)
            name, dtype = self.collection_name, self.param_dtype
            known = self.has_variable(name, f"{path}/u")
            if not known and not (self.is_mutable_collection(name) and self.has_rng("params")):
                raise MissingStatsError(self.path, "sigma", f"{name}/{path}/u")
            key = None if known else self.make_rng("params")
            shape = (1, w.shape[-1])
            u = self.variable(name, f"{path}/u", jax.random.normal, key, shape, dtype)
            sigma = self.variable(name, f"{path}/sigma", jnp.ones, (), dtype)
            normed, stats = weight.by_sigma(self, w, SpectralStats(u.value, sigma.value), moves)
            if moves:
                u.value, sigma.value = stats
            return normed

        return _call(self, transform, args, kwargs, mutable=True)


@_errors.keywords
class WeightStandardized(nn.Module):
    """`normjax.standardize_weight` around a layer, for example Conv or Dense.

    The layer keeps its own parameters; a call uses standardized copies.

    Attributes:
        layer_instance: the layer.
        epsilon: added to the variance.
        scaled: the form of normalizer-free networks, which keeps the variance of the output.
        use_gain: whether each feature has a learned gain, `<layer>/<path>/gain`.
        gain_init: its initializer.
        feature_axes: the axes that are kept, by default the last.
        variable_filter: names of the variables that are standardized, all if None.
        dtype: of the weights that the layer sees; by default that of its parameters.
        param_dtype: of the gain.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, normjax.linen
        >>> layer = normjax.linen.WeightStandardized(nn.Conv(4, (3, 3)))
        >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 8, 8, 2)))
        >>> layer.apply(variables, jnp.ones((1, 8, 8, 2))).shape
        (1, 8, 8, 4)
    """

    layer_instance: nn.Module
    epsilon: float = 1e-5
    scaled: bool = False
    use_gain: bool = False
    gain_init: Initializer = initializers.ones
    feature_axes: int | Collection[int] = -1
    variable_filter: Iterable[str] | None = field(default_factory=lambda: {"kernel"})
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    @_errors.named("normjax.linen.WeightStandardized", runs_model=True)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the layer with standardized weights."""
        _errors.variable_names(self.variable_filter)

        def transform(path: str, w: Array) -> Array:
            if not _chosen(path, self.variable_filter):
                return w
            gain = None
            if self.use_gain:
                shape = feature_shape(self.feature_axes, w.shape)
                gain = param(self, "gain", shape, f"{path}/gain")
            return weight.standardized(self, w, gain)

        return _call(self, transform, args, kwargs)


def _call(
    module: Any, transform: Callable, args: tuple, kwargs: dict[str, Any],
    **options: Any,
) -> Any:  # fmt: skip
    """Calls the wrapped layer with each of its parameters transformed, by path."""
    _errors.layer(module.layer_instance, nn.Module, "flax.linen", "nn.Dense(3)")

    def by_path(keys: tuple, w: Array) -> Array:
        inner = jax.tree_util.keystr(keys[1:], simple=True, separator="/")
        path = f"{module.layer_instance.name}/{inner}"
        # Errors of the layer itself are not renamed.
        named = _errors.named("normjax", w=path, x=path, feature_axis="feature_axes", stats=path)
        return named(transform)(path, jnp.asarray(w))

    return nn.map_variables(
        lambda layer: layer(*args, **kwargs),
        trans_in_fn=lambda variables: jax.tree_util.tree_map_with_path(by_path, variables),
        init=module.is_initializing(),
        **options,
    )(module.layer_instance)


def _chosen(path: str, names: Iterable[str] | None) -> bool:
    return not names or any(name in path for name in names)
