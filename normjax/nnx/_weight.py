"""Wrappers that normalize the weights of a layer; its own parameters do not change."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, InitVar, dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.errors import TraceContextError
from flax.nnx import initializers
from flax.nnx.nn.dtypes import promote_dtype
from flax.typing import Dtype, Initializer, PromoteDtypeFn
from jax import Array

from normjax import _errors
from normjax._functions import SpectralStats
from normjax._modules import weight
from normjax._modules.adapter import feature_shape, make_param
from normjax.nnx._adapter import make_static

# The path of a variable within the layer, as in `nnx.to_flat_state`.
Path = tuple[Any, ...]


@_errors.keywords
@dataclass(eq=False, repr=False)
class WeightNorm(nnx.Module):
    """`normjax.weight_norm` around a layer; a drop-in for `flax.nnx.WeightNorm`.

    Arguments are those of Flax. The lengths, `scales[path]`, are parameters, and the layer keeps
    its weights: they are normalized only during a call. In Flax the lengths are not parameters,
    and the weights are overwritten.

    Example:
        >>> import jax.numpy as jnp, normjax.nnx
        >>> from flax import nnx
        >>> rngs = nnx.Rngs(0)
        >>> layer = normjax.nnx.WeightNorm(nnx.Linear(4, 3, rngs=rngs), rngs=rngs)
        >>> layer.scales["kernel",][...]
        Array([1., 1., 1.], dtype=float32)
        >>> layer(jnp.ones((2, 4))).shape
        (2, 3)
    """

    layer_instance: nnx.Module
    _: KW_ONLY
    feature_axes: int | Collection[int] | None = -1
    use_scale: bool = True
    scale_init: InitVar[Initializer] = initializers.ones
    epsilon: float = 1e-12
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    variable_filter: Any = nnx.PathContains("kernel")
    promote_dtype: PromoteDtypeFn = promote_dtype
    rngs: InitVar[nnx.Rngs]

    def __post_init__(self, scale_init: Any, rngs: Any) -> None:
        _errors.layer(self.layer_instance, nnx.Module, "flax.nnx", "nnx.Linear(4, 3, rngs=rngs)")
        make_static(self)
        self.scales = nnx.data(None)
        if self.use_scale:
            self.scales = nnx.data(_parameters(self, "scale", scale_init, rngs))

    @_errors.named("normjax.nnx.WeightNorm", runs_model=True)
    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls the layer with normalized weights."""

        def transform(path: Path, w: Array) -> Array:
            scale = _errors.of_weight(self.scales, path)[...] if self.use_scale else None
            return weight.normalized(self, w, scale)

        with _transformed(self.layer_instance, self.variable_filter, transform):
            return self.layer_instance(x, *args, **kwargs)


