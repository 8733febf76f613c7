"""A strict world: no silent promotion, warnings are errors (pyproject.toml), eight CPU devices.

Compiled quickly, and once for all runs: tests/compiling.py.
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
    # A plugin of pytest may have imported JAX, which reads the environment but then.
    jax.config.update(name, value)

jax.config.update("jax_num_cpu_devices", DEVICES)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_finish():
    """The collector passes over what is imported by now, which is most of what lives."""
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
    """JAX's default promotion, which other libraries count on."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.numpy_dtype_promotion("standard"))
        stack.enter_context(jax.numpy_rank_promotion("allow"))
        yield


@pytest.fixture
def saved_arrays():
    """What reverse mode keeps of `function` between its two passes, as shapes and dtypes."""

    def saved(function, *args):
        # jax.ad_checkpoint prints this list and has no public way of returning it.
        from jax._src.ad_checkpoint import saved_residuals

        avals = [aval for aval, _ in saved_residuals(function, *args)]
        return [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals]

    return saved
