"""Batch norm to group norm: outputs for typical examples, and names of the new layers."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict, freeze

import normjax.linen
from normjax import surgery
from tests.models import ResNet, images, trained

pytestmark = pytest.mark.usefixtures("lenient")

EPS = np.finfo(np.float32).eps


def typical(mean, var, rng, shape=(3, 6, 6)):
    """Examples that have exactly these moments in each channel."""
    z = rng.normal(size=(*shape, len(mean)))
    z = (z - z.mean((1, 2), keepdims=True)) / z.std((1, 2), keepdims=True)
    return mean + np.sqrt(var) * z


@pytest.mark.parametrize("groups", [{"num_groups": 2}, {"num_groups": None, "group_size": 1}])
@pytest.mark.parametrize("kind", [nn.GroupNorm, normjax.linen.GroupNorm])
def test_convert_guarantee_typical_examples_come_out_as_before(groups, kind, rng):
    mean, var = rng.normal(0, 3, 6), rng.uniform(0.5, 4, 6)
    scale, bias = rng.normal(1, 0.3, 6), rng.normal(0, 1, 6)
    x = typical(mean, var, rng)
    expected = (x - mean) / np.sqrt(var + 1e-5) * scale + bias
    vectors = {"mean": mean, "var": var, "scale": scale, "bias": bias}
    vectors = {name: jnp.asarray(v, jnp.float32) for name, v in vectors.items()}
    variables = {
        "params": {"scale": vectors["scale"], "bias": vectors["bias"]},
        "batch_stats": {"mean": vectors["mean"], "var": vectors["var"]},
    }
    new = surgery.convert(variables, **groups)
    assert set(new) == {"params"}
    y = kind(**groups).apply(new, jnp.asarray(x, jnp.float32))
    # Rounding of inputs as large as 10 deviations, and epsilon = 1e-6 beside a variance of 0.5.
    np.testing.assert_allclose(y, expected, atol=100 * EPS * np.abs(expected).max() + 4e-6)
    copied = kind(**groups).apply({"params": variables["params"]}, jnp.asarray(x, jnp.float32))
    if groups["num_groups"]:
        assert np.abs(copied - expected).max() > 0.5


def test_convert_takes_a_whole_model():
    """The norm of the model is a field."""

    class Net(nn.Module):
        norm: type
        options: dict

        @nn.compact
        def __call__(self, x):
            norm = partial(self.norm, **self.options)
            x = norm()(nn.Conv(4, (3, 3))(x))
            return norm(name="last")(norm()(nn.Dense(6)(x)))

    before = Net(nn.BatchNorm, {"use_running_average": True})
    after = Net(nn.GroupNorm, {"num_groups": 2})
    x = images()
    variables = before.init(jax.random.key(0), x)
    new = surgery.convert(variables, num_groups=2)
    expected = after.init(jax.random.key(0), x)
    assert jax.tree.structure(new) == jax.tree.structure(expected)
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, expected)
    assert after.apply(new, x).shape == (8, 4, 4, 6)


def test_convert_guarantee_nothing_else():
    variables = trained(ResNet())
    before = jax.tree.map(np.array, variables)
    new = surgery.convert(variables, num_groups=2)
    assert new["params"]["stem"]["kernel"] is variables["params"]["stem"]["kernel"]
    assert new["params"]["head"] == variables["params"]["head"]
    assert set(new["params"]["block_0"]) == {"Conv_0", "Conv_1", "GroupNorm_0", "last"}
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    frozen = surgery.convert(freeze(variables), num_groups=2)
    assert isinstance(frozen, FrozenDict)


def numbered(*names, params=()):
    one = {"scale": jnp.ones(4), "bias": jnp.zeros(4)}
    stats = {"mean": jnp.zeros(4), "var": jnp.ones(4)}
    return {
        "params": {**{n: {**one, "scale": i * one["scale"]} for i, n in enumerate(names)}}
        | dict.fromkeys(params, one),
        "batch_stats": dict.fromkeys(names, stats),
    }


def test_convert_edge_the_others_are_renumbered():
    names = [f"BatchNorm_{i}" for i in range(12)]
    chosen = ["BatchNorm_0", "BatchNorm_10", "BatchNorm_3"]
    new = surgery.convert(numbered(*names), num_groups=2, at=chosen)
    scales = {name: round(float(node["scale"][0])) for name, node in new["params"].items()}
    left = [i for i in range(12) if i not in (0, 3, 10)]
    assert scales == {
        **{f"GroupNorm_{i}": k for i, k in enumerate((0, 3, 10))},
        **{f"BatchNorm_{i}": k for i, k in enumerate(left)},
    }
    assert set(new["batch_stats"]) == {f"BatchNorm_{i}" for i in range(9)}


def test_convert_edge_none_of_the_batch_norms_is_left():
    other = {"sigma": jnp.ones(())}
    variables = numbered("a", "b")
    assert "batch_stats" not in surgery.convert(variables, num_groups=2)
    assert set(surgery.convert(variables, num_groups=2, at="a")["batch_stats"]) == {"b"}
    variables["batch_stats"]["spectral"] = other
    assert surgery.convert(variables, num_groups=2)["batch_stats"] == {"spectral": other}


def test_convert_edge_no_scale_no_bias(rng):
    stats = {"mean": jnp.array([1.0, 3.0]), "var": jnp.array([4.0, 1.0])}
    new = surgery.convert({"batch_stats": {"bn": stats}}, num_groups=1, epsilon=0.0)
    # Group: mean 2, variance (4 + 1) / 2 + 1 = 3.5.
    np.testing.assert_allclose(new["params"]["bn"]["bias"], [0.5, -1], rtol=4 * EPS)
    np.testing.assert_allclose(
        new["params"]["bn"]["scale"], np.sqrt(3.5) / np.array([2, 1]), rtol=4 * EPS
    )


def test_convert_edge_layers_stacked_by_scan_or_vmap():
    stats = {
        "mean": jnp.array([[1.0, 3.0], [0.0, 0.0]]),
        "var": jnp.array([[4.0, 1.0], [1.0, 1.0]]),
    }
    new = surgery.convert({"batch_stats": {"bn": stats}}, num_groups=1, epsilon=0.0)
    np.testing.assert_allclose(new["params"]["bn"]["bias"], [[0.5, -1], [0, 0]], rtol=4 * EPS)


def test_convert_error_messages():
    with pytest.raises(ValueError, match=r"at 'a'.*\(3\) does not divide.*\[1, 2, 4\]"):
        surgery.convert(numbered("a"), num_groups=3)
    with pytest.raises(ValueError, match="Give the layers names"):
        surgery.convert(numbered("BatchNorm_0", params=["GroupNorm_0"]), num_groups=2)
    with pytest.raises(ValueError, match="Give the layers names"):
        surgery.convert(numbered("BatchNorm_0", "BatchRenorm_0"), num_groups=2)
    with pytest.raises(ValueError, match="at='c' matches no batch norm"):
        surgery.convert(numbered("a"), at="c")


def of_channels(**channels):
    return {
        "batch_stats": {
            name: {"mean": jnp.zeros(n), "var": jnp.ones(n)} for name, n in channels.items()
        }
    }


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(7, 1), (32, 32), (35, 7), (50, 25), (252, 28)],
)
def test_convert_edge_channels_that_32_does_not_divide(channels, groups, rng):
    """DenseNet and DABNet have such channels; the warning contains the number of groups."""
    mean, var = rng.normal(0, 3, channels), rng.uniform(0.5, 4, channels)
    variables = {"batch_stats": {"bn": {"mean": jnp.asarray(mean), "var": jnp.asarray(var)}}}
    if groups == 32:
        new = surgery.convert(variables)
    else:
        with pytest.warns(UserWarning, match=rf"the groups are {groups} for 'bn'"):
            new = surgery.convert(variables)
    group = mean.reshape(groups, -1)
    spread = group.var(1) + var.reshape(groups, -1).mean(1)
    repeated = (np.repeat(v, channels // groups) for v in (group.mean(1), np.sqrt(spread)))
    center, deviation = repeated
    s = np.sqrt(var + 1e-5)
    # Rounding of the moments, their differences up to ten deviations, and the product.
    atol = 100 * EPS
    np.testing.assert_allclose(new["params"]["bn"]["bias"], (center - mean) / s, atol=atol)
    np.testing.assert_allclose(new["params"]["bn"]["scale"], deviation / s, rtol=1e-5, atol=atol)


def test_the_error_of_a_wrong_number_of_groups_names_all_layers():
    variables = of_channels(a=50, b=64, c=35, d=50)
    with pytest.raises(ValueError, match="does not divide") as error:
        surgery.convert(variables, num_groups=32)
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert "at 'c': Number of groups (32) does not divide the number of channels (35)" in lines[0]
    assert "at 'a', 'd': Number of groups (32) does not divide" in lines[1]
    assert "A group_size out of [1] divides" in lines[2]
    with pytest.raises(ValueError, match=r"group_size out of \[1, 5\] divides"):
        surgery.convert(variables, num_groups=32, at=["a", "c"])
    with pytest.raises(ValueError, match=r"at 'c': .* \(35\) is not multiple of the group size"):
        surgery.convert(variables, num_groups=None, group_size=2)
