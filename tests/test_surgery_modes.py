"""Freezing and synchronizing the batch norms of models without changing their code."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import normjax.linen
from normjax import surgery
from tests import reference
from tests.models import NORMS, ResNet, images, trained

pytestmark = pytest.mark.usefixtures("lenient")

EPS = np.finfo(np.float32).eps
MODEL = ResNet()
VARIABLES = trained(MODEL)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def close(a, b, factor=200):
    # The eight layers of the network multiply a rounding error by a few; 200 eps is generous.
    def check(u, v):
        np.testing.assert_allclose(u, v, rtol=factor * EPS, atol=factor * EPS * np.abs(v).max())

    jax.tree.map(check, a, b)


def run(apply, variables=VARIABLES, x=None, **options):
    x = images(seed=9, offset=3.0) if x is None else x
    return apply(variables, x, True, mutable=["batch_stats"], **options)


@pytest.mark.parametrize("kind", [nn.BatchNorm, normjax.linen.BatchNorm, normjax.linen.BatchRenorm])
@pytest.mark.parametrize("wrapped", [lambda block: block, nn.remat, nn.jit])
def test_freeze_guarantee_any_model(kind, wrapped):
    model = ResNet(batch_norm=kind, wrap=wrapped)
    variables = trained(model)
    served = model.apply(variables, images(seed=9, offset=3.0), False)
    y, updates = run(surgery.freeze(model.apply), variables)
    close(y, served)
    same(updates["batch_stats"], variables["batch_stats"])


class Scanned(nn.Module):
    """Two blocks by nn.scan, four examples by nn.vmap."""

    @nn.compact
    def __call__(self, x, train):
        class Cell(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.BatchNorm(use_running_average=not train, name="bn")(x), None

        axes = {"params": 0, "batch_stats": 0}
        options = dict(variable_axes=axes, split_rngs={"params": True}, length=2)
        x, _ = nn.scan(Cell, **options)(name="cells")(x, None)
        lifted = nn.vmap(
            nn.BatchNorm, variable_axes=axes, split_rngs={"params": True}, axis_size=2, in_axes=1
        )
        return lifted(use_running_average=not train, name="mapped")(x[:, None] + jnp.ones((2, 1)))


def test_freeze_inside_scan_and_vmap():
    model, x = Scanned(), images()[:, 0, 0]
    variables = model.init(jax.random.key(0), x, False)
    _, updates = model.apply(variables, x, True, mutable=["batch_stats"])
    variables = {**variables, **updates}
    y, updates = run(surgery.freeze(model.apply), variables, x)
    close(y, model.apply(variables, x, False))
    same(updates["batch_stats"], variables["batch_stats"])


def test_freeze_guarantee_statistics_stay():
    _, updates = run(surgery.freeze(MODEL.apply))
    same(updates["batch_stats"], VARIABLES["batch_stats"])
    _, moved = run(MODEL.apply)
    assert not np.array_equal(
        moved["batch_stats"]["stem_bn"]["mean"], VARIABLES["batch_stats"]["stem_bn"]["mean"]
    )


def gradients(apply, variables=VARIABLES):
    def loss(params):
        return (run(apply, {**variables, "params": params})[0] ** 2).sum()

    return jax.jit(jax.grad(loss))(variables["params"])


def by_layer(tree):
    flat = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        flat["/".join(k.key for k in path)] = leaf
    return flat


def test_freeze_guarantee_learns_nothing():
    flat = by_layer(gradients(surgery.freeze(MODEL.apply)))
    for path, gradient in flat.items():
        norm = path.rsplit("/", 1)[0] in NORMS
        assert bool(np.any(gradient)) != norm, path


def test_freeze_by_path_does_not_change_the_others():
    flat = by_layer(gradients(surgery.freeze(MODEL.apply, at="block_*/last")))
    still = {path for path, gradient in flat.items() if not np.any(gradient)}
    assert still == {f"block_{i}/last/{n}" for i in (0, 1) for n in ("scale", "bias")}
    _, updates = run(surgery.freeze(MODEL.apply, at=["stem_bn", "block_0/*"]))
    for path in NORMS:
        node, old = updates["batch_stats"], VARIABLES["batch_stats"]
        for name in path.split("/"):
            node, old = node[name], old[name]
        frozen = path == "stem_bn" or path.startswith("block_0/")
        assert np.array_equal(node["mean"], old["mean"]) == frozen, path


def test_freeze_guarantee_never_a_stale_trace():
    """A function that is compiled before and after, and blocks that Flax compiles."""
    for first_frozen in (False, True):
        compiled = jax.jit(partial(MODEL.apply, train=True, mutable=["batch_stats"]))
        frozen = surgery.freeze(compiled)
        x = images(seed=9, offset=3.0)
        if first_frozen:
            frozen(VARIABLES, x)
        free, _ = compiled(VARIABLES, x)
        still, _ = frozen(VARIABLES, x)
        again, _ = compiled(VARIABLES, x)
        same(free, again)
        close(still, MODEL.apply(VARIABLES, x, False))
        assert np.abs(free - still).max() > 0.1

    model = ResNet(wrap=nn.jit)
    free, _ = run(model.apply)
    still, _ = run(surgery.freeze(model.apply))
    again, _ = run(model.apply)
    same(free, again)
    close(still, model.apply(VARIABLES, images(seed=9, offset=3.0), False))


def test_wrapping_again_does_not_compile_again():
    traces = []

    class Counted(nn.Module):
        @nn.compact
        def __call__(self, x):
            traces.append(1)
            return nn.BatchNorm(use_running_average=False)(x)

    model = nn.jit(Counted)()
    x = images()
    variables = model.init(jax.random.key(0), x)
    traces.clear()
    for _ in range(3):
        surgery.freeze(model.apply)(variables, x)
    assert len(traces) == 1


def test_freeze_edge_no_batch_stats_of_a_layer():
    with pytest.raises(ValueError, match=r"'stem_bn' has no running statistics"):
        run(surgery.freeze(MODEL.apply), {"params": VARIABLES["params"]})


def test_freeze_edge_init():
    def init(key, x):
        return MODEL.init(key, x, True)

    same(surgery.freeze(init)(jax.random.key(0), images()), init(jax.random.key(0), images()))


def test_a_subclass_that_calls_its_parent_is_frozen():
    class Doubled(nn.BatchNorm):
        @nn.compact
        def __call__(self, x, use_running_average=None):
            return 2 * super().__call__(x, use_running_average)

    model, x = Doubled(), images()
    variables = model.init(jax.random.key(0), x, True)
    close(surgery.freeze(model.apply)(variables, x, False), model.apply(variables, x, True))


def test_a_shared_layer_and_arguments_at_the_call():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = normjax.linen.BatchNorm(name="bn")
            mask, scale = jnp.ones((8, 1, 1, 1), bool).at[0].set(False), jnp.array([2.0, 3.0])
            return layer(layer(x, train=True), train=True, mask=mask, scale=scale)

    x = images()
    variables = Model().init(jax.random.key(0), x)
    y = surgery.freeze(Model().apply)(variables, x)
    close(y, x / (1 + 1e-5) * jnp.array([2.0, 3.0]))


def test_wrappers_compose():
    apply = surgery.synchronize(surgery.freeze(MODEL.apply), "batch")
    y, _ = run(apply)  # Frozen layers share nothing, so the axis need not be bound.
    close(y, MODEL.apply(VARIABLES, images(seed=9, offset=3.0), False))


@pytest.mark.parametrize("tool", [surgery.freeze, partial(surgery.synchronize, axis_name="batch")])
def test_error_messages(tool):
    with pytest.raises(TypeError, match=r"got ResNet, expected a function"):
        tool(MODEL)
    with pytest.raises(TypeError, match=r"at=3, expected a pattern"):
        tool(MODEL.apply, at=3)
    with pytest.raises(ValueError, match=r"at='nowhere' matches no batch norm.*'block_0/last'"):
        tool(MODEL.apply, at=("stem_bn", "nowhere"))(VARIABLES, images(), False)
    dense = nn.Dense(2)
    with pytest.raises(ValueError, match=r"no batch norm ran"):
        tool(dense.apply)(dense.init(jax.random.key(0), images()), images())


def test_errors_of_layers_are_unchanged():
    layer, x = nn.BatchNorm(), images()
    variables = layer.init(jax.random.key(0), x, True)
    with pytest.raises(TypeError, match="surprise"):
        surgery.freeze(layer.apply)(variables, x, surprise=1)
    ours = normjax.linen.BatchNorm(use_running_average=True)
    with pytest.raises(ValueError, match="one switch"):
        surgery.freeze(ours.apply)(variables, x, train=True)


def test_frozen_mask_guarantee_by_role():
    mask = by_layer(surgery.frozen_mask(VARIABLES))
    assert {p for p, m in mask.items() if m} == {
        f"{p}/{n}" for p in NORMS for n in ("scale", "bias")
    }
    mask = by_layer(surgery.frozen_mask(VARIABLES, at="stem*"))
    assert {p for p, m in mask.items() if m} == {"stem_bn/scale", "stem_bn/bias"}


def test_frozen_mask_prevents_weight_decay():
    params = VARIABLES["params"]
    mask = surgery.frozen_mask(VARIABLES)
    decayed = optax.adamw(0.1, weight_decay=0.1)
    masked = optax.chain(decayed, optax.masked(optax.set_to_zero(), mask))
    gradient = gradients(surgery.freeze(MODEL.apply))
    for optimizer, still in ((decayed, False), (masked, True)):
        updates, _ = optimizer.update(gradient, optimizer.init(params), params)
        flat = by_layer(updates)
        assert np.any(flat["stem_bn/scale"]) != still
        assert np.any(flat["stem/kernel"])


def test_frozen_mask_takes_one_layer_as_the_model():
    layer = nn.BatchNorm(use_running_average=True)
    variables = layer.init(jax.random.key(0), images())
    assert surgery.frozen_mask(variables) == {"scale": True, "bias": True}


def oracle(x, variables, momentum=0.9):
    """One batch norm over all of x in float64."""
    r = reference.batch_norm(x, 1.0, 0.0, axes=(0, 1, 2))
    return r.y, {
        "mean": reference.running(np.asarray(variables["batch_stats"]["mean"]), r.mean, momentum),
        "var": reference.running(np.asarray(variables["batch_stats"]["var"]), r.var, momentum),
    }


@pytest.mark.parametrize("kind", [nn.BatchNorm, normjax.linen.BatchNorm])
def test_synchronize_guarantee_shared_exactly(kind):
    """Four devices, pmap and shard_map, against one call on the whole batch."""
    layer = kind(use_running_average=False, momentum=0.9)
    x = (
        np.asarray(images(n=8, offset=50.0))
        * np.arange(1, 9, dtype=np.float32)[:, None, None, None]
    )
    variables = layer.init(jax.random.key(0), x)
    apply = partial(surgery.synchronize(layer.apply, "batch"), mutable=["batch_stats"])
    y, stats = oracle(x.astype(np.float64), variables)

    got, updates = jax.pmap(apply, "batch", in_axes=(None, 0))(variables, x.reshape(4, 2, 4, 4, 2))
    close(got.reshape(x.shape), y)
    for i in range(4):
        close(jax.tree.map(lambda leaf, i=i: leaf[i], updates["batch_stats"]), stats)

    mesh = Mesh(jax.devices()[:4], "batch")
    sharded = jax.shard_map(
        apply, mesh=mesh, in_specs=(P(), P("batch")), out_specs=(P("batch"), P())
    )
    got, updates = jax.jit(sharded)(variables, x)
    close(got, y)
    close(updates["batch_stats"], stats)


def test_synchronize_shares_gradients_of_a_model_that_imports_only_flax():
    """The gradient over four devices is that of one call on the whole batch."""
    x = images(seed=5)
    mesh = Mesh(jax.devices()[:4], "batch")
    apply = surgery.synchronize(MODEL.apply, "batch")

    def loss(params, x):
        variables = {**VARIABLES, "params": params}
        sharded = jax.shard_map(
            lambda v, x: run(apply, v, x), mesh=mesh, in_specs=(P(), P("batch")),
            out_specs=(P("batch"), P()),
        )  # fmt: skip
        return (sharded(variables, x)[0] ** 2).sum()

    def whole(params, x):
        return (run(normjax_model.apply, {**VARIABLES, "params": params}, x)[0] ** 2).sum()

    normjax_model = ResNet(batch_norm=normjax.linen.BatchNorm)
    got = jax.jit(jax.grad(loss))(VARIABLES["params"], x)
    close(got, jax.jit(jax.grad(whole))(VARIABLES["params"], x), factor=2000)


def test_synchronize_guarantee_evaluation_unchanged():
    y = surgery.synchronize(MODEL.apply, "batch")(VARIABLES, images(), False)
    same(y, MODEL.apply(VARIABLES, images(), False))


def test_synchronize_edge_the_layer_has_an_axis_name():
    layer = nn.BatchNorm(use_running_average=False, axis_name="other")
    x = images(n=4)
    variables = layer.init(jax.random.key(0), x)
    apply = partial(surgery.synchronize(layer.apply, "batch"), mutable=["batch_stats"])
    got, _ = jax.vmap(apply, (None, 0), axis_name="batch")(variables, x.reshape(2, 2, 4, 4, 2))
    close(got.reshape(x.shape), oracle(np.asarray(x, np.float64), variables)[0])


def test_synchronize_needs_a_bound_axis():
    with pytest.raises(NameError, match=r"axis_name='batch' is not bound"):
        run(surgery.synchronize(MODEL.apply, "batch"))


def test_synchronized_layers_keep_the_moments_of_micro_batches():
    """Layers of normjax also accumulate moments under the wrapper."""
    layer = normjax.linen.BatchNorm(use_running_average=False)
    x = images(n=4, offset=3.0)
    variables = layer.init(jax.random.key(0), x)
    apply = partial(surgery.synchronize(layer.apply, "batch"), mutable=["batch_moments"])
    _, kept = jax.vmap(apply, (None, 0), axis_name="batch")(variables, x.reshape(2, 2, 4, 4, 2))
    moments = kept["batch_moments"]["moments"]
    np.testing.assert_array_equal(moments.count[0], 64)
    close(moments.mean[1], np.asarray(x, np.float64).mean((0, 1, 2)))


def test_edits_keep_an_activation():
    """A layer with an activation runs its own code, not that of batch norm."""
    model = normjax.linen.BatchNormAct(activation=normjax.ELU())
    x = jnp.array([[-3.0, 1.0], [2.0, -4.0]])
    variables = model.init(jax.random.key(0), x, train=False)
    served = model.apply(variables, x, train=False)
    frozen = surgery.freeze(model.apply)(variables, x, train=True, mutable=["batch_stats"])[0]
    np.testing.assert_array_equal(frozen, served)
    assert served.min() > -1

    def shared(x, model=model):
        apply = surgery.synchronize(model.apply, "d")
        return apply(variables, x, train=True, mutable=["batch_stats"])[0]

    whole = model.apply(variables, x, train=True, mutable=["batch_stats"])[0]
    parts = jax.vmap(shared, axis_name="d")(x[:, None])
    np.testing.assert_allclose(parts[:, 0], whole, rtol=1e-6)
