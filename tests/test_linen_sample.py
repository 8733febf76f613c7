"""LayerNorm, RMSNorm, GroupNorm and InstanceNorm in place of those of flax.linen."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.serialization import from_bytes, to_bytes

import normjax.linen

pytestmark = pytest.mark.usefixtures("lenient")
KEY = jax.random.key(0)
NAMES = ["LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm"]
ADDED = {"GroupNorm": ["feature_axis"]}
OPTIONS = {
    "LayerNorm": [
        {},
        {"reduction_axes": (1, 2, 3)},
        {"reduction_axes": (1, 2), "feature_axes": -1},
    ],
    "RMSNorm": [{}, {"reduction_axes": (1, 2, 3), "feature_axes": (2, 3)}],
    "GroupNorm": [
        {"num_groups": 2},
        {"num_groups": None, "group_size": 2},
        {"num_groups": 2, "reduction_axes": (2, 3)},
    ],
    "InstanceNorm": [{}, {"feature_axes": (1, -1)}],
}
CASES = [(name, options) for name in NAMES for options in OPTIONS[name]]


def pair(name):
    return getattr(nn, name), getattr(normjax.linen, name)


@pytest.fixture
def images(rng):
    return rng.normal(1, 2, (3, 4, 5, 6)).astype(np.float32)


def as_float32(leaf):
    return np.asarray(leaf).astype(np.float32)


@pytest.mark.parametrize("name", NAMES)
def test_fields_are_those_of_flax_in_their_order(name):
    flax, ours = (
        [f for f in dataclasses.fields(cls) if f.name not in ("parent", "name")]
        for cls in pair(name)
    )
    assert [f.name for f in ours] == [f.name for f in flax] + ADDED.get(name, [])
    assert [f.default for f in ours[: len(flax)]] == [f.default for f in flax]


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("kept", [{}, {"use_scale": False}])
def test_same_variables_outputs_and_gradients(images, name, options, kept):
    if name != "RMSNorm" and kept:
        kept = {**kept, "use_bias": False}
    # With random initial values, outputs depend on the order in which parameters are created.
    draws = {"scale_init": nn.initializers.normal(1.0)}
    draws |= {} if name == "RMSNorm" else {"bias_init": nn.initializers.normal(1.0)}
    results = []
    for cls in pair(name):
        module = cls(**options, **kept, **draws)
        variables = jax.jit(module.init)(KEY, images)

        def loss(variables, x, module=module):
            y = module.apply(variables, x)
            return jnp.sum(jnp.sin(y)), y

        grads, y = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(variables, images)
        results.append((variables, y, grads))
    (flax_variables, *flax), (our_variables, *ours) = results
    jax.tree.map(np.testing.assert_array_equal, our_variables, flax_variables)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), ours, flax)


@pytest.mark.parametrize(("name", "options"), CASES[::2])
def test_checkpoints_load_both_ways(images, name, options):
    flax, ours = (cls(**options) for cls in pair(name))
    for writer, reader in ((flax, ours), (ours, flax)):
        variables = jax.tree.map(lambda v: np.asarray(v) + 0.5, writer.init(KEY, images))
        loaded = from_bytes(reader.init(KEY, images), to_bytes(variables))
        got, want = (
            jax.jit(m.apply)(v, images) for m, v in ((reader, loaded), (writer, variables))
        )
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("x_dtype", "dtype", "param_dtype"),
    [
        ("bfloat16", None, "float32"),
        ("bfloat16", None, "bfloat16"),
        ("float32", "bfloat16", "float32"),
        ("float16", "float32", "float16"),
    ],
)
def test_dtype_rules_are_those_of_flax(images, name, x_dtype, dtype, param_dtype):
    options = {"num_groups": 2} if name == "GroupNorm" else {}
    x = jnp.asarray(images, x_dtype)
    flax, ours = (
        cls(dtype=dtype, param_dtype=param_dtype, **options).init_with_output(KEY, x)
        for cls in pair(name)
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(flax), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(
            as_float32(a), as_float32(b), atol=8 * float(jnp.finfo(a.dtype).eps)
        )


@pytest.mark.parametrize("name", NAMES)
def test_masks_are_those_of_flax_but_for_nan(images, name, rng):
    options = {"num_groups": 2} if name == "GroupNorm" else {}
    mask = np.broadcast_to(rng.random((3, 4, 5, 1)) < 0.7, images.shape)
    if name in ("LayerNorm", "RMSNorm"):  # a row with nothing valid is NaN in flax
        mask = rng.random(images.shape) < 0.7
        mask[..., 0] = True
    flax, ours = (cls(**options) for cls in pair(name))
    variables = flax.init(KEY, images)
    want = flax.apply(variables, images, mask=mask)
    np.testing.assert_allclose(ours.apply(variables, images, mask=mask), want, atol=2e-5)
    padded = np.where(mask, images, np.float32(np.nan))
    grad = jax.jit(jax.grad(lambda x: jnp.sum(ours.apply(variables, x, mask=mask) ** 2)))(padded)
    assert np.isfinite(grad).all()
    assert np.isfinite(ours.apply(variables, padded, mask=mask)).all()


@pytest.mark.parametrize("name", NAMES)
def test_scale_and_bias_may_come_at_the_call(images, name, rng):
    options = {"num_groups": 2} if name == "GroupNorm" else {}
    module = getattr(normjax.linen, name)(**options)
    given = {"scale": rng.normal(1, 1, (3, 6)).astype(np.float32)}
    if name != "RMSNorm":
        given["bias"] = rng.normal(1, 1, (3, 6)).astype(np.float32)
    y, variables = module.init_with_output(KEY, images, **given)
    assert not variables.get("params")
    stored = module.init(KEY, images)
    for i in range(3):
        params = {key: value[i] for key, value in given.items()}
        assert set(params) == set(stored["params"])
        want = module.apply({"params": params}, images[i : i + 1])[0]
        np.testing.assert_allclose(y[i], want, atol=1e-5)


def test_batch_norm_accepts_a_scale_at_the_call(images, rng):
    scale = rng.normal(1, 1, (3, 6)).astype(np.float32)
    module = normjax.linen.BatchNorm()
    y, variables = module.init_with_output(KEY, images, train=True, scale=scale)
    assert set(variables["params"]) == {"bias"}
    plain, _ = normjax.batch_norm(images, None, train=True)
    np.testing.assert_allclose(y, plain * scale[:, None, None, :], atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_init_needs_no_bound_axis(images, name):
    options = {"num_groups": 2} if name == "GroupNorm" else {}
    module = getattr(normjax.linen, name)(axis_name="unbound", **options)
    variables = module.init(KEY, images)
    with pytest.raises(NameError, match="bound are: none"):
        module.apply(variables, images)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_groups": 4}, ["Number of groups (4) does not divide the number of channels (6)"]),
        ({"num_groups": 2, "group_size": 3}, ["num_groups", "group_size", "should be specified"]),
        ({"num_groups": None}, ["num_groups", "group_size", "should be specified"]),
        (
            {"num_groups": None, "group_size": 4},
            ["Number of channels (6) is not multiple of the group size (4)"],
        ),
    ],
)
def test_errors_are_those_of_flax_and_say_more(images, options, words):
    for cls in pair("GroupNorm"):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            cls(**options).init(KEY, images)
        # Flax's messages contain the line breaks of its source.
        assert all(word in str(error.value).replace("`", "") for word in words)
    assert "normjax" in str(error.value)


def test_group_norm_has_any_feature_axis(images):
    first = np.moveaxis(images, -1, 1)
    y = normjax.linen.GroupNorm(num_groups=2, feature_axis=1).init_with_output(KEY, first)[0]
    want = nn.GroupNorm(num_groups=2).init_with_output(KEY, images)[0]
    np.testing.assert_allclose(np.moveaxis(y, 1, -1), want, atol=1e-5)


def test_group_norm_takes_several_batch_axes(images):
    """Two batch axes, given by reduction_axes: each example is normalized on its own."""
    stacked = np.stack([images, 3 * images + 1])
    module = normjax.linen.GroupNorm(num_groups=2, reduction_axes=(-3, -2, -1))
    y, variables = module.init_with_output(KEY, stacked)
    alone = normjax.linen.GroupNorm(num_groups=2)
    for i in range(2):
        np.testing.assert_allclose(y[i], alone.apply(variables, stacked[i]), atol=1e-5)
