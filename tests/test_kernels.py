"""The kernels of normjax-cpu: when they are called, and how accurate they are."""

import platform
import re
import sys
import types
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import normjax
from normjax import __main__ as report
from normjax._core.lowering import VARIABLE
from normjax._core.platforms import kernels
from tests import reference
from tests.reference import EPS
from tests.transformations import mesh

needs_kernels = pytest.mark.skipif(kernels.plugin() is None, reason="normjax-cpu is not installed")

# Sizes below, at and above those of vectors, parts of rows, long rows and blocks in the kernels.
ROWS = [
    (1, 16), (3, 17), (5, 24), (13, 31), (4, 33), (2, 1025), (67, 96), (9, 2049), (1, 5003),
]  # fmt: skip
COLUMNS = [
    (1, 2, 1), (1, 97, 3), (2, 101, 8), (3, 13, 32), (1, 700, 64), (5, 9, 97), (1, 67, 257),
    (2, 3, 1030), (1, 40000, 1), (4, 5, 2050),
]  # fmt: skip
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64)


@pytest.fixture(autouse=True)
def chosen_by_default(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


def norm_of_rows(x, scale, bias, centered=True):
    if centered:
        return normjax.layer_norm(x, scale, bias, epsilon=1e-5)
    return normjax.rms_norm(x, scale, epsilon=1e-5)


def batch_norm(x, scale, bias):
    stats = normjax.BatchStats.make(x.shape[-1])
    return normjax.batch_norm(x, stats, scale, bias, train=True)[0]


def step(function, x, scale, bias, dy):
    y, pullback = jax.vjp(function, x, scale, bias)
    return y, *pullback(dy)


def accumulation_dtype(dtype):
    """The dtype in which a norm of this dtype is computed."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def given(rng, shape, dtype, offset=3.0):
    x, dy = (jnp.asarray(rng.normal(m, 2, shape), dtype) for m in (offset, 0))
    vector_dtype = accumulation_dtype(dtype)
    scale, bias = (jnp.asarray(rng.normal(m, 1, shape[-1]), vector_dtype) for m in (1, 0))
    return x, scale, bias, dy


def check(function, arguments, axes, centered=True):
    """y, dx, dscale and dbias against the oracle."""
    assert "normjax_" in jax.jit(partial(step, function)).lower(*arguments).as_text()
    x, scale, bias, dy = arguments
    got = [np.asarray(v, np.float64) for v in jax.jit(partial(step, function))(*arguments)]
    bias = bias if centered else 0 * bias
    want = reference.standardized(x, scale, bias, dy, axes=axes, centered=centered)
    accumulation_eps = EPS[np.dtype(accumulation_dtype(x.dtype)).name]
    eps = EPS[x.dtype.name]
    # One rounding of the result, and 16 roundings in the accumulation dtype.
    deviation = np.sqrt(want.var + 1e-5)
    loss = 16 * accumulation_eps * (1 + np.abs(want.mean) / deviation)
    magnitude = np.abs(want.y) + np.abs(np.asarray(bias, np.float64)) + np.abs(scale)
    assert np.all(np.abs(got[0] - want.y) <= eps * np.abs(want.y) + loss * magnitude)
    size = np.max(np.abs(np.asarray(dy, np.float64)) * np.abs(scale), axes, keepdims=True)
    bound = eps * np.abs(want.dx) + 4 * loss * size / deviation
    assert np.all(np.abs(got[1] - want.dx) <= bound)
    # Rounding errors of a sum grow with the square root of the number of its terms.
    n = np.sqrt(x.size // x.shape[-1])
    sums = (want.dscale, want.dbias) if centered else (want.dscale,)
    for value, exact in zip(got[2:], sums, strict=False):
        terms = n * np.max(np.abs(np.asarray(dy, np.float64))) * 4
        assert np.all(np.abs(value - exact) <= 4 * np.max(loss) * terms)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("shape", ROWS)
def test_rows(shape, centered, dtype, rng, x64):
    function = partial(norm_of_rows, centered=centered)
    check(function, given(rng, shape, dtype), axes=(1,), centered=centered)


@needs_kernels
def test_lanes_that_a_vector_skips_add_nothing_to_a_gradient():
    """The last vector of 33 entries overlaps the one before, where mean / deviation overflows."""
    x = jnp.full((3, 33), 1e37, jnp.float32)
    vector = jnp.ones(33)
    _, _, dscale, _ = jax.jit(partial(step, norm_of_rows))(x, vector, vector, jnp.ones_like(x))
    np.testing.assert_array_equal(dscale, 0)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", COLUMNS)
def test_columns(shape, dtype, rng, x64):
    x, *vectors, dy = given(rng, shape, dtype)
    check(partial(normjax.instance_norm, epsilon=1e-5), (x, *vectors, dy), axes=(1,))
    check(batch_norm, (x, *vectors, dy), axes=(0, 1))


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "groups"), [((2, 9, 12), 4), ((3, 5, 7, 96), 32), ((1, 90, 6), 1)]
)
def test_groups(shape, groups, dtype, rng, x64):
    x, scale, bias, dy = given(rng, shape, dtype)
    split = (*shape[:-1], groups, shape[-1] // groups)

    def function(x, scale, bias):
        y = normjax.group_norm(
            x.reshape(shape), scale.reshape(-1), bias.reshape(-1), num_groups=groups, epsilon=1e-5
        )
        return y.reshape(split)

    arguments = x.reshape(split), scale.reshape(split[-2:]), bias.reshape(split[-2:])
    axes = tuple(a for a in range(1, len(split)) if a != len(split) - 2)
    check(function, (*arguments, dy.reshape(split)), axes=axes)


def called(function, *arguments, **how):
    return "normjax_" in jax.jit(function, **how).lower(*arguments).as_text()


X = jnp.ones((8, 6, 16))
MESH = mesh((4,), ("batch",))


@needs_kernels
@pytest.mark.parametrize(
    "function",
    [
        normjax.layer_norm,
        normjax.rms_norm,
        normjax.instance_norm,
        partial(normjax.group_norm, num_groups=2),
        normjax.l2_normalize,
        partial(normjax.measure, axis=0),
        lambda x: normjax.batch_norm(x, None, train=True)[0],
    ],
)
def test_a_kernel_is_called_in_a_program_of_one_device(function):
    assert called(function, X)


@needs_kernels
def test_a_kernel_is_called_on_each_device_of_shard_map_and_pmap():
    def each(x):
        return jax.grad(lambda x: jnp.sum(normjax.layer_norm(x)))(x)

    for check_vma in (True, False):
        how = dict(mesh=MESH, in_specs=P("batch"), out_specs=P("batch"), check_vma=check_vma)
        shared = jax.shard_map(each, **how)
        assert called(shared, X)
        np.testing.assert_allclose(jax.jit(shared)(X), each(X), atol=1e-6)
    mapped = jax.pmap(each)
    assert "normjax_" in mapped.lower(X).as_text()
    np.testing.assert_allclose(mapped(X), each(X), atol=1e-6)


@needs_kernels
def test_shared_batch_norm_is_measured_by_a_kernel_on_each_device(rng):
    x = jnp.asarray(rng.normal(5, 1, X.shape), jnp.float32)

    def each(x):
        return normjax.batch_norm(x, None, train=True, axis_name="batch")[0]

    shared = jax.shard_map(each, mesh=MESH, in_specs=P("batch"), out_specs=P("batch"))
    assert called(shared, x)
    whole = normjax.batch_norm(x, None, train=True)[0]
    np.testing.assert_allclose(jax.jit(shared)(x), whole, atol=2e-5)


def grad(x):
    return jax.grad(lambda x: jnp.sum(jnp.sin(normjax.layer_norm(x))))(x)


@needs_kernels
def test_no_kernel_is_called_where_xla_partitions():
    """XLA would gather x on every device."""
    sharding = NamedSharding(MESH, P("batch"))
    x = jax.device_put(X, sharding)
    assert not called(grad, x)
    assert jax.jit(grad)(x).sharding.is_equivalent_to(sharding, 3)


@needs_kernels
def test_no_kernel_is_written_into_an_exported_program():
    """The machine that runs it may not have the kernels."""
    exported = export.export(jax.jit(grad))(X)
    assert "normjax_" not in exported.mlir_module()
    np.testing.assert_allclose(exported.call(X), grad(X), atol=1e-6)


@needs_kernels
@pytest.mark.parametrize(
    "function",
    [
        jax.vmap(normjax.layer_norm),
        lambda x: normjax.layer_norm(x[..., :15]),  # shorter than a vector
        lambda x: normjax.layer_norm(x, mask=x > 0),
        lambda x: normjax.layer_norm(x.astype(jnp.complex64)),
        lambda x: normjax.batch_norm(x, None, train=True, feature_axis=1)[0],
        lambda x: normjax.layer_norm(x, dtype=jnp.bfloat16),
        lambda x: normjax.layer_norm(x[:0]),
    ],
)
def test_the_plain_form_runs_where_there_is_no_kernel(function):
    assert not called(function, X)


@needs_kernels
def test_the_environment_variable_selects_the_plain_form(monkeypatch):
    monkeypatch.setenv(VARIABLE, "cpu")
    jax.clear_caches()
    assert not called(grad, X)
    monkeypatch.delenv(VARIABLE)
    jax.clear_caches()
    assert called(grad, X)


@needs_kernels
def test_second_derivatives_and_forward_mode_are_those_of_the_plain_form(rng, monkeypatch):
    x = jnp.asarray(rng.normal(size=(3, 5)), jnp.float32)

    def loss(x):
        return jnp.sum(jnp.sin(normjax.layer_norm(x, jnp.arange(5.0) + 1)))

    found = [transform(loss)(x) for transform in (jax.hessian, jax.jacfwd, jax.jacrev)]
    monkeypatch.setenv(VARIABLE, "cpu")
    jax.clear_caches()
    for transform, value in zip((jax.hessian, jax.jacfwd, jax.jacrev), found, strict=True):
        np.testing.assert_allclose(value, transform(loss)(x), rtol=2e-4, atol=2e-5)
    jax.clear_caches()


@needs_kernels
def test_nothing_of_the_size_of_x_is_allocated():
    x, vector = jnp.ones((64, 128, 256)), jnp.ones(256)
    for function in (norm_of_rows, batch_norm, normjax.instance_norm):
        program = jax.jit(partial(step, function)).lower(x, vector, vector, x).compile()
        assert program.memory_analysis().temp_size_in_bytes < x.nbytes / 8


@needs_kernels
@pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="one library"
)
def test_the_library_for_this_processor_is_loaded():
    cpuinfo = Path("/proc/cpuinfo").read_text()
    flags = re.search(r"^flags\s*: (.*)$", cpuinfo, re.MULTILINE)[1].split()
    levels = {"x86-64-v4": "avx512vl", "x86-64-v3": "avx2"}
    best = next((level for level, flag in levels.items() if flag in flags), "baseline")
    assert best == kernels.plugin().PROCESSOR


@pytest.fixture
def installed(monkeypatch):
    """Replaces the installed normjax-cpu by another one, or by none."""

    def install(**attributes):
        module = types.SimpleNamespace(**attributes) if attributes else None
        monkeypatch.setitem(sys.modules, "normjax_cpu", module)
        kernels.plugin.cache_clear()

    yield install
    monkeypatch.undo()
    kernels.plugin.cache_clear()


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        (dict(INTERFACE=99, XLA_FFI_VERSION=(0, 1)), "has interface 99, expected 1"),
        (
            dict(INTERFACE=kernels.INTERFACE, XLA_FFI_VERSION=(0, 999)),
            r"was built for version 0\.999 of XLA's FFI, and this jaxlib has 0\.",
        ),
        (dict(INTERFACE=kernels.INTERFACE, XLA_FFI_VERSION=(9, 0)), "was built for version 9"),
    ],
)
def test_an_incompatible_library_is_ignored_with_a_warning(installed, attributes, message):
    installed(**attributes)
    with pytest.warns(UserWarning, match=message) as caught:
        assert kernels.plugin() is None
    assert "pip install" in str(caught[0].message)


def test_normjax_runs_without_the_kernels(installed):
    installed()
    assert kernels.plugin() is None
    jax.clear_caches()
    assert not called(normjax.layer_norm, X)
    assert "not loaded; with a C++ compiler: pip install ./native" in "\n".join(report.lines())
    jax.clear_caches()


@needs_kernels
def test_the_report_names_the_loaded_kernels(monkeypatch):
    message = "\n".join(report.lines())
    assert f"normjax {normjax.__version__}" in message
    assert f"jax {jax.__version__}" in message
    assert "cpu: the kernels of normjax-cpu" in message
    assert message.endswith(": loaded")
    monkeypatch.setenv(VARIABLE, "tpu")
    assert f"{VARIABLE}=tpu: every platform computes as tpu does" in "\n".join(report.lines())


@needs_kernels
def test_a_centered_norm_of_sums_has_the_gradient_of_the_plain_form(rng, monkeypatch):
    w, dy = (jnp.asarray(rng.normal(1, 2, (9, 5)), jnp.float32) for _ in range(2))

    def gradient():
        jax.clear_caches()
        scaled = partial(normjax.standardize_weight, feature_axis=0, scaled=True)
        return jax.jit(lambda w: jax.vjp(scaled, w)[1](dy)[0])(w)

    got = gradient()
    monkeypatch.setenv(VARIABLE, "cpu")
    np.testing.assert_allclose(got, gradient(), rtol=1e-5, atol=1e-6)
    jax.clear_caches()
