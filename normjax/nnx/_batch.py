"""Batch norm modules over `normjax.batch_norm`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from normjax import _errors
from normjax._core.moments import Moments
from normjax._functions import LeakyReLU
from normjax._modules import batch
from normjax._modules.adapter import Call
from normjax._stats import BatchStats
from normjax.nnx._adapter import adapter, held
from normjax.nnx._fields import Affine


# The name of the collection of linen, so that `nnx.bridge` converts variables both ways.
@partial(nnx.register_variable_name, "batch_moments", overwrite=True)
class BatchMoments(nnx.Variable[Moments]):
    """Moments of micro-batches that the running statistics do not include yet."""


@dataclass(eq=False, repr=False, kw_only=True)
class _BatchNorm(Affine):
    """Fields and call of all batch norms."""

    use_running_average: bool | None = False
    axis: int | Sequence[int] = -1
    momentum: float | None = 0.99
    epsilon: float = 1e-5
    ddof: float = 0
    debias: bool = False
    accumulate: bool = False
    frozen: bool = False

    def __post_init__(self, *made_from: Any) -> None:
        super().__post_init__(*made_from)
        counted = batch.needs_count(self)
        for name, value in BatchStats.make(self.num_features, counted=counted)._asdict().items():
            if value is not None:
                setattr(self, name, nnx.BatchStat(value))
        if _errors.switch("accumulate", self.accumulate):
            self.moments = BatchMoments(Moments.make(self.num_features))

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
        """Normalizes `x`; in training by the batch, and updates the running statistics.

        Args:
            x: floating or complex array; an x of rank 1 is one example.
            use_running_average: the mode, `not train`; as in Flax it overrides that of the
                module, which `model.train()` and `model.eval()` set.
            train: the mode by its other name.
            mask: True (nonzero, as in Flax) where an entry counts; broadcasts to `x`.
            scale, bias: of shape (C,) or (N, C), used instead of the parameters.

        Returns:
            An array of the shape of `x`.

        Raises:
            ValueError: no mode or two modes, `train=True` for a frozen layer, an x with a wrong
                number of features; and whatever `normjax.batch_norm` raises.
        """
        # The errors of an observer are named by the tool that installed it.
        called = f"normjax.nnx.{type(self).__name__}"
        names = dict(feature_axis="axis", stats="BatchStat")
        step = _errors.named(called, runs_model=True, **names)(_step)
        return step(self, use_running_average, train, Call(x, mask, scale, bias))

    @_errors.named("normjax.nnx.BatchNorm")
    def set_view(
        self,
        use_running_average: bool | None = None,
        accumulate: bool | None = None,
        frozen: bool | None = None,
    ) -> None:
        """Options of `nnx.view`; indented by two, as `nnx.view_info` reads them.

        Args:
          use_running_average: if True, the running statistics are used.
          accumulate: if True, training keeps moments instead of updating the statistics. A view
            cannot add variables: build the layer with `accumulate=True`.
          frozen: if True, the layer uses its running statistics and learns nothing.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average
        if accumulate is not None:
            _errors.moments_to_share(accumulate, hasattr(self, "moments"))
            self.accumulate = accumulate
        if frozen is not None:
            self.frozen = frozen


@_errors.keywords
@dataclass(eq=False, repr=False, kw_only=True)
class BatchNorm(_BatchNorm):
    """`normjax.batch_norm` as a module; a drop-in for `flax.nnx.BatchNorm`.

    It has the same arguments with the same defaults, and the same variables (`Param` scale and
    bias, `BatchStat` mean and var), so states load both ways. Running statistics are used in
    float32 or wider for any `dtype`; Flax rounds them to `dtype` first. In addition, a call accepts
    `train=True/False`.

    It also accumulates micro-batches. In training with `accumulate`, the moments of the input are
    merged into the variable `moments`, and the statistics do not change. The next training call
    without `accumulate` updates them once, by the kept moments and that batch.

    Attributes:
        num_features: the number of features.
        use_running_average: normalize by the running statistics. False, training, by default, as
            in Flax; None asks for a mode at each call, or by `model.train()` and `model.eval()`.
        axis: the feature axis or axes of the input.
        momentum: weight of the OLD running value. None: the plain average over all batches; this
            adds the variable `count`.
        epsilon: added to the variance.
        dtype: of the result; by default what the input and the variables promote to, as in Flax.
        param_dtype: of scale and bias.
        use_bias, use_scale: whether there is a bias, a scale.
        bias_init, scale_init: their initializers.
        axis_name: mapped axis to share batch statistics over.
        axis_index_groups: groups along `axis_name`; statistics are shared within each group.
        use_fast_variance: no effect, for compatibility with Flax: the variance is always exact.
        promote_dtype: a function of (x, mean, var, scale, bias) and `dtype` that returns the arrays
            to use instead. The default changes only the dtype of the result.
        rngs: for the initializers.
        bias_metadata, scale_metadata: metadata of the parameters, such as their sharding.
        ddof: correction of the running variance, 0 as in Flax, 1 as in PyTorch.
        debias: correct the running average for its initial value; this adds the variable `count`.
        accumulate: training merges moments into the variable `moments`, a `BatchMoments`.
        frozen: use the running statistics and learn nothing, in any mode of the model.
        virtual_batch_size: normalize each block of this many examples along axis 0 separately.

    Example:
        >>> import jax.numpy as jnp, normjax.nnx
        >>> from flax import nnx
        >>> layer = normjax.nnx.BatchNorm(2, momentum=0.9, rngs=nnx.Rngs(0))
        >>> y = layer(jnp.array([[0.0, 10.0], [2.0, 30.0]]))
        >>> layer.mean[...]
        Array([0.1, 2. ], dtype=float32)
    """

    virtual_batch_size: int | None = None


