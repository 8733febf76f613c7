"""Promise 6 for normjax.nnx: every transformation of flax.nnx works, as with the norms of Flax.

One model contains all norms, since compilation takes most of the time. Results are compared with
Flax's own norm if it has one, otherwise with the same model called without a transformation.
"""

import copy
import pickle
from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.errors import TraceContextError
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import normjax
import normjax.linen
import normjax.nnx as ours
from normjax import surgery
from tests import reference
from tests.transformations import entered, mesh

# Older versions of Flax lack tree mode, hijax and views, and their pmap fails with this JAX.
NEWER = pytest.mark.skipif(not hasattr(nnx, "set_graph_mode"), reason="flax.nnx has no tree mode")
EPS = reference.EPS["float32"]
X = np.random.default_rng(0).normal(1, 2, (8, 3, 4)).astype(np.float32)
DY = np.random.default_rng(1).normal(size=X.shape).astype(np.float32)
# Norms with running statistics of a batch.
BATCH = ("BatchNorm", "BatchNormAct", "BatchRenorm")


def close(got, want, factor=64):
    """Equal up to rounding: two sums of up to 24 terms, relative to the largest value."""
    got, want = jax.tree.map(np.asarray, (got, want))
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        assert one.dtype == other.dtype, path
        atol = factor * EPS * max(1, np.abs(other).max(initial=0))
        np.testing.assert_allclose(
            one, other, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path)
        )


def values(model, *filters):
    """The variables as plain arrays, by path."""
    flat = nnx.to_flat_state(nnx.state(model, *filters))
    return {path: jax.tree.map(np.asarray, leaf.get_value()) for path, leaf in flat}


def norms(package, rngs, **options):
    """The norms of a package, with scales other than 1."""
    drawn = dict(scale_init=nnx.initializers.normal(1.0), rngs=rngs)
    batch = drawn | options | dict(momentum=0.9)
    made = {
        "BatchNorm": package.BatchNorm(4, **batch),
        "LayerNorm": package.LayerNorm(4, **drawn),
        "GroupNorm": package.GroupNorm(4, 2, **drawn),
        "RMSNorm": package.RMSNorm(4, **drawn),
        "InstanceNorm": package.InstanceNorm(4, **drawn),
    }
    if package is ours:
        made |= {
            "BatchNormAct": ours.BatchNormAct(4, activation=normjax.ELU(), **batch),
            "BatchRenorm": ours.BatchRenorm(4, r_max=schedule, **batch),
            "counted": ours.BatchNorm(4, **(batch | dict(momentum=None, accumulate=True))),
            "WeightNorm": ours.WeightNorm(nnx.Linear(4, 4, rngs=rngs), **drawn),
            "WeightStandardized": ours.WeightStandardized(
                nnx.Linear(4, 4, rngs=rngs), use_gain=True, rngs=rngs
            ),
            "SpectralNorm": ours.SpectralNorm(nnx.Linear(4, 4, rngs=rngs), rngs=rngs),
        }
    return made


def schedule(steps):
    return 1 + steps.astype(jnp.float32) / 10


class AllNorms(nnx.Module):
    """Each norm of a package, on the same input."""

    def __init__(self, package, seed=0, **options):
        made = norms(package, nnx.Rngs(seed), **options)
        self.names = tuple(made)
        for name, norm in made.items():
            setattr(self, name, norm)

    def __call__(self, x):
        return {name: getattr(self, name)(x) for name in self.names}


def trained_model(train, package=ours):
    model = AllNorms(package)
    for _ in range(2):
        # So that the statistics are not the initial ones.
        model(2 * X)
    if train:
        model.train()
    else:
        model.eval()
    return model


def call(model, x):
    return model(x)


def loss(model, x):
    """A scalar that depends on every output, and the outputs."""
    y = model(x)
    return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(y)), y


@cache
def eager(train):
    """Outputs, updated variables and gradients without a transformation, of Flax's norm if any."""
    found = []
    for package in (ours, nnx):
        model = trained_model(train, package)
        (_, y), grads = nnx.value_and_grad(loss, has_aux=True)(model, jnp.asarray(X))
        found.append((jax.tree.map(np.asarray, y), values(model), flat(grads)))
    for own, of_flax in zip(*found, strict=True):
        assert set(of_flax) < set(own)
        own |= of_flax
    return found[0]


def flat(grads):
    return {path: np.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(grads)}


# Transformations of one call. Each updates the model as the call does.


