"""Strict settings: no silent promotion, warnings are errors (pyproject.toml), eight CPU devices.

tests/compiling.py sets fast compilation and a cache of compiled programs.
"""

import contextlib
import gc

import jax
import numpy as np
import pytest

from tests import compiling

DEVICES = 8

compiling.prune()
compiling.set_up()
for name, value in compiling.CACHE.items():
    # JAX reads the environment only at import, and a pytest plugin may have imported it already.
    jax.config.update(name, value)

jax.config.update("jax_num_cpu_devices", DEVICES)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_finish():
    """Garbage collection skips all objects that exist after import, which makes it faster."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture
def x64():
    """float64 for the test that asks for it."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture
def lenient():
    """JAX's default promotion, which other libraries rely on."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.numpy_dtype_promotion("standard"))
        stack.enter_context(jax.numpy_rank_promotion("allow"))
        yield


@pytest.fixture
def saved_arrays():
    """Shapes and dtypes of the residuals of `function` in reverse mode."""

    def saved(function, *args):
        # jax.ad_checkpoint prints this list and has no public way of returning it.
        from jax._src.ad_checkpoint import saved_residuals

        avals = [aval for aval, _ in saved_residuals(function, *args)]
        return [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals]

    return saved