@_errors.keywords
@dataclass(eq=False, repr=False)
class SpectralNorm(nnx.Module):
    """`normjax.spectral_norm` around a layer; a drop-in for `flax.nnx.SpectralNorm`.

    Arguments and variables are those of Flax; `batch_stats[(*path, "u")]` and `"sigma"` are the
    state of the power iteration. The layer keeps its weights. `model.train()` and `model.eval()`,
    or `update_stats` or `train` at the call, set whether the state is updated.

    `epsilon` is relative to the largest entry of each vector; see `normjax.linen.SpectralNorm`.

    Example:
        >>> import jax.numpy as jnp, normjax.nnx
        >>> from flax import nnx
        >>> rngs = nnx.Rngs(0)
        >>> layer = normjax.nnx.SpectralNorm(nnx.Linear(4, 3, rngs=rngs), rngs=rngs)
        >>> sorted(layer.batch_stats)
        [('kernel', 'sigma'), ('kernel', 'u')]
    """

    layer_instance: nnx.Module
    _: KW_ONLY
    n_steps: int = 1
    epsilon: float = 1e-12
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    error_on_non_matrix: bool = False
    update_stats: InitVar[bool] = True
    rngs: InitVar[nnx.Rngs]

    def __post_init__(self, update_stats: bool, rngs: Any) -> None:
        _errors.layer(self.layer_instance, nnx.Module, "flax.nnx", "nnx.Linear(4, 3, rngs=rngs)")
        self.n_steps = _errors.steps(self.n_steps)
        # The name that model.train() and model.eval() set.
        self.use_running_average = not _errors.switch("update_stats", update_stats)
        stats = {}
        for path, param in _params(self.layer_instance):
            if param.ndim < 2 or self.n_steps < 1:
                continue
            if self.error_on_non_matrix:
                _errors.only_matrix("Layer instance parameter", _path_name(path), param.shape)
            makes = (
                ("u", initializers.normal(), (1, param.shape[-1])),
                ("sigma", initializers.ones, ()),
            )
            key = rngs.params()
            for name, init, shape in makes:
                value = make_param(init, name, key, shape, self.param_dtype)
                stats[*path, name] = nnx.BatchStat(value)
        self.batch_stats = nnx.data(stats)

    @_errors.named("normjax.nnx.SpectralNorm", runs_model=True)
    def __call__(
        self,
        x: Any,
        update_stats: bool | None = None,
        *,
        train: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Calls the layer with normalized weights; training updates the power iteration.

        As in Flax, the layer gets one positional argument. If `update_stats` is given too, `train`
        is passed to the layer.
        """
        if train is not None and update_stats is not None:
            kwargs["train"] = train
        if train is None and update_stats is None and self.use_running_average is not None:
            update_stats = not self.use_running_average
        moves = _errors.moves(train, update_stats)

        def transform(path: Path, w: Array) -> Array:
            if w.ndim < 2 or self.n_steps < 1:
                return w
            u, sigma = (_errors.of_weight(self.batch_stats, (*path, n)) for n in ("u", "sigma"))
            normed, stats = weight.by_sigma(self, w, SpectralStats(u[...], sigma[...]), moves)
            if moves:
                u.set_value(stats.u)
                sigma.set_value(stats.sigma)
            return normed

        with _transformed(self.layer_instance, nnx.Param, transform):
            return self.layer_instance(x, **kwargs)

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Options of `nnx.view`; indented by two, as `nnx.view_info` reads them.

        Args:
          use_running_average: if True, the power iteration is not updated.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average


@_errors.keywords
@dataclass(eq=False, repr=False)
class WeightStandardized(nnx.Module):
    """`normjax.standardize_weight` around a layer, for example Conv or Linear.

    The layer keeps its own parameters; they are standardized only during a call.

    Attributes:
        layer_instance: the layer.
        epsilon: added to the variance.
        scaled: the form of normalizer-free networks, which keeps the variance of the output.
        use_gain: whether each feature has a learned gain, `gains[path]`.
        gain_init: its initializer.
        feature_axes: the axes that are kept, by default the last.
        variable_filter: the variables that are standardized, as in `nnx.state`.
        dtype: of the weights that the layer sees; by default that of its parameters.
        param_dtype: of the gain.

    Example:
        >>> import jax.numpy as jnp, normjax.nnx
        >>> from flax import nnx
        >>> rngs = nnx.Rngs(0)
        >>> layer = normjax.nnx.WeightStandardized(nnx.Conv(2, 4, (3, 3), rngs=rngs), rngs=rngs)
        >>> layer(jnp.ones((1, 8, 8, 2))).shape
        (1, 8, 8, 4)
    """

    layer_instance: nnx.Module
    _: KW_ONLY
    epsilon: float = 1e-5
    scaled: bool = False
    use_gain: bool = False
    gain_init: InitVar[Initializer] = initializers.ones
    feature_axes: int | Collection[int] = -1
    variable_filter: Any = nnx.PathContains("kernel")
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    rngs: InitVar[nnx.Rngs]

    def __post_init__(self, gain_init: Any, rngs: Any) -> None:
        _errors.layer(self.layer_instance, nnx.Module, "flax.nnx", "nnx.Linear(4, 3, rngs=rngs)")
        make_static(self)
        self.gains = nnx.data(None)
        if self.use_gain:
            self.gains = nnx.data(_parameters(self, "gain", gain_init, rngs))

    @_errors.named("normjax.nnx.WeightStandardized", runs_model=True)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the layer with standardized weights."""

        def transform(path: Path, w: Array) -> Array:
            gain = _errors.of_weight(self.gains, path)[...] if self.use_gain else None
            return weight.standardized(self, w, gain)

        with _transformed(self.layer_instance, self.variable_filter, transform):
            return self.layer_instance(*args, **kwargs)


def _params(layer: nnx.Module, chosen: Any = ...) -> list[tuple[Path, Any]]:
    """The parameters of a layer that a filter selects, by path."""
    return list(nnx.to_flat_state(nnx.state(layer, nnx.All(nnx.Param, chosen))))


def _parameters(module: Any, name: str, init: Any, rngs: nnx.Rngs) -> dict[Path, nnx.Param]:
    """A new parameter for each chosen weight, of the shape of its features."""
    made = {}
    for path, param in _params(module.layer_instance, module.variable_filter):
        shape = feature_shape(module.feature_axes, param.shape)
        made[path] = nnx.Param(make_param(init, name, rngs.params(), shape, module.param_dtype))
    return made


@contextmanager
def _transformed(
    layer: nnx.Module, chosen: Any, transform: Callable[[Path, Array], Array]
) -> Iterator[None]:
    """Gives the layer other weights inside the context; its variables stay the same objects."""
    params = _params(layer, chosen)
    before = [param.get_raw_value() for _, param in params]
    try:
        for path, param in params:
            name = _path_name(path)
            # Errors of the layer itself are not renamed.
            named = _errors.named(
                "normjax", w=name, x=name, feature_axis="feature_axes", stats=name
            )
            w = named(transform)(path, _errors.restored(name, param.get_value()))
            # A variable may store its value in another form, to which a copy converts it.
            copy = param.copy()
            copy.set_value(w)
            _put(param, copy.get_raw_value())
        yield
    finally:
        for (_, param), raw in zip(params, before, strict=True):
            _put(param, raw)


def _put(param: Any, raw: Any) -> None:
    """Sets the stored value of a variable."""
    try:
        param.set_raw_value(raw)
    except TraceContextError:
        # A traced function closes over the layer. Flax forbids the assignment, since a tracer must
        # not stay in an outer variable; here the old value is restored.
        object.__setattr__(param, "_raw_value", raw)


def _path_name(path: Path) -> str:
    return "/".join(map(str, path))
