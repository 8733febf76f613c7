"""Batch norm modules over `normjax.batch_norm`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.errors import ModifyScopeVariableError
from flax.linen import initializers
from flax.typing import Dtype, Initializer
from jax import Array
from jax.typing import ArrayLike

from normjax import _errors
from normjax._core.moments import Moments
from normjax._functions import LeakyReLU
from normjax._modules import batch
from normjax._modules.adapter import Call
from normjax._stats import BatchStats
from normjax.linen._adapter import MissingStatsError, adapter


class ImmutableBatchStatsError(ModifyScopeVariableError):
    """Training cannot store the new statistics; a subclass of the error that Flax raises."""

    def __init__(self, path: str, asked: str, instead: str):
        # Flax would append a link to its own documentation of the class.
        Exception.__init__(
            self,
            f"normjax at '/{path}': {asked} updates the running statistics, but "
            "the collection 'batch_stats' is immutable. Call model.apply(variables, ..., "
            "mutable=['batch_stats']), which returns (output, updates), and keep "
            "updates['batch_stats'] for the next step; mutable=['batch_moments'] to keep the "
            f"moments of a micro-batch for a later one; or {instead}",
        )


class _BatchNorm(nn.Module):
    """Fields and call of all batch norms."""

    use_running_average: bool | None = None
    axis: int | Sequence[int] = -1
    momentum: float | None = 0.99
    epsilon: float = 1e-5
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones
    axis_name: str | Sequence[str] | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    ddof: float = 0
    debias: bool = False

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        train: bool | None = None,
        mask: ArrayLike | None = None,
        scale: ArrayLike | None = None,
        bias: ArrayLike | None = None,
    ) -> Array:
        """Normalizes `x`; with `train=True` by the batch, and updates `batch_stats`.

        Args:
            x: floating or complex array; an x of rank 1 is one example.
            use_running_average: the mode by Flax's name, `not train`. A mode passed by position
                is this one, as in Flax: write `layer(x, train=train)`, never `layer(x, train)`.
            train: the mode. Exactly one of both names is given, at construction or here.
            mask: True (nonzero, as in Flax) where an entry counts; broadcasts to `x`.
            scale, bias: of shape (C,) or (N, C), used instead of the parameters, which are then
                not created.

        Returns:
            An array of the shape of `x`. In `init`, as in Flax, the statistics are not updated
            and `axis_name` is not used.

        Raises:
            ImmutableBatchStatsError: `train=True` and neither `batch_stats` nor `batch_moments`
                is mutable.
            MissingStatsError: `train=False` and the variables have no `batch_stats` of this layer.
            ValueError: no mode or two modes; and whatever `normjax.batch_norm` raises.
        """
        return _run(self, use_running_average, train, Call(x, mask, scale, bias))


@_errors.keywords
class BatchNorm(_BatchNorm):
    """`normjax.batch_norm` as a module; a drop-in for `flax.linen.BatchNorm`.

    It has the same fields in the same order with the same defaults, and the same variables
    (`params/{scale,bias}`, `batch_stats/{mean,var}`), so checkpoints load both ways. In addition,
    a call accepts `train=True/False`. Pass it by name: `layer(x, train)` would set Flax's
    `use_running_average`, the opposite.

    It also accumulates micro-batches. If `batch_moments` is mutable and `batch_stats` is not,
    `train=True` merges the moments of its input into `batch_moments/moments`. If both are mutable,
    the running statistics are updated once, by the kept moments and this batch, and the kept
    moments are reset.

    Attributes:
        use_running_average: normalize by the running statistics; `not train`. Here or at call.
        axis: the feature axis or axes of the input.
        momentum: weight of the OLD running value. None: the plain average over all batches; this
            adds `batch_stats/count`, int32. A floating count of a checkpoint keeps its dtype.
        epsilon: added to the variance.
        dtype: of the result; by default what the input and the parameters promote to, as in Flax.
        param_dtype: of scale and bias.
        use_bias, use_scale: whether there is a bias, a scale.
        bias_init, scale_init: their initializers.
        axis_name: mapped axis to share batch statistics over. Need not be bound in `init`.
        axis_index_groups: groups along `axis_name`; statistics are shared within each group.
        use_fast_variance: no effect, for compatibility with Flax: the variance is always exact.
        force_float32_reductions: no effect, likewise: statistics are always float32 or wider.
        ddof: correction of the running variance, 0 as in Flax, 1 as in PyTorch.
        debias: correct the running average for its initial value; this adds `batch_stats/count`.
        virtual_batch_size: normalize each block of this many examples along axis 0 separately.

    Example:
        >>> import jax, jax.numpy as jnp, normjax.linen
        >>> x = jnp.array([[0.0, 10.0], [2.0, 30.0]])
        >>> model = normjax.linen.BatchNorm(momentum=0.9)
        >>> variables = model.init(jax.random.key(0), x, train=False)
        >>> y, updates = model.apply(variables, x, train=True, mutable=["batch_stats"])
        >>> updates["batch_stats"]["mean"]
        Array([0.1, 2. ], dtype=float32)
    """

    virtual_batch_size: int | None = None


@_errors.keywords
class BatchNormAct(BatchNorm):
    """`normjax.batch_norm_act` as a module: `BatchNorm` and an elementwise activation.

    Variables are those of `BatchNorm`, so a checkpoint of one loads in the other. The backward
    pass keeps only the input; see `normjax.batch_norm_act`.

    Attributes are those of `BatchNorm`, and
        activation: a hashable elementwise function, for example `normjax.LeakyReLU()`,
            `normjax.ELU()` or `jax.nn.gelu`.

    Example:
        >>> import jax, jax.numpy as jnp, normjax.linen
        >>> model = normjax.linen.BatchNormAct(activation=normjax.ELU())
        >>> x = jnp.array([[0.0], [4.0]])
        >>> variables = model.init(jax.random.key(0), x, train=False)
        >>> z, updates = model.apply(variables, x, train=True, mutable=["batch_stats"])
        >>> z.round(2).ravel()
        Array([-0.63,  1.  ], dtype=float32)
    """

    activation: Callable[[Array], Array] = LeakyReLU()


@_errors.keywords
class BatchRenorm(_BatchNorm):
    """`normjax.batch_renorm` as a module: `BatchNorm` with r and d, bounded by `r_max`, `d_max`.

    Attributes and variables are those of `BatchNorm`, so a checkpoint of one loads in the other.
    `r_max` and `d_max` are numbers, or schedules from the number of updates to a number, which add
    `batch_stats/count`.

    Example:
        >>> import jax, jax.numpy as jnp, normjax.linen
        >>> model = normjax.linen.BatchRenorm(r_max=2.0, d_max=1.0)
        >>> x = jnp.array([[0.0], [4.0]])
        >>> variables = model.init(jax.random.key(0), x, train=False)
        >>> y, updates = model.apply(variables, x, train=True, mutable=["batch_stats"])
        >>> y.round(2).ravel()
        Array([-1.,  3.], dtype=float32)
    """

    r_max: float | Callable[[Array], ArrayLike] = 3.0
    d_max: float | Callable[[Array], ArrayLike] = 5.0


def _run(module: Any, use_running_average: bool | None, train: bool | None, call: Call) -> Array:
    """The module's step, whose errors name the module."""
    called = f"normjax.linen.{type(module).__name__}"
    step = _errors.named(called, feature_axis="axis", stats="batch_stats")(_step)
    return step(module, use_running_average, train, call)


