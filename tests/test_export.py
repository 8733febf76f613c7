"""Promise 6: jax.export, for several platforms and any batch at once.

All norms are one program, since compiling takes most of the time. Results are compared with those
of the exported call, which other tests compare with the oracle.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import normjax
from normjax import BatchStats, Moments, SpectralStats
from tests.descriptors import NORMS, Norm
from tests.functions import FUNCTIONS, arrays

PLATFORMS = ("cpu", "cuda", "tpu")
close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4)
quickly = partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)


newer = pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="it loses symbolic sizes in nested functions"
)


def exported(function, *arguments):
    """Exports for any size of the axes named by letters; serializes and deserializes.

    An argument is the shape of a float32 array as text, or a tree of arrays of fixed shapes.
    """
    scope = export.SymbolicScope()

    def abstract(leaf):
        if not isinstance(leaf, str):
            return jax.typeof(leaf)
        return jax.ShapeDtypeStruct(export.symbolic_shape(leaf, scope=scope), jnp.float32)

    specs = jax.tree.map(abstract, arguments)
    written = export.export(jax.jit(function), platforms=PLATFORMS)(*specs).serialize()
    return export.deserialize(written).call


def every(calls, given):
    """The output of every norm and its gradients."""
    found = {}
    for name, call in calls.items():

        def loss(moving, call=call):
            y = call(moving)
            return jnp.sum(jnp.sin(y)), y

        try:
            found[name] = jax.grad(loss, has_aux=True)(given[name])
        except Exception as fault:
            fault.add_note(f"in {name}")
            raise
    return found


def norms(x, chance):
    """Each norm of the table, with a mask."""
    mask = chance < 0.7
    calls = {name: partial(norm.call, mask=mask) for name, norm in NORMS.items()}
    return every(calls, dict.fromkeys(calls, x))


@newer
def test_promise_6_every_norm_exports_for_any_batch_and_every_platform(rng):
    """Forward and backward, functions and modules; 2b examples, for virtual batches of two."""
    assert Norm.shape[1:] == (4, 3)
    served = exported(norms, "2*b, 4, 3", "2*b, 4, 1")
    x = rng.normal(1, 2, (4, 4, 3)).astype(np.float32)
    chance = rng.random((4, 4, 1)).astype(np.float32)
    got = quickly(served)(x, chance)
    jax.tree.map(close, got, quickly(norms)(x, chance))
    # Two more examples that are masked change no other output.
    more = quickly(served)(*(np.concatenate([v, np.ones_like(v[:2])]) for v in (x, chance)))
    for name in NORMS:
        close(more[name][1][:4], got[name][1], err_msg=name)


@newer
def test_promise_6_every_function_exports_with_gradients_by_all_arrays(rng):
    """Also for any spatial size, and functions without a mask."""
    calls = {name: lambda named, name=name: FUNCTIONS[name](**named) for name in FUNCTIONS}
    ranks = {0: "", 1: "8", 3: "2*b, h, 8"}
    given = {name: arrays(name, rng, (4, 5, 8)) for name in FUNCTIONS}
    shapes = jax.tree.map(lambda v: ranks[np.ndim(v)], given)
    served = exported(partial(every, calls), shapes)
    jax.tree.map(close, quickly(served)(given), quickly(partial(every, calls))(given))


def test_states_are_written_and_read_by_name(rng):
    """A step that takes and returns states is exported without registering their types."""

    def step(x, stats, spectral, moments):
        y, stats = normjax.batch_norm(x, stats, train=True, momentum=None)
        w, spectral = normjax.spectral_norm(x, spectral, train=True)
        return y + w, stats, spectral, normjax.merge(moments, normjax.measure(x, 0))

    states = BatchStats.make(3, counted=True), SpectralStats(jnp.ones((1, 3)), jnp.ones(()))
    states = *states, Moments.make(3)
    served = exported(step, "b, 3", *states)
    x = rng.normal(size=(5, 3)).astype(np.float32)
    got, want = served(x, *states), step(x, *states)
    assert [type(state) for state in got[1:]] == [BatchStats, SpectralStats, Moments]
    jax.tree.map(close, got, want)


@pytest.mark.parametrize(
    ("call", "shapes", "message"),
    [
        (normjax.layer_norm, ("b, h, c", "h"), r"scale has shape \(h,\), expected \(c,\)"),
        (
            partial(normjax.layer_norm, axis=(1, 2)),
            ("b, h, c", "c, h"),
            r"scale has shape \(c, h\), expected \(h, c\).* Several feature axes keep the order",
        ),
        (
            partial(normjax.group_norm, num_groups=4),
            ("b, c",),
            r"Number of groups \(4\) does not divide the number of channels \(c\)",
        ),
        (
            lambda x, y: normjax.merge(normjax.measure(x, 0), normjax.measure(y, 0)),
            ("b, c", "b, d"),
            r"moments of the shapes \[\(c,\), \(d,\)\]",
        ),
        (
            lambda x: normjax.batch_norm(x, None, train=True, virtual_batch_size=2),
            ("b, c",),
            r"virtual_batch_size=2 for x with shape \(b, c\)",
        ),
    ],
)
def test_promise_9_errors_of_symbolic_shapes(call, shapes, message):
    with pytest.raises(ValueError, match=message):
        exported(call, *shapes)


def test_groups_of_a_symbolic_number_of_features(rng):
    x = rng.normal(size=(2, 5, 8)).astype(np.float32)
    for options in (dict(num_groups=4), dict(group_size=4)):
        call = partial(normjax.group_norm, **options)
        close(exported(call, "b, h, 4*c")(x), call(x))
