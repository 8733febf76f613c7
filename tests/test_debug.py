"""jax_debug_nans and jax_debug_infs find no NaN and no infinity for valid input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normjax
from tests.descriptors import NORMS, PLAIN


@pytest.fixture
def strict():
    """Each operation that returns a NaN or an infinity raises."""
    flags = "jax_debug_nans", "jax_debug_infs"
    for flag in flags:
        jax.config.update(flag, True)
    yield
    for flag in flags:
        jax.config.update(flag, False)


# One of each kind, since every operation is compiled anew under the flags.
CASES = {
    name: (NORMS | PLAIN)[name]
    for name in (
        "batch_norm, train",
        "batch_renorm",
        "group_norm",
        "filter_response_norm, threshold",
        "spectral_norm",
        "local_response_norm",
        "dynamic_tanh",
    )
}


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("name", CASES)
def test_intermediate_values_of_finite_input_are_finite(name, rng):
    """Features and examples that are constant, have no valid entry, or have one."""
    norm = CASES[name]
    x = rng.normal(1, 2, norm.shape).astype(np.float32)
    x[..., 1] = x[0] = 0.1
    mask = None if name in PLAIN else np.ones(norm.shape, bool)
    if mask is not None:
        mask[..., 2] = mask[1:3] = False
        mask[2, 2, 0] = True
    jax.value_and_grad(lambda x: jnp.sum(norm.call(x, mask) ** 2))(x)
    if mask is not None:
        mask[3, 2, 2] = True
        norm.call(x, mask)


@pytest.mark.usefixtures("strict")
def test_running_statistics_of_finite_input_are_finite():
    """With momentum=0 the step is 1, and a debiased average takes the logarithm of 1 - step."""
    x, mask = np.ones((4, 3), np.float32), np.array([[True, False, True]] * 4)
    stats = normjax.BatchStats.make(3, counted=True)
    options = dict(momentum=0.0, debias=True)
    for _ in range(2):
        _, stats = normjax.batch_norm(x, stats, train=True, mask=mask, ddof=1, **options)
    np.testing.assert_array_equal(stats.mean, [1, 0, 1])