def by_switch(model, x):
    branches = [lambda m, x: jax.tree.map(jnp.zeros_like, m(2 * x)), call]
    return nnx.jit(lambda i, m, x: nnx.switch(i, branches, m, x))(jnp.asarray(1), model, x)


def by_cond(model, x):
    def other(m, x):
        return jax.tree.map(jnp.zeros_like, m(2 * x))

    return nnx.jit(lambda c, m, x: nnx.cond(c, call, other, m, x))(jnp.asarray(True), model, x)


def blank(model, x):
    shapes = nnx.eval_shape(call, model, x)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def by_fori_loop(model, x):
    def body(_, carry):
        model, x, _ = carry
        return model, x, model(x)

    return nnx.fori_loop(0, 1, body, (model, x, blank(model, x)))[2]


def by_while_loop(model, x):
    def body(carry):
        i, model, x, _ = carry
        return i + 1, model, x, model(x)

    init = jnp.asarray(0), model, x, blank(model, x)
    return nnx.while_loop(lambda carry: carry[0] < 1, body, init)[3]


def by_scan(model, x):
    """The model is carried, the batches are scanned."""
    step = nnx.scan(lambda m, x: (m, m(x)), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    return jax.tree.map(lambda leaf: leaf[0], step(model, x[None])[1])


def by_vmap(model, x):
    """An ensemble of one model."""
    graphdef, state = nnx.split(model)
    one = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[None], state))
    y = nnx.vmap(call)(one, x[None])
    nnx.update(model, jax.tree.map(lambda leaf: leaf[0], nnx.state(one)))
    return jax.tree.map(lambda leaf: leaf[0], y)


