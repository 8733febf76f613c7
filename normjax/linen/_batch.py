"""Batch norm: `params` and `batch_stats` in and out of `normjax.batch_norm`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.errors import ModifyScopeVariableError
from flax.linen import initializers
from flax.typing import Dtype, Initializer
from jax import Array
from jax.typing import ArrayLike

from normjax import _checks
from normjax._batch import batch_norm
from normjax._stats import BatchStats
from normjax.linen._params import affine, as_mask, output_dtype


class ImmutableBatchStatsError(ModifyScopeVariableError):
    """Training needs somewhere to put the new statistics; the class that Flax raises there."""

    def __init__(self, path: str):
        # Flax would append a link to its own documentation of the class.
        Exception.__init__(
            self,
            f"normjax.linen.BatchNorm at '/{path}': train=True moves the running statistics, but "
            "the collection 'batch_stats' is immutable. Call model.apply(variables, ..., "
            "mutable=['batch_stats']), which returns (output, updates), and keep "
            "updates['batch_stats'] for the next step; or pass train=False.",
        )


class BatchNorm(nn.Module):
    """`normjax.batch_norm` as a module; a drop-in for `flax.linen.BatchNorm`.

    The same fields in the same order with the same defaults, the same variables
    (`params/{scale,bias}`, `batch_stats/{mean,var}`), so checkpoints load both ways. On top of
    that it takes `train=True/False` when called.

    Attributes:
        use_running_average: normalize by the running statistics; `not train`. Here or at call.
        axis: the feature axis or axes of the input.
        momentum: weight of the OLD running value. None: the plain average over all batches; this
            adds `batch_stats/count`.
        epsilon: added to the variance.
        dtype: of the result; by default what the input and the parameters promote to, as in Flax.
        param_dtype: of scale and bias.
        use_bias, use_scale: whether there is a bias, a scale.
        bias_init, scale_init: their initializers.
        axis_name: mapped axis to share batch statistics over. Need not be bound in `init`.
        axis_index_groups: groups along `axis_name` that share among themselves only.
        use_fast_variance: no effect, kept for Flax's sake: the exact variance is always used.
        force_float32_reductions: no effect, likewise: statistics are float32 or wider always.
        ddof: correction of the running variance, 0 as in Flax, 1 as in PyTorch.
        debias: correct the running average for its start, so that evaluation is right after the
            first step; this adds `batch_stats/count`.

    Example:
        >>> import jax, jax.numpy as jnp, normjax.linen
        >>> x = jnp.array([[0.0, 10.0], [2.0, 30.0]])
        >>> model = normjax.linen.BatchNorm(momentum=0.9)
        >>> variables = model.init(jax.random.key(0), x, train=False)
        >>> y, updates = model.apply(variables, x, train=True, mutable=["batch_stats"])
        >>> updates["batch_stats"]["mean"]
        Array([0.1, 2. ], dtype=float32)
    """

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
        """Normalizes `x`; with `train=True` by the batch, moving `batch_stats`.

        Args:
            x: floating or complex array of rank 2 or more.
            use_running_average: the mode by Flax's name, `not train`.
            train: the mode. Exactly one of both names is given, at construction or here.
            mask: True (nonzero, as in Flax) where an entry counts; broadcasts to `x`.
            scale, bias: of (C,) or (N, C), in place of the parameters, which are then not made.

        Returns:
            An array of the shape of `x`. In `init`, as in Flax, the statistics are not moved and
            `axis_name` is not used.

        Raises:
            ImmutableBatchStatsError: `train=True` and `batch_stats` is not mutable.
            ValueError: no mode or two modes; and whatever `normjax.batch_norm` raises.
        """
        called = "normjax.linen.BatchNorm"
        train = _checks.mode(called, train, self.use_running_average, use_running_average)
        x = _checks.inexact(called, "x", x)
        reduced = _checks.reduced_axes(called, "axis", self.axis, x.shape)
        features = tuple(n for a, n in enumerate(x.shape) if a not in reduced)
        mask = as_mask(mask)

        counted = self.debias or self.momentum is None
        if counted and self.has_variable("batch_stats", "mean"):
            has_count = self.has_variable("batch_stats", "count")
            _checks.stored_count(called, has_count or not train)
            counted = has_count

        running = {
            name: self.variable("batch_stats", name, lambda value=value: value)
            for name, value in BatchStats.make(features, counted=counted)._asdict().items()
            if value is not None
        }
        scale, bias = affine(self, features, scale, bias)

        stats: BatchStats | None = BatchStats(**{n: v.value for n, v in running.items()})
        axis_name, groups = self.axis_name, self.axis_index_groups
        if train and self.is_initializing():
            # Init makes shapes from any data, a batch of one included: it normalizes by that
            # batch, keeps no statistics and needs no device axis.
            train, stats, axis_name, groups = False, None, None, None
        elif train and not self.is_mutable_collection("batch_stats"):
            raise ImmutableBatchStatsError("/".join(self.path))

        y, stats = batch_norm(
            x,
            stats,
            scale,
            bias,
            train=train,
            feature_axis=self.axis,
            momentum=self.momentum,
            epsilon=self.epsilon,
            ddof=self.ddof,
            debias=self.debias,
            mask=mask,
            axis_name=axis_name,
            axis_index_groups=groups,
            dtype=output_dtype(self, x, scale, bias),
        )
        if train:
            for name, variable in running.items():
                variable.value = getattr(stats, name)
        return y