@_errors.keywords
@dataclass(eq=False, repr=False, kw_only=True)
class BatchNormAct(BatchNorm):
    """`normjax.batch_norm_act` as a module: `BatchNorm` and an elementwise activation.

    Variables are those of `BatchNorm`, so a state of one loads in the other. The backward pass
    keeps only the input; see `normjax.batch_norm_act`.

    Attributes are those of `BatchNorm`, and
        activation: a hashable elementwise function, for example `normjax.LeakyReLU()`,
            `normjax.ELU()` or `jax.nn.gelu`.

    Example:
        >>> import jax.numpy as jnp, normjax.nnx
        >>> from flax import nnx
        >>> layer = normjax.nnx.BatchNormAct(1, activation=normjax.ELU(), rngs=nnx.Rngs(0))
        >>> layer(jnp.array([[0.0], [4.0]])).round(2).ravel()
        Array([-0.63,  1.  ], dtype=float32)
    """

    activation: Callable[[Array], Array] = LeakyReLU()


@_errors.keywords
@dataclass(eq=False, repr=False, kw_only=True)
class BatchRenorm(_BatchNorm):
    """`normjax.batch_renorm` as a module: `BatchNorm` with r and d, bounded by `r_max`, `d_max`.

    Attributes and variables are those of `BatchNorm`, so a state of one loads in the other. `r_max`
    and `d_max` are numbers, or schedules from the number of updates to a number, which add the
    variable `count`.

    Example:
        >>> import jax.numpy as jnp, normjax.nnx
        >>> from flax import nnx
        >>> layer = normjax.nnx.BatchRenorm(1, r_max=2.0, d_max=1.0, rngs=nnx.Rngs(0))
        >>> layer(jnp.array([[0.0], [4.0]])).round(2).ravel()
        Array([-1.,  3.], dtype=float32)
    """

    r_max: float | Callable[[Array], ArrayLike] = 3.0
    d_max: float | Callable[[Array], ArrayLike] = 5.0


def _step(module: Any, use_running_average: bool | None, train: bool | None, call: Call) -> Array:
    """Reads the variables of a module, runs a step, and stores the results."""
    asked = dict(train=train, use_running_average=use_running_average)
    mode = _errors.mode_of(module.use_running_average, module.frozen, asked)
    call, features = batch.read(module, call)
    # Installed by normjax.surgery: it observes each call, and returns whether this batch is the
    # whole batch.
    observer = getattr(module, "normjax_observer", None)
    alone = observer is not None and observer(module, call, mode)
    if mode.train:
        _errors.has_count(batch.needs_count(module), hasattr(module, "count"))
    stats = _stats(module, features)
    pending = getattr(module, "moments", None)
    accumulates = _errors.switch("accumulate", module.accumulate)
    moves, keeps = mode.train and not accumulates, accumulates or pending is not None
    kept = None
    if mode.train and keeps:
        kept = Moments.make(features.shape) if pending is None else pending.get_value()
    read = adapter(module, alone=alone, frozen=module.frozen, promotes_stats=True)
    y, memory = batch.step(read, call, features, mode, batch.Memory(stats, kept), moves)
    if memory.moments is not None:
        _keep(module, memory.moments)
    if moves:
        for name, value in memory.stats._asdict().items():
            if value is not None:
                variable = getattr(module, name)
                # The shape of the value, since a traced hijax variable has none.
                variable.set_value(value.reshape(variable.get_value().shape))
    return y


def _stats(module: Any, features: _errors.Features) -> BatchStats:
    """The running statistics, in the shape of the features."""
    names = (name for name in BatchStats._fields if hasattr(module, name))
    return BatchStats(**{name: held(module, name, features) for name in names})


def _keep(module: Any, moments: Moments) -> None:
    if getattr(module, "moments", None) is None:
        module.moments = BatchMoments(moments)
    else:
        module.moments.set_value(moments)