def by_split(model, x):
    """Passes variables through plain jax.jit."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def step(params, rest, x):
        model = nnx.merge(graphdef, params, rest)
        return model(x), nnx.state(model, nnx.Not(nnx.Param))

    y, rest = step(params, rest, x)
    nnx.update(model, rest)
    return y


def by_static_graphdef(model, x):
    graphdef, state = nnx.split(model)

    @partial(jax.jit, static_argnums=0)
    def step(graphdef, state, x):
        model = nnx.merge(graphdef, state)
        return model(x), nnx.state(model)

    y, state = step(graphdef, state, x)
    nnx.update(model, state)
    return y


def by_tree_mode(model, x):
    """Modules as plain pytrees."""
    with nnx.set_graph_mode(False), nnx.set_graph_updates(False):
        return nnx.jit(nnx.remat(call))(model, x)


def by_checkify(model, x):
    error, y = nnx.checkify(call)(model, x)
    error.throw()
    return y


def by_copy(model, x, copied):
    other = copied(model)
    before = values(model)
    y = other(x)
    jax.tree.map(np.testing.assert_array_equal, values(model), before)
    nnx.update(model, nnx.state(other))
    return y


TRANSFORMATIONS = {
    "jit": nnx.jit(call),
    "jit, donated": nnx.jit(call, donate_argnums=0),
    "remat": nnx.jit(nnx.remat(call)),
    "cond": by_cond,
    "switch": by_switch,
    "fori_loop": by_fori_loop,
    "while_loop": by_while_loop,
    "scan": by_scan,
    "vmap": by_vmap,
    "split": by_split,
    "static graphdef": by_static_graphdef,
    "tree mode": by_tree_mode,
    "checkify": by_checkify,
    "cached_partial": lambda model, x: nnx.cached_partial(nnx.jit(call), model)(x),
    "view": lambda model, x: nnx.view(model)(x),
    "clone": partial(by_copy, copied=nnx.clone),
    "deepcopy": partial(by_copy, copied=copy.deepcopy),
    "pickle": partial(by_copy, copied=lambda model: pickle.loads(pickle.dumps(model))),
}


def marked(names, *new):
    """Parameters of a test, of which `new` need a recent Flax."""
    return [pytest.param(name, marks=NEWER if name in new else ()) for name in names]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("transformation", marked(TRANSFORMATIONS, "tree mode", "view"))
def test_promise_6_every_way_is_the_call(transformation, train):
    model = trained_model(train)
    y = TRANSFORMATIONS[transformation](model, jnp.asarray(X))
    want, after, _ = eager(train)
    close(y, want)
    close(values(model), after)


# Derivatives by the parameters. Each updates the statistics as the call does.


def by_grad(model, x):
    return nnx.value_and_grad(loss, has_aux=True)(model, x)[::-1]


def by_diff_state(model, x):
    """Differentiates by the parameters of the second argument."""
    params = nnx.DiffState(1, nnx.Param)
    grads, y = nnx.grad(lambda x, model: loss(model, x), argnums=params, has_aux=True)(x, model)
    return grads, (None, y)


def by_remat(model, x):
    return nnx.value_and_grad(nnx.remat(loss), has_aux=True)(model, x)[::-1]


def by_jax_grad(model, x):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def split_loss(params):
        # A copy, since variables may only change in the trace that created them.
        model = nnx.merge(graphdef, params, rest, copy=True)
        value, y = loss(model, x)
        return value, (y, nnx.state(model, nnx.Not(nnx.Param)))

    grads, (y, rest) = jax.grad(split_loss, has_aux=True)(params)
    nnx.update(model, rest)
    return grads, (None, y)


def by_vjp(model, x):
    """In tree mode, where the cotangent of a model is a model."""
    modes = dict(graph=False, graph_updates=False)
    (value, y), pull = nnx.vjp(loss, model, x, **modes)
    grads, _ = pull((jnp.ones_like(value), jax.tree.map(jnp.zeros_like, y)))
    return nnx.state(grads, nnx.Param), (None, y)


GRADS = {"grad": by_grad, "DiffState": by_diff_state, "remat": by_remat, "jax.grad": by_jax_grad}


@pytest.mark.parametrize("transformation", marked([*GRADS, "vjp"], "vjp"))
@pytest.mark.parametrize("train", [True, False])
def test_promise_6_gradients_by_every_way(transformation, train):
    """Gradients equal those of Flax, and the statistics are updated as without a gradient."""
    model, x = trained_model(train), jnp.asarray(X)
    # Flax has no vjp in the graph mode of nnx.jit.
    run = by_vjp if transformation == "vjp" else nnx.jit(GRADS[transformation])
    grads, (_, y) = run(model, x)
    want, after, want_grads = eager(train)
    close(y, want)
    close(values(model), after)
    close(flat(grads), want_grads)


@NEWER
def test_promise_6_forward_mode_agrees_with_reverse_mode():
    made = norms(ours, nnx.Rngs(0))
    # Without norms that count steps: the tangent of an integer has another dtype.
    model = nnx.Dict(**{name: made[name] for name in ("BatchNorm", "WeightNorm", "SpectralNorm")})
    modes = dict(graph=False, graph_updates=False)

    def value(model, x):
        return sum(jnp.sum(jnp.sin(norm(x))) for norm in model.values())

    x, dx = jnp.asarray(X), jnp.asarray(DY)
    zeros, same = jax.tree.map(jnp.zeros_like, nnx.clone(model)), nnx.clone(model)
    _, tangent = nnx.jvp(value, (model, x), (zeros, dx), **modes)
    gradient = nnx.grad(value, argnums=1)(same, x)
    # The sum of 96 products on each side.
    close(tangent, np.sum(np.asarray(gradient) * DY), factor=256)
    close(values(model), values(same))


# Ensembles, scanned layers, devices.


class Block(nnx.Module):
    def __init__(self, package, rngs, **options):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.norms = nnx.Dict(**norms(package, rngs, **options))

    def __call__(self, x):
        # BatchNorm runs twice, so a call updates its statistics twice.
        for name in ["BatchNorm", *sorted(self.norms)]:
            x = self.norms[name](self.linear(x)) + x
        return x


def members(package, number=3):
    """The models of an ensemble as a list."""
    return [Block(package, nnx.Rngs(key)) for key in jax.random.split(jax.random.key(0), number)]


def created(package, number=3):
    create = nnx.vmap(lambda key: Block(package, nnx.Rngs(key)))
    return create(jax.random.split(jax.random.key(0), number))


def stack(models):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *map(values, models))


@pytest.mark.parametrize("package", [ours, nnx])
def test_promise_6_ensembles(package):
    """Each member equals a single model. Statistics are stacked along another axis."""
    alone, xs = members(package), np.stack([X, X + 1, 2 * X])
    want = [model(x) for model, x in zip(alone, xs, strict=True)]
    model = created(package)
    last = nnx.All(nnx.BatchStat, nnx.Any(nnx.PathContains("mean"), nnx.PathContains("var")))
    moved = jax.tree.map(jnp.transpose, nnx.state(model, last))
    nnx.update(model, moved)
    axes = nnx.StateAxes({last: 1, ...: 0})
    y = nnx.jit(nnx.vmap(call, in_axes=(axes, 0)))(model, xs)
    # Twelve norms in sequence.
    close(y, np.stack(want), factor=1024)
    nnx.update(model, jax.tree.map(jnp.transpose, nnx.state(model, last)))
    close(values(model), stack(alone), factor=1024)


@pytest.mark.parametrize("package", [ours, nnx])
def test_promise_6_scanned_blocks(package):
    """Parameters and statistics are stacked over layers; with remat and gradients."""
    alone = members(package)

    def by_loop(models, x):
        for model in models:
            x = model(x)
        return jnp.sum(jnp.sin(x)), x

    def scanned(model, x):
        x = nnx.scan(nnx.remat(call), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(model, x)
        return jnp.sum(jnp.sin(x)), x

    x, model = jnp.asarray(X), created(package)
    want_grads, (_, want) = by_gradient(by_loop, nnx.List(alone), x)
    grads, (_, y) = nnx.jit(partial(by_gradient, scanned))(model, x)
    close(y, want, factor=4096)
    close(values(model), stack(alone), factor=4096)
    each = [flat(want_grads[i]) for i in range(3)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *each)
    # Gradients through 36 norms.
    close(flat(grads), stacked, factor=2**14)


def by_gradient(function, model, x):
    return nnx.value_and_grad(function, has_aux=True)(model, x)[::-1]


def shared(transformation, model):
    """A call on the whole batch, split over four devices."""
    copies, split = nnx.StateAxes({...: None}), jnp.reshape
    if transformation == "shard_map":
        state = nnx.StateSharding({...: P()})
        specs = dict(in_specs=(state, P("d")), out_specs=P("d"))
        return nnx.shard_map(call, mesh=mesh(), **specs)
    mapped = (nnx.pmap if transformation == "pmap" else nnx.vmap)(
        call, in_axes=(copies, 0), axis_name="d"
    )

    def run(model, x):
        y = mapped(model, split(x, (4, 2, *x.shape[1:])))
        return jax.tree.map(lambda leaf: leaf.reshape(x.shape), y)

    return run


@pytest.mark.parametrize("transformation", marked(["vmap", "pmap", "shard_map"], "pmap"))
def test_promise_3_sharing_equals_the_whole_batch(transformation):
    def make(**options):
        made = norms(ours, nnx.Rngs(0), **options)
        return BatchNorms({name: made[name] for name in BATCH})

    def loss(run, model, x):
        y = run(model, x)
        return sum(jnp.sum(leaf * DY) for leaf in y.values()), y

    x, whole, model = jnp.asarray(X), make(), make(axis_name="d")
    want = by_gradient(partial(loss, call), whole, x)
    # Only the call binds the axis name.
    got = by_gradient(partial(loss, shared(transformation, model)), model, x)
    close(got[1], want[1])
    close(values(model), values(whole))
    close(flat(got[0]), flat(want[0]))


class BatchNorms(nnx.Module):
    def __init__(self, norms):
        self.norms = nnx.Dict(**norms)

    def __call__(self, x):
        return {name: norm(x) for name, norm in self.norms.items()}


def test_promise_6_one_norm_at_two_places():
    """Weights and statistics stay shared, also in a compiled program."""

    class Tied(nnx.Module):
        def __init__(self, norm):
            self.first = self.second = norm
            self.bare = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
            self.normed = ours.WeightNorm(self.bare, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.second(2 * self.bare(self.normed(self.first(x))))

    models = [Tied(package.BatchNorm(4, momentum=0.9, rngs=nnx.Rngs(0))) for package in (ours, nnx)]
    y, want = nnx.jit(call)(models[0], X), models[1](X)
    close(y, want)
    close(values(models[0]), values(models[1]))
    assert models[0].first is models[0].second
    assert models[0].normed.layer_instance is models[0].bare


# The number of compilations.


def traced(count):
    @nnx.jit
    def step(model, x):
        count.append(type(model))
        return model(x)

    return step


def test_promise_6_a_program_is_compiled_once_for_each_mode():
    count = []
    step = traced(count)
    for _ in range(2):
        model = AllNorms(ours)
        for mode in (model.train, model.eval) * 2:
            mode()
            step(model, X)
            step(model, X)
    # The second model, which has new initializers, is not compiled again.
    assert len(count) == 2


LISTS = [
    (ours.BatchNorm, dict(axis=[0, 2])),
    (ours.BatchNorm, dict(axis=np.array([0, 2]))),
    (ours.BatchNorm, dict(axis_name=["a", "b"], use_running_average=True)),
    (ours.LayerNorm, dict(reduction_axes=[1, 2], feature_axes=[0, 2])),
    (ours.LayerNorm, dict(reduction_axes={1, 2}, feature_axes={0, 2})),
    (ours.GroupNorm, dict(num_groups=2, reduction_axes=[1, 2])),
    (ours.FilterResponseNorm, dict(feature_axes=[2])),
    (ours.DynamicTanh, dict(feature_axes=[0, 2])),
]


@pytest.mark.parametrize(("norm", "options"), LISTS)
def test_promise_6_axes_may_be_lists(norm, options):
    """A graph definition must be hashable, for a static argument of jax.jit or a key of a dict."""
    features = np.prod([X.shape[i] for i in options.get("axis", options.get("feature_axes", [2]))])
    model, same = (norm(int(features), **options, rngs=nnx.Rngs(0)) for _ in range(2))
    assert hash(nnx.graphdef(model)) == hash(nnx.graphdef(same))
    close(by_static_graphdef(model, jnp.asarray(X)), same(X))


@NEWER
@pytest.mark.parametrize("groups", [[[0, 1], [2, 3]], np.arange(4).reshape(2, 2)], ids=type)
def test_promise_3_groups_may_be_lists(groups):
    def create(key, **options):
        return norms(ours, nnx.Rngs(key), **options)["BatchNorm"]

    key = jax.random.key(0)
    made = partial(create, axis_name="d", axis_index_groups=groups)
    model = nnx.vmap(made)(jnp.stack([key] * 4))
    assert model.axis_index_groups == ((0, 1), (2, 3))
    y = nnx.pmap(call, axis_name="d")(model, X.reshape(4, 2, 3, 4))
    for half, got in zip(np.split(X, 2), np.split(np.asarray(y), 2), strict=True):
        close(got.reshape(half.shape), create(key)(half))


def test_feature_axes_of_a_wrapper_may_be_lists():
    for wrapper in (ours.WeightNorm, ours.WeightStandardized):
        model, same = (
            wrapper(nnx.Linear(4, 4, rngs=rngs), feature_axes=[0, 1], rngs=rngs)
            for rngs in (nnx.Rngs(0), nnx.Rngs(0))
        )
        close(by_static_graphdef(model, X), same(X))


# Shapes, tables and views.


def test_promise_6_eval_shape():
    model = nnx.eval_shape(lambda: AllNorms(ours))
    made = trained_model(True)
    want = jax.tree.map(jax.typeof, nnx.state(made))
    assert jax.tree.map(lambda leaf: leaf.shape, nnx.state(model)) == jax.tree.map(
        lambda leaf: leaf.shape, want
    )
    before = values(made)
    shapes = nnx.eval_shape(call, made, jnp.asarray(X))
    assert {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(shapes)} == {(X.shape, X.dtype)}
    jax.tree.map(np.testing.assert_array_equal, values(made), before)


def test_models_are_displayed(capsys):
    model = trained_model(True)
    table = nnx.tabulate(model, X, console_kwargs={"width": 300})
    nnx.display(model)
    for text in (table, repr(model), capsys.readouterr().out):
        assert all(type(getattr(model, name)).__name__ in text for name in model.names)


@NEWER
def test_a_view_shares_variables_and_documents_its_arguments():
    model = trained_model(True)
    view, before = nnx.view(model, use_running_average=True), values(model)
    close(view(X), eager(False)[0])
    jax.tree.map(np.testing.assert_array_equal, values(model), before)
    assert view.BatchNorm.mean is model.BatchNorm.mean
    info, of_flax = nnx.view_info(model), nnx.view_info(trained_model(True, nnx)).splitlines()
    for name in (*BATCH, "SpectralNorm"):
        assert f"{name}:\n  use_running_average: bool | None = None\n    if True, the" in info
    assert of_flax[1] in info
    assert "  accumulate: bool | None = None\n    if True, training keeps moments" in info


# Bridges between frameworks, optimizers, checkpoints and export.


def of_linen(variables):
    return {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(variables)}


@pytest.mark.parametrize("name", ["BatchNorm", "LayerNorm", "WeightNorm", "SpectralNorm"])
def test_a_module_within_linen(name):
    """nnx.bridge.to_linen, within a model of linen, under jax.jit and jax.grad."""

    class Inner(nnx.Module):
        def __init__(self, rngs):
            self.norm = norms(ours, rngs)[name]

        def __call__(self, x):
            return self.norm(x)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nnx.bridge.to_linen(Inner, name="of")(x)

    variables = Net().init(jax.random.key(0), X)
    y, moved = jax.jit(partial(Net().apply, mutable=["batch_stats"]))(variables, X)
    alone = Inner(nnx.Rngs(0))
    params = nnx.state(alone, nnx.Param)
    nnx.replace_by_pure_dict(params, variables["params"]["of"])
    nnx.update(alone, params)
    if name == "SpectralNorm":
        # The initial vector of the iteration is random.
        stats = nnx.state(alone, nnx.BatchStat)
        nnx.replace_by_pure_dict(stats, variables["batch_stats"]["of"])
        nnx.update(alone, stats)
    close(y, alone(X))
    stats = nnx.to_pure_dict(nnx.state(alone, nnx.BatchStat))
    close(moved.get("batch_stats", {}).get("of", {}), stats)


def test_linen_and_nnx_share_the_names_of_collections():
    """Also for moments: normjax.nnx continues with the moments of normjax.linen."""
    x = X.reshape(-1, 4)
    bridge = nnx.bridge.to_linen(ours.BatchNorm, 4, accumulate=True, momentum=0.9)
    module = normjax.linen.BatchNorm(momentum=0.9)
    moments = ["batch_moments"]
    variables = module.init(jax.random.key(0), x, train=True)
    _, kept = module.apply(variables, x, train=True, mutable=moments)
    bridged = bridge.init(jax.random.key(0), x)
    _, kept_bridged = bridge.apply(bridged, x, mutable=moments)
    close(of_linen(kept_bridged), of_linen(kept))
    _, twice = bridge.apply({**variables, **kept}, x, mutable=moments)
    assert np.all(twice["batch_moments"]["moments"].count == 48)


@pytest.mark.parametrize("name", ["BatchNorm", "LayerNorm", "GroupNorm", "SpectralNorm"])
def test_a_module_of_linen_within_nnx(name):
    made = {
        "BatchNorm": lambda package: package.BatchNorm(use_running_average=False, momentum=0.9),
        "LayerNorm": lambda package: package.LayerNorm(),
        "GroupNorm": lambda package: package.GroupNorm(2),
        "SpectralNorm": lambda package: package.SpectralNorm(nn.Dense(4)),
    }[name]
    options = dict(update_stats=True) if name == "SpectralNorm" else {}
    found = []
    for package in (normjax.linen, nn):
        model = nnx.bridge.ToNNX(made(package), rngs=nnx.Rngs(0))
        nnx.bridge.lazy_init(model, X, **options)

        def step(model, x):
            y = model(x, mutable=["batch_stats"], **options)
            return y if isinstance(y, jax.Array) else y[0]

        grads = nnx.jit(nnx.grad(lambda m, x: jnp.sum(jnp.sin(step(m, x)))))(model, X)
        found.append((flat(grads), values(model, nnx.Param)))
    close(*found, factor=256)


@pytest.mark.usefixtures("lenient")
def test_weight_decay_is_for_kernels():
    optax = pytest.importorskip("optax", reason="Optax is not installed")
    model = created(ours, 1)
    rule = optax.adamw(1e-3, weight_decay=100.0, mask=surgery.decay_mask)
    optimizer = nnx.Optimizer(model, rule, wrt=nnx.Param)
    before = values(model)
    zeros = jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param))
    nnx.jit(lambda model, optimizer, grads: optimizer.update(model, grads))(model, optimizer, zeros)
    for path, value in values(model).items():
        if "gains" not in path:
            # The scale of a normalized weight is named by the path of that weight.
            decays = "batch_stats" not in path and "kernel" in str(path[-1])
            want = jax.tree.map(lambda v, by=0.9 if decays else 1.0: v * by, before[path])
            jax.tree.map(partial(np.testing.assert_allclose, rtol=4 * EPS), value, want)


@pytest.mark.usefixtures("lenient")
@pytest.mark.filterwarnings("ignore")
def test_orbax_restores_a_model(tmp_path):
    """Into an abstract model, including moments and the vectors of spectral norm."""
    ocp = pytest.importorskip("orbax.checkpoint", reason="Orbax is not installed")
    model = trained_model(True)
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: AllNorms(ours)))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "kept", nnx.state(model))
        checkpointer.wait_until_finished()
        restored = nnx.merge(graphdef, checkpointer.restore(tmp_path / "kept", shapes))
    jax.tree.map(np.testing.assert_array_equal, values(restored), values(model))
    close(restored(X), model(X))


@pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="older JAX loses symbolic sizes in nested functions"
)
def test_promise_6_a_served_model_is_exported():
    """For any batch size and several platforms; variables are constants of the program."""
    model = trained_model(False)
    x = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 3, 4"), jnp.float32)
    program = jax.export.export(jax.jit(lambda x: model(x)), platforms=("cpu", "cuda", "tpu"))(x)
    served = jax.export.deserialize(program.serialize()).call
    close(served(X), eager(False)[0])
    close(served(X[:2]), model(X[:2]))


# Sharded parameters.


@NEWER
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_parameters_are_sharded_by_their_metadata(kind):
    grid = mesh((2, 2), ("batch", "model"), kind)
    annotated = nnx.with_partitioning(nnx.initializers.ones, ("model",))
    options = dict(scale_init=annotated, bias_metadata={"out_sharding": ("model",)})
    with entered(grid):
        x = jax.device_put(X, NamedSharding(grid, P("batch", None, "model")))
        found = []
        for package in (ours, nnx):
            make = partial(package.BatchNorm, 4, momentum=0.9, **options)
            model = nnx.jit(lambda make=make: make(rngs=nnx.Rngs(0)))()
            specs = nnx.get_partition_spec(nnx.state(model))
            assert [specs[name].get_value() for name in ("scale", "bias")] == [P("model")] * 2
            for name in ("scale", "bias"):
                assert getattr(model, name).get_value().sharding.spec == P("model")
            y = nnx.jit(call)(model, x)
            found.append((y, values(model)))
            assert y.sharding.spec == P("batch", None, "model")
        close(*found)
        if kind == AxisType.Auto:
            # The eager call of Flax's norm.
            close(make(rngs=nnx.Rngs(0))(x), found[0][0])
    alone = ours.BatchNorm(4, momentum=0.9, rngs=nnx.Rngs(0))
    close(found[0], (alone(X), values(alone)))


@NEWER
def test_metadata_of_initializers_and_of_fields():
    """Both name an axis that nnx.vmap adds."""
    meta = dict(eager_sharding=False)

    @partial(nnx.vmap, transform_metadata={nnx.PARTITION_NAME: "layers"})
    def create(key):
        bias = nnx.with_metadata(nnx.initializers.zeros, out_sharding=("model",), **meta)
        scale = dict(out_sharding=("model",), learned="fast", **meta)
        return ours.LayerNorm(4, bias_init=bias, scale_metadata=scale, rngs=nnx.Rngs(key))

    model = create(jax.random.split(jax.random.key(0), 3))
    for param in (model.scale, model.bias):
        assert param.get_metadata("out_sharding") == ("layers", "model")
    assert model.scale.get_metadata("learned") == "fast"
    assert model.scale.shape == (3, 4)


# Moments over micro-batches.


def test_accumulation_under_jit():
    """One program for each mode, and one because the first call creates a variable."""
    count, model = [], ours.BatchNorm(4, momentum=0.9, rngs=nnx.Rngs(0))
    step = traced(count)
    for _ in range(2):
        model.set_attributes(accumulate=True)
        for piece in X[:7]:
            step(model, piece)
        model.set_attributes(accumulate=False)
        step(model, X[7])
    assert len(count) == 3
    want = ours.BatchNorm(4, momentum=0.9, rngs=nnx.Rngs(0))
    for _ in range(2):
        want(X)
    close(values(model, nnx.BatchStat), values(want, nnx.BatchStat))
    assert not any(map(np.any, model.moments.get_value()))


@NEWER
@pytest.mark.parametrize("tree", [False, True], ids=["graph", "tree"])
def test_accumulation_in_a_scan(tree):
    model = ours.BatchNorm(4, momentum=0.9, rngs=nnx.Rngs(0))
    ours.empty_batch_moments(model)
    model.set_attributes(accumulate=True)
    with nnx.set_graph_mode(not tree), nnx.set_graph_updates(not tree):
        step = nnx.scan(lambda m, x: (m, m(x)), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
        step(model, X)
        nnx.jit(ours.move_batch_stats)(model)
    want = nnx.BatchNorm(4, momentum=0.9, rngs=nnx.Rngs(0))
    want(X)
    close(values(model, nnx.BatchStat), values(want, nnx.BatchStat))


# Wrappers of layers.


def test_gradients_of_weight_norm_are_those_of_the_function():
    model = ours.WeightNorm(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))

    def plain(kernel, scale, bias):
        return jnp.sum(jnp.sin(jnp.dot(X, normjax.weight_norm(kernel, scale)) + bias[None, None]))

    inner = model.layer_instance
    arrays = inner.kernel[...], model.scales["kernel",][...], inner.bias[...]
    want = jax.grad(plain, (0, 1, 2))(*arrays)
    grads = nnx.jit(nnx.grad(lambda m, x: jnp.sum(jnp.sin(m(x)))))(model, X)
    got = grads["layer_instance"]["kernel"], grads["scales"]["kernel",]
    close([leaf.get_value() for leaf in (*got, grads["layer_instance"]["bias"])], [*want])


def test_wrappers_within_wrappers():
    def make():
        rngs = nnx.Rngs(0)
        inner = ours.SpectralNorm(nnx.Linear(4, 4, rngs=rngs), rngs=rngs)
        return nnx.Sequential(ours.WeightNorm(inner, rngs=rngs), nnx.BatchNorm(4, rngs=rngs))

    models = make(), make()
    got = nnx.jit(partial(by_gradient, loss))(models[0], X)
    want = by_gradient(loss, models[1], jnp.asarray(X))
    close(got[1][1], want[1][1])
    close(flat(got[0]), flat(want[0]), factor=256)
    close(*map(values, models))
    assert np.any(values(models[0])["layers", 0, "layer_instance", "batch_stats", ("kernel", "u")])


@pytest.mark.parametrize("update", [True, False])
def test_spectral_norm_updates_under_jit_if_requested(update):
    models = [AllNorms(ours).SpectralNorm for _ in range(2)]
    before = values(models[0], nnx.BatchStat)
    step = nnx.jit(lambda model, x: model(x, update_stats=update))
    for _ in range(2):
        close(step(models[0], X), models[1](X, update_stats=update))
    close(*map(values, models))
    changed = [
        not np.array_equal(v, before[k]) for k, v in values(models[0], nnx.BatchStat).items()
    ]
    assert changed == [update, update]


@pytest.mark.parametrize("name", ["WeightNorm", "WeightStandardized", "SpectralNorm"])
def test_wrappers_work_in_a_closure(name):
    """Flax's own raise an error, since they write to the layer. Ours do not change it."""
    model = getattr(trained_model(False), name)
    before, want = values(model), model(X)

    def evaluated(x):
        return jnp.sum(jnp.sin(model(x)))

    close(jax.jit(lambda x: model(x))(X), want)
    grads = [f(evaluated)(jnp.asarray(X)) for f in (jax.grad, lambda f: jax.jit(jax.grad(f)))]
    close(*grads)
    close(jax.vmap(lambda x: model(x))(X), want)
    jax.tree.map(np.testing.assert_array_equal, values(model), before)


