"""Error messages: the called function, what it got, and what to do, with the caller's names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import ScopeCollectionNotFound, ScopeVariableNotFoundError

import normjax
import normjax.linen
from normjax import _errors, surgery
from normjax.linen import MissingStatsError
from tests.test_arguments import STATS, Inner, W, X

KEY = jax.random.key(0)
GROUPS = dict(axis_name="i", axis_index_groups=[[0], [1]])
COUNTED = normjax.BatchStats.make(3, counted=True)


def renorm(**options):
    return normjax.batch_renorm(X, COUNTED, train=True, **options)


def applied(module, *args, **call):
    return module.apply(module.init(KEY, *args, **call), *args, **call, mutable=["batch_stats"])


REFUSED = {
    "no spectral state": (
        lambda: normjax.spectral_norm(W, None, train=True),
        "normjax.spectral_norm: stats is NoneType, expected SpectralStats. Start from "
        "SpectralStats(jax.random.normal(key, (1, w.shape[-1])), jnp.ones(())).",
    ),
    "an axis of a weight": (
        lambda: normjax.weight_norm(W, feature_axis=5),
        "normjax.weight_norm: feature_axis=5 is out of range for w with shape (4, 3)",
    ),
    "groups as a float": (
        lambda: normjax.group_norm(X, num_groups=1.0),
        "normjax.group_norm: num_groups=1.0, expected a whole number that divides the 3 features",
    ),
    "axis_name as an integer": (
        lambda: normjax.layer_norm(X, axis_name=0),
        "normjax.layer_norm: axis_name=0, expected the name or a list of names of mapped axes",
    ),
    "a mask of text": (
        lambda: normjax.layer_norm(X, mask="abc"),
        "normjax.layer_norm: mask is str, expected an array of booleans",
    ),
    "a dtype of PyTorch": (
        lambda: normjax.layer_norm(X, dtype="fp16"),
        "normjax.layer_norm: dtype=fp16, expected a floating or complex dtype of JAX, for example "
        "jnp.float32 or jnp.bfloat16. Did you mean 'float16'?",
    ),
    "a dtype that JAX does not have": (
        lambda: normjax.linen.LayerNorm(dtype="f16").init(KEY, X),
        "normjax.linen.LayerNorm: dtype=float128, expected a floating or complex dtype of JAX",
    ),
    "alpha of text": (
        lambda: normjax.local_response_norm(X, alpha="a"),
        "normjax.local_response_norm: alpha is 'a', expected a finite number.",
    ),
    "a list": (
        lambda: normjax.rms_norm([1.0, 2.0]),
        "normjax.rms_norm: x is a list of length 2, expected an array of floating numbers. Pass "
        "one array; make one of numbers by jnp.asarray(x).",
    ),
    "a list in a module": (
        lambda: normjax.linen.BatchNorm().init(KEY, [X, X], train=True),
        "normjax.linen.BatchNorm: x is a list of length 2, expected an array",
    ),
    "a schedule that returns a wrong shape": (
        lambda: renorm(r_max=lambda count: jnp.ones(5)),
        "normjax.batch_renorm: the schedule r_max returned an array of shape (5,), expected a "
        "number of at least 1, or one for each feature of shape (3,).",
    ),
    "a schedule that returns less than 1": (
        lambda: renorm(r_max=lambda count: jnp.minimum(1.0, 0.5 + count)),
        "normjax.batch_renorm: the schedule r_max returned [0.5, 0.5, 0.5], expected a number of",
    ),
    "a schedule that returns None": (
        lambda: renorm(d_max=lambda count: None),
        "normjax.batch_renorm: the schedule d_max returned NoneType, expected a number of",
    ),
    "axes of a module": (
        lambda: normjax.linen.LayerNorm(reduction_axes=5, feature_axes=1).init(KEY, X),
        "normjax.linen.LayerNorm: reduction_axes=5 is out of range",
    ),
    "statistics of a module": (
        lambda: normjax.linen.BatchNorm(axis=1).apply(
            {"params": {"scale": np.ones(4), "bias": np.ones(4)}, "batch_stats": STATS._asdict()},
            X,
            train=False,
        ),
        "normjax.linen.BatchNorm: batch_stats.mean has shape (3,), expected (4,), the size of "
        "axis=1 of x with shape (2, 4, 3). If the features of x lie on another axis, pass axis=.",
    ),
    "epsilon of a module": (
        lambda: applied(normjax.linen.BatchNorm(epsilon=-1.0), X, train=True),
        "normjax.linen.BatchNorm: epsilon=-1.0, expected a finite number",
    ),
    "a residual": (
        lambda: normjax.add_layer_norm(X, X, axis=7),
        "normjax.add_layer_norm: axis=7 is out of range",
    ),
    "the weight of a wrapper": (
        lambda: normjax.linen.WeightNorm(Inner(), feature_axes=7).init(KEY, X),
        "normjax.linen.WeightNorm: feature_axes=7 is out of range for layer_instance/kernel with",
    ),
    "the layer in a wrapper": (
        lambda: normjax.linen.WeightNorm(normjax.linen.LayerNorm(epsilon=-1.0)).init(KEY, X),
        "normjax.linen.LayerNorm: epsilon=-1.0",
    ),
    "a string in place of names": (
        lambda: normjax.linen.WeightNorm(Inner(), variable_filter="kernel").init(KEY, X),
        "normjax.linen.WeightNorm: variable_filter='kernel', expected a collection of names, or "
        "None for all variables. Pass {'kernel'}.",
    ),
    "moments of another model": (
        lambda: normjax.linen.move_batch_stats(
            {"a": STATS._asdict()}, {"a": {"moments": normjax.Moments.make(5)}}, momentum=0.9
        ),
        "normjax.linen.move_batch_stats: ",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_errors_start_with_the_message(name):
    call, message = REFUSED[name]
    with pytest.raises((TypeError, ValueError)) as error:
        call()
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("called", "call"),
    {
        "normjax.batch_norm": lambda x: normjax.batch_norm(x, None, train=True, **GROUPS)[0],
        "normjax.layer_norm": lambda x: normjax.layer_norm(x, **GROUPS),
        "normjax.synchronize": lambda x: normjax.synchronize(normjax.measure(x, 0), **GROUPS).mean,
        "normjax.linen.LayerNorm": lambda x: applied(normjax.linen.LayerNorm(**GROUPS), x)[0],
        "normjax.linen.BatchNorm": lambda x: applied(
            normjax.linen.BatchNorm(**GROUPS), x, train=True
        )[0],
    }.items(),
)
def test_groups_under_vmap_are_refused_in_the_name_of_the_called_function(called, call):
    with pytest.raises(NotImplementedError, match=f"^{called}: axis_index_groups="):
        jax.vmap(call, axis_name="i")(X)


MISSING = {
    "mean": {},
    "var": {"batch_stats": {"mean": STATS.mean}},
}


@pytest.mark.parametrize("name", MISSING)
@pytest.mark.parametrize("kind", ["BatchNorm", "BatchNormAct", "BatchRenorm"])
def test_missing_batch_stats_are_named_with_what_to_pass(kind, name):
    module = getattr(normjax.linen, kind)()
    variables = {"params": {"scale": STATS.var, "bias": STATS.mean}} | MISSING[name]
    message = (
        rf"^normjax.linen.{kind} at '/': train=False needs 'batch_stats/{name}', which the "
        r"variables do not have.* model.apply\({'params': ..., 'batch_stats': ...}\)"
    )
    # Both classes that Flax raises there.
    for error in (ScopeCollectionNotFound, ScopeVariableNotFoundError):
        with pytest.raises(error, match=message):
            module.apply(variables, X, train=False)
    with pytest.raises(ScopeCollectionNotFound, match=r"use_running_average=True needs"):
        module.apply(variables, X, True)
    with pytest.raises(ScopeCollectionNotFound, match="train=True needs"):
        module.apply(variables, X, train=True)


def test_a_missing_spectral_state_is_named():
    layer = normjax.linen.SpectralNorm(Inner())
    params = {"layer_instance": {"kernel": W}}
    with pytest.raises(ScopeCollectionNotFound, match="needs 'batch_stats/layer_instance/kernel/u"):
        layer.apply({"params": params}, X, train=False)


def test_an_error_of_a_users_function_is_not_changed():
    def schedule(count):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="^mine$"):
        renorm(r_max=schedule)


def test_batch_renorm_edge_traced_bound_below_its_least():
    y, _ = jax.jit(lambda r, d: renorm(r_max=r, d_max=d))(0.5, -2.0)
    mean, var = X.mean((0, 1)), X.var((0, 1))
    expected = (X - mean) / np.sqrt(var + 1e-5) * 0.5 - 2.0
    np.testing.assert_allclose(y, expected, rtol=0, atol=32 * np.finfo(np.float32).eps)


def test_numbers_may_be_those_of_numpy():
    """Also under strict promotion, where JAX refuses to combine them with arrays."""
    moments = normjax.measure(X, (0, 1))
    np.testing.assert_array_equal(moments.variance(np.int64(1)), moments.variance(1))
    got = normjax.move(STATS, moments, ddof=np.int64(1))
    np.testing.assert_array_equal(got.var, normjax.move(STATS, moments, ddof=1).var)
    got = normjax.local_response_norm(X, k=np.int64(2))
    np.testing.assert_array_equal(got, normjax.local_response_norm(X, k=2.0))
    y, _ = renorm(r_max=np.int64(2), d_max=lambda count: np.int64(1))
    np.testing.assert_array_equal(y, renorm(r_max=2.0, d_max=1.0)[0])


def refuse(kind, message):
    raise kind(message)


@pytest.mark.parametrize("kind", [ValueError, ImportError, FileNotFoundError, MissingStatsError])
def test_named_adds_the_called_function_and_keeps_the_class_of_the_error(kind):
    def inner():
        error = kind("path", "reader", "missing") if kind is MissingStatsError else None
        raise error or kind("normjax: axis=3 and axis.mean, a/axis=3")

    outer = _errors.named("normjax.outer", axis="dim")(_errors.named("normjax.middle")(inner))
    with pytest.raises(kind) as error:
        outer()
    assert type(error.value) is kind
    assert str(error.value).startswith("normjax.outer")
    assert error.value.args == (str(error.value),)
    assert error.traceback[-1].name == "inner"
    if kind is not MissingStatsError:
        assert str(error.value) == "normjax.outer: dim=3 and dim.mean, a/axis=3"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("normjax: x", "normjax.tool: x"),
        ("normjax at '/': x", "normjax.tool at '/': x"),
        ("normjax.linen.BatchNorm: x", "normjax.linen.BatchNorm: x"),
        ("x of normjax: y", "x of normjax: y"),
    ],
)
def test_a_tool_that_runs_a_model_keeps_the_names_in_its_errors(message, expected):
    with pytest.raises(TypeError) as error:
        _errors.named("normjax.tool", runs_model=True)(refuse)(TypeError, message)
    assert str(error.value) == expected


def test_a_tool_names_its_own_errors_within_another_tool():
    """Also where the error passes through the wrapper of the other one."""
    model = normjax.linen.BatchNorm()
    variables = model.init(KEY, X, train=True)
    variables["batch_stats"]["mean"] += 1
    apply = surgery.freeze(surgery.guard(model.apply, at="other"), at="*")
    with pytest.raises(ValueError, match=r"^normjax.surgery.guard: at='other' matches no"):
        apply(variables, X, train=True)
    apply = surgery.synchronize(surgery.guard(model.apply), "i")
    with pytest.raises(ValueError, match=r"^normjax.surgery.guard: the batch norm at '' would run"):
        apply(variables, X, train=True)
    apply = surgery.guard(surgery.synchronize(model.apply, "i"))
    with pytest.raises(ValueError, match=r"^normjax.surgery.guard: the batch norm at '' would run"):
        apply(variables, X, train=True)
