"""Bad input raises an error that says what was passed and what to do."""

import jax.numpy as jnp
import numpy as np
import pytest

import normjax
from normjax import (
    BatchStats,
    batch_norm,
    group_norm,
    instance_norm,
    layer_norm,
    measure,
    merge,
    normalize,
    rms_norm,
)

X = np.ones((4, 3), np.float32)
CUBE = np.ones((4, 5, 3), np.float32)


def call(x=X, stats=None, *args, train=True, **options):
    return batch_norm(x, stats, *args, train=train, **options)


def stats(shape, **changes):
    return BatchStats.make(shape)._replace(**changes)


# The call, the class of its error, and two parts of the message: what was passed, and a remedy.
REFUSED = {
    "scalar": (lambda: call(np.float32(1)), ValueError, "x is a scalar, expected", "x[None]"),
    "rank 1": (
        lambda: call(np.ones(3, np.float32)),
        ValueError,
        "shape (3,)",
        "leading batch axis",
    ),
    "integer x": (
        lambda: call(X.astype(int)),
        TypeError,
        "dtype int32",
        "jnp.asarray(x, jnp.float32)",
    ),
    "boolean x": (lambda: call(X > 0), TypeError, "dtype bool", "jnp.asarray(x, jnp.float32)"),
    "axis too large": (lambda: call(feature_axis=2), ValueError, "feature_axis=2", "from -2 to 1"),
    "axis too small": (lambda: call(feature_axis=-3), ValueError, "shape (4, 3)", "from -2 to 1"),
    "axis twice": (
        lambda: call(CUBE, feature_axis=(2, -1)),
        ValueError,
        "(2, -1)",
        "each axis once",
    ),
    "axis of a wrong kind": (lambda: call(feature_axis=1.0), TypeError, "1.0", "an integer"),
    "every axis": (
        lambda: call(feature_axis=(0, 1)),
        ValueError,
        "one value for each feature over the axes ()",
        "batch axis",
    ),
    "scale of a wrong shape": (
        lambda: call(X, None, np.ones(5, np.float32)),
        ValueError,
        "scale has shape (5,), expected (3,), the size of feature_axis=-1 of x with shape (4, 3)",
        "pass feature_axis=",
    ),
    "bias of a wrong shape": (
        lambda: call(X, None, None, np.ones((1, 3), np.float32)),
        ValueError,
        "bias has shape (1, 3), expected (3,)",
        "pass feature_axis=",
    ),
    "stats of a wrong shape": (
        lambda: call(X, stats(4)),
        ValueError,
        "stats.mean has shape (4,), expected (3,)",
        "pass feature_axis=",
    ),
    "stats.var of a wrong shape": (
        lambda: call(X, stats(3, var=jnp.ones(2)), train=False),
        ValueError,
        "stats.var has shape (2,), expected (3,)",
        "pass feature_axis=",
    ),
    "integer stats": (
        lambda: call(X, stats(3, mean=jnp.zeros(3, int))),
        TypeError,
        "stats.mean has dtype int32",
        "Convert it first",
    ),
    "integer scale": (
        lambda: call(X, None, np.ones(3, int)),
        TypeError,
        "scale has dtype",
        "Convert",
    ),
    "momentum above 1": (lambda: call(momentum=1.5), ValueError, "momentum=1.5", "from 0 to 1"),
    "momentum below 0": (lambda: call(momentum=-0.1), ValueError, "PyTorch's momentum", "1 - m"),
    "momentum NaN": (
        lambda: call(momentum=float("nan")),
        ValueError,
        "momentum=nan",
        "from 0 to 1",
    ),
    "negative epsilon": (lambda: call(epsilon=-1.0), ValueError, "epsilon=-1.0", "at least 0"),
    "infinite epsilon": (lambda: call(epsilon=float("inf")), ValueError, "epsilon=inf", "finite"),
    "negative ddof": (lambda: call(ddof=-1), ValueError, "ddof=-1", "0 for the biased"),
    "debias without a count": (
        lambda: call(X, stats(3), debias=True),
        ValueError,
        "debias=True needs stats.count",
        "counted=True",
    ),
    "cumulative without a count": (
        lambda: call(X, stats(3), momentum=None),
        ValueError,
        "momentum=None needs stats.count",
        "counted=True",
    ),
    "debias with momentum 1": (
        lambda: call(X, BatchStats.make(3, counted=True), momentum=1, debias=True),
        ValueError,
        "momentum=1 with debias=True",
        "Pass momentum=None",
    ),
    "mask of integers": (
        lambda: call(mask=np.ones((4, 1), int)),
        TypeError,
        "mask has dtype int32, expected bool",
        "mask.astype(bool)",
    ),
    "mask over examples": (
        lambda: call(mask=np.ones(4, bool)),
        ValueError,
        "mask has shape (4,), which does not broadcast to x with shape (4, 3)",
        "pass mask.reshape((4, 1))",
    ),
    "ambiguous mask": (
        lambda: call(np.ones((3, 3), np.float32), mask=np.ones(3, bool)),
        ValueError,
        "two readings",
        "mask.reshape((3, 1)) for the first or mask.reshape((1, 3)) for the second",
    ),
    "mask of a wrong shape": (
        lambda: call(mask=np.ones((2, 3), bool)),
        ValueError,
        "mask has shape (2, 3)",
        "Give it the rank of x",
    ),
    "mask of too many axes": (
        lambda: call(mask=np.ones((1, 4, 3), bool)),
        ValueError,
        "mask has shape (1, 4, 3)",
        "Give it the rank of x",
    ),
    "empty batch": (lambda: call(X[:0]), ValueError, "no value for each feature", "train=False"),
    "one value": (lambda: call(X[:1]), ValueError, "one value for each feature", "axis_name"),
    "one value, features first": (
        lambda: call(np.ones((1, 3, 1, 1), np.float32), feature_axis=1),
        ValueError,
        "over the axes (0, 2, 3)",
        "larger batch",
    ),
    "train of a wrong kind": (lambda: call(train=1), TypeError, "train is 1", "True or False"),
    "dtype of integers": (lambda: call(dtype=jnp.int32), TypeError, "dtype=int32", "jnp.bfloat16"),
    "complex x, real dtype": (
        lambda: call(X.astype(np.complex64), dtype=jnp.float32),
        TypeError,
        "drop the imaginary part",
        "x.real",
    ),
    "stats of another kind": (
        lambda: call(X, measure(X, 0)),
        TypeError,
        "stats is Moments, expected BatchStats or None",
        "BatchStats.make(features)",
    ),
    "stats as a dictionary of Flax": (
        lambda: call(X, stats(3)._asdict(), train=False),
        TypeError,
        "stats is dict",
        'BatchStats(**variables["batch_stats"])',
    ),
    "BatchStats.make of integers": (
        lambda: BatchStats.make(3, int),
        TypeError,
        "normjax.BatchStats.make: dtype=int",
        "jnp.float32",
    ),
    "complex scale of a real x": (
        lambda: call(X, None, 1j * np.ones(3, np.complex64)),
        TypeError,
        "scale has dtype complex64",
        "Pass scale.real",
    ),
    "complex variance": (
        lambda: call(X.astype(np.complex64), stats(3, var=jnp.ones(3, jnp.complex64))),
        TypeError,
        "stats.var has dtype complex64",
        "stats.var is always real",
    ),
    "complex mean to normalize by": (
        lambda: normalize(X, np.complex64(1j), 1.0),
        TypeError,
        "mean has dtype complex64",
        "or a complex x",
    ),
    "momentum for each feature": (
        lambda: call(momentum=np.full((2, 1), 0.9)),
        TypeError,
        "momentum is an array of shape (2, 1)",
        "a number from 0 to 1",
    ),
    "momentum of NumPy above 1": (
        lambda: call(momentum=np.float32(1.5)),
        ValueError,
        "momentum=1.5",
        "from 0 to 1",
    ),
    "momentum as text": (lambda: call(momentum="0.9"), TypeError, "'0.9'", "a number from 0 to 1"),
    "epsilon None": (lambda: call(epsilon=None), TypeError, "epsilon is None", "at least 0"),
    "negative epsilon of JAX": (
        lambda: call(epsilon=jnp.float32(-5)),
        ValueError,
        "epsilon=-5.0",
        "at least 0",
    ),
    "epsilon for each feature": (
        lambda: call(epsilon=np.ones(3)),
        TypeError,
        "epsilon is an array of shape (3,)",
        "a finite number",
    ),
    "x None": (lambda: call(None), TypeError, "x is NoneType", "an array"),
    "features in another order": (
        lambda: call(CUBE, stats((3, 5)), feature_axis=(2, 1)),
        ValueError,
        "stats.mean has shape (3, 5), expected (5, 3)",
        "keep the order that they have in x",
    ),
    "groups without an axis": (
        lambda: call(axis_index_groups=[[0, 1]]),
        ValueError,
        "axis_index_groups=[[0, 1]] without an axis_name",
        "Pass the name",
    ),
    "measure over a wrong axis": (
        lambda: measure(X, 5),
        ValueError,
        "normjax.measure: axis=5",
        "-2",
    ),
    "merge of unequal features": (
        lambda: merge(measure(X, 0), measure(CUBE[0, :, :2], 0)),
        ValueError,
        "normjax.merge: got moments of the shapes [(2,), (3,)]",
        "the same features",
    ),
    "groups that do not divide": (
        lambda: group_norm(CUBE[..., :1].repeat(6, -1), num_groups=4),
        ValueError,
        "Number of groups (4) does not divide the number of channels (6)",
        "one of [1, 2, 3, 6]",
    ),
    "group size that does not divide": (
        lambda: group_norm(CUBE, group_size=2),
        ValueError,
        "Number of channels (3) is not multiple of the group size (2)",
        "one of [1, 3]",
    ),
    "num_groups and group_size": (
        lambda: group_norm(CUBE, num_groups=1, group_size=3),
        ValueError,
        "num_groups=1 and group_size=3",
        "Pass None for the other",
    ),
    "neither num_groups nor group_size": (
        lambda: group_norm(CUBE),
        ValueError,
        "Either `num_groups` or `group_size` should be specified. If",
        "Pass None for the other",
    ),
    "zero groups": (lambda: group_norm(CUBE, num_groups=0), ValueError, "(0)", "one of [1, 3]"),
    "layer norm over a wrong axis": (
        lambda: layer_norm(CUBE, axis=3),
        ValueError,
        "normjax.layer_norm: axis=3 is out of range for x with shape (4, 5, 3)",
        "from -3 to 2",
    ),
    "layer norm over an empty axis": (
        lambda: layer_norm(CUBE[..., :0]),
        ValueError,
        "has no element over the axes (2,)",
        "Leave empty inputs out",
    ),
    "RMS norm with a scale of another axis": (
        lambda: rms_norm(CUBE, np.ones(5, np.float32)),
        ValueError,
        "scale has shape (5,), expected (3,)",
        "pass feature_axis=",
    ),
    "RMS norm of integers": (lambda: rms_norm(CUBE.astype(int)), TypeError, "int32", "Convert"),
    "instance norm of a batch of features": (
        lambda: instance_norm(CUBE, feature_axis=0),
        ValueError,
        "cannot include the leading dimension",
        "Move the batch there",
    ),
    "mean that does not broadcast": (
        lambda: normalize(X, np.ones(4, np.float32), 1.0),
        ValueError,
        "mean has shape (4,), which does not broadcast to x with shape (4, 3)",
        "size 1 on every axis",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_promise_9_errors_say_what_was_got_and_what_to_do(name):
    function, kind, got, remedy = REFUSED[name]
    with pytest.raises(kind) as error:
        function()
    message = str(error.value)
    assert message.startswith("normjax.")
    assert got in message
    assert remedy in message


def test_a_mask_is_ambiguous_only_if_the_readings_differ():
    for mask in (True, np.ones(1, bool), np.ones((1, 1), bool), np.ones((4, 1), bool)):
        call(mask=mask)
    # NumPy's reading is the only one of a mask over features when N and C differ.
    call(mask=np.array([True, True, False]))


def test_axes_may_come_in_any_collection():
    for axis in ([1], (1,), {1}, np.array([1]), np.int64(1)):
        assert call(CUBE, feature_axis=axis)[0].shape == CUBE.shape


def test_numbers_may_be_those_of_numpy_and_jax():
    call(momentum=np.float32(0.9), epsilon=jnp.float32(1e-3), ddof=np.int64(1))


def test_epsilon_zero_and_momentum_at_both_ends_are_allowed():
    call(np.arange(8, dtype=np.float32).reshape(4, 2), epsilon=0, momentum=0)
    call(momentum=1)


def test_errors_name_the_called_function():
    with pytest.raises(ValueError, match=r"^normjax.batch_norm: mask"):
        call(mask=np.ones(4, bool))
    with pytest.raises(ValueError, match=r"^normjax.measure: mask"):
        normjax.measure(X, 0, np.ones(4, bool))