@pytest.mark.parametrize("name", [*BATCH, "SpectralNorm"])
def test_training_a_model_in_a_closure_is_an_error(name):
    """As in Flax: its statistics would be tracers of a trace that has ended."""
    model = getattr(trained_model(True), name)
    before = values(model)
    with pytest.raises(TraceContextError, match="Cannot mutate BatchStat"):
        jax.jit(lambda x: model(x))(X)
    jax.tree.map(np.testing.assert_array_equal, values(model), before)


@pytest.mark.parametrize("run", [call, nnx.jit(call)], ids=["eager", "jit"])
def test_weights_are_restored_if_the_layer_raises(run):
    model = ours.WeightNorm(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    before = model.layer_instance.kernel.get_raw_value()
    with pytest.raises(TypeError, match="dot_general"):
        run(model, X[..., :3])
    assert model.layer_instance.kernel.get_raw_value() is before


class Halved(nnx.Param):
    """A variable that stores half of its value."""

    def get_value(self, **options):
        return 2 * super().get_value(**options)

    def set_value(self, value, **options):
        super().set_value(value / 2, **options)


@pytest.mark.parametrize("kind", [Halved, partial(nnx.Param, ref=True)], ids=["stored", "ref"])
def test_a_weight_may_be_stored_in_another_form(kind):
    inner = nnx.Linear(4, 3, use_bias=False, rngs=nnx.Rngs(0))
    inner.kernel = kind(inner.kernel[...])
    raw, w = inner.kernel.get_raw_value(), np.asarray(inner.kernel[...], np.float64)
    before = np.asarray(raw[...])
    model = ours.WeightNorm(inner, rngs=nnx.Rngs(0))
    want = (X @ (w / np.sqrt(np.sum(w**2, 0)))).astype(np.float32)
    for run in (call, nnx.jit(call), lambda model, x: jax.jit(lambda x: model(x))(x)):
        close(run(model, X), want)
        np.testing.assert_array_equal(inner.kernel.get_raw_value()[...], before)


# Hijax variables.


@NEWER
@pytest.mark.parametrize("name", AllNorms(ours).names)
def test_hijax_variables(name):
    """jax.jit on modules, whose variables change in place; most of Flax's norms raise an error."""
    want = getattr(AllNorms(ours), name)
    with nnx.var_defaults(hijax=True):
        model = getattr(AllNorms(ours), name)
        y = jax.jit(call)(model, X)
    close(y, want(X))
    close(values(model), values(want))