def _step(module: Any, use_running_average: bool | None, train: bool | None, call: Call) -> Array:
    """Reads the variables of a module, runs a step, and stores the results."""
    mode = _errors.mode(train, module.use_running_average, use_running_average)
    call, features = batch.read(module, call)
    running = _running(module, features.shape, mode)
    trains = mode.train and not module.is_initializing()
    moves = trains and module.is_mutable_collection("batch_stats")
    keeps = trains and module.is_mutable_collection("batch_moments")
    if trains and not moves and not keeps:
        raise ImmutableBatchStatsError("/".join(module.path), mode.asked, mode.instead)
    # A batch in one piece keeps no moments, so that the variables are those of Flax.
    keeps = keeps and (not moves or module.has_variable("batch_moments", "moments"))
    kept = None
    if keeps:
        kept = module.get_variable("batch_moments", "moments", Moments.make(features.shape))
    memory = batch.Memory(BatchStats(**{n: v.value for n, v in running.items()}), kept)

    y, memory = batch.step(adapter(module), call, features, mode, memory, moves)
    if keeps:
        module.put_variable("batch_moments", "moments", memory.moments)
    if moves:
        for name, variable in running.items():
            variable.value = getattr(memory.stats, name)
    return y


def _running(module: Any, features: tuple[int, ...], mode: _errors.Mode) -> dict[str, Any]:
    """The variables of the running statistics, created if there are none."""
    counted = batch.needs_count(module)
    if counted and module.has_variable("batch_stats", "mean"):
        has_count = module.has_variable("batch_stats", "count")
        _errors.stored_count(has_count or not mode.train)
        counted = has_count
    for name in ("mean", "var"):
        known = module.has_variable("batch_stats", name)
        if not known and not module.is_mutable_collection("batch_stats"):
            raise MissingStatsError(module.path, mode.asked, f"batch_stats/{name}")
    return {
        name: module.variable("batch_stats", name, lambda value=value: value)
        for name, value in BatchStats.make(features, counted=counted)._asdict().items()
        if value is not None
    }
