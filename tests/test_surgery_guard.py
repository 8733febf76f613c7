"""guard accepts or refuses calls; reset restores the initial statistics."""

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

MODEL = ResNet()
VARIABLES = trained(MODEL)


def test_guard_guarantee_output_unchanged():
    x = images()
    for apply in (MODEL.apply, jax.jit(MODEL.apply, static_argnums=2)):
        got = surgery.guard(apply)(VARIABLES, x, False)
        np.testing.assert_array_equal(got, apply(VARIABLES, x, False))


def test_guard_fails_in_training_mode():
    train = partial(MODEL.apply, train=True, mutable=["batch_stats"])
    for apply in (
        surgery.guard(train),
        jax.jit(surgery.guard(train)),
        surgery.guard(jax.jit(train)),
    ):
        with pytest.raises(ValueError, match=r"'stem_bn' would run in training mode.*train=False"):
            apply(VARIABLES, images())
    surgery.guard(surgery.freeze(train))(VARIABLES, images())
    with pytest.raises(ValueError, match="training mode"):
        surgery.freeze(surgery.guard(train))(VARIABLES, images())


def test_guard_fails_in_training_mode_if_compiled_before():
    compiled = jax.jit(partial(MODEL.apply, train=True, mutable=["batch_stats"]))
    compiled(VARIABLES, images())
    with pytest.raises(ValueError, match="training mode"):
        surgery.guard(compiled)(VARIABLES, images())


@pytest.mark.parametrize(("name", "value"), [("mean", np.nan), ("var", np.inf)])
def test_guard_fails_for_statistics_that_are_not_finite(name, value):
    broken = jax.tree.map(lambda leaf: leaf, VARIABLES)
    stats = broken["batch_stats"]["stem_bn"]
    stats[name] = stats[name].at[0].set(value)
    with pytest.raises(ValueError, match=f"'stem_bn' has a running {name} that is NaN or infinite"):
        surgery.guard(MODEL.apply)(broken, images(), False)


def test_guard_guarantee_before_anything_runs():
    ran = []

    def apply(variables, x):
        ran.append(1)
        return MODEL.apply(variables, x, False)

    fresh = surgery.reset(VARIABLES, at="block_1/last")
    with pytest.raises(ValueError, match=r"'block_1/last' has statistics that were never updated"):
        surgery.guard(apply)(fresh, images())
    assert not ran
    with pytest.raises(ValueError, match="never updated"):
        surgery.guard(apply)(variables=fresh, x=images())
    surgery.guard(apply, at="block_0/*")(fresh, images())
    assert ran


def test_guard_checks_the_variables_of_a_closure():
    fresh = surgery.reset(VARIABLES, at="block_1/last")
    serve = jax.jit(surgery.guard(lambda x: MODEL.apply(fresh, x, False)))
    with pytest.raises(ValueError, match="never updated"):
        serve(images())


def test_guard_uses_the_count():
    layer = normjax.linen.BatchNorm(debias=True)
    x = jnp.array([[-1.0], [1.0]])
    variables = layer.init(jax.random.key(0), x, train=False)
    with pytest.raises(ValueError, match="never updated"):
        surgery.guard(layer.apply)(variables, x, train=False)
    # This batch has mean 0 and variance 1, the initial statistics.
    _, variables = layer.apply(variables, x, train=True, mutable=["batch_stats"])
    surgery.guard(layer.apply)(
        {"params": {"scale": jnp.ones(1), "bias": jnp.ones(1)}, **variables}, x, train=False
    )


def test_guard_edge_statistics_traced_by_jit():
    serve = jax.jit(surgery.guard(partial(MODEL.apply, train=False)))
    serve(surgery.reset(VARIABLES), images())


def test_guard_edge_statistics_seen_before(monkeypatch):
    serve = surgery.guard(jax.jit(partial(MODEL.apply, train=False)))
    serve(VARIABLES, images())
    looked = []
    monkeypatch.setattr("normjax.surgery._refused.never_updated", lambda node: looked.append(1))
    serve(VARIABLES, images())
    assert not looked
    serve(jax.tree.map(jnp.copy, VARIABLES), images())
    assert looked


def test_reset_guarantee_nothing_else():
    new = surgery.reset(VARIABLES, at="block_*/last")
    for path, leaf in jax.tree_util.tree_leaves_with_path(new):
        names = [key.key for key in path]
        old = VARIABLES
        for name in names:
            old = old[name]
        if names[0] == "batch_stats" and names[-2] == "last":
            np.testing.assert_array_equal(leaf, np.full(4, float(names[-1] == "var")))
            assert np.any(old != leaf), "the argument must not change"
        else:
            assert leaf is old


def test_reset_supports_counts_frozen_dictionaries_and_every_dtype():
    stats = {"mean": jnp.ones(2, jnp.bfloat16), "var": jnp.ones(2) * 3, "count": jnp.ones(2)}
    new = surgery.reset(freeze({"batch_stats": {"bn": stats, "other": {"u": jnp.ones(2)}}}))
    assert isinstance(new, FrozenDict)
    node = new["batch_stats"]["bn"]
    assert node["mean"].dtype == jnp.bfloat16
    assert [float(node[n].sum()) for n in ("mean", "var", "count")] == [0, 2, 0]
    assert float(new["batch_stats"]["other"]["u"].sum()) == 2


def test_reset_equals_init():
    fresh = MODEL.init(jax.random.key(0), images()[:1], False)
    jax.tree.map(
        np.testing.assert_array_equal,
        surgery.reset(VARIABLES)["batch_stats"],
        fresh["batch_stats"],
    )


@pytest.mark.parametrize("tool", [surgery.reset, surgery.frozen_mask])
def test_error_messages(tool):
    with pytest.raises(TypeError, match=r"variables is list, expected the dictionary"):
        tool([1])
    with pytest.raises(ValueError, match=r"no statistics of a batch norm.*\['params'\]"):
        tool({"params": VARIABLES["params"]})
    with pytest.raises(ValueError, match=r"at='bn' matches no batch norm.*'block_0/BatchNorm_0'"):
        tool(VARIABLES, at="bn")


def test_a_model_that_is_one_batch_norm_has_the_empty_path():
    variables = nn.BatchNorm(use_running_average=True).init(jax.random.key(0), images())
    assert surgery.reset(variables, at="")["batch_stats"]["mean"].shape == (2,)
