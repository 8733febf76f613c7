"""Lowering: one traced program, and the form of each platform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import normjax
from normjax._core.lowering import PLATFORMS, VARIABLE, by_platform

X = jnp.asarray(np.random.default_rng(3).normal(2, 3, (4, 16, 16, 8)), jnp.float32)


@pytest.fixture
def lower_as(monkeypatch):
    """Lowers for a platform from here on."""

    def choose(platform):
        monkeypatch.setenv(VARIABLE, platform)
        jax.clear_caches()

    yield choose
    jax.clear_caches()


def named(platform, x):
    """A function whose result says for which platform it was lowered."""
    return [x + PLATFORMS.index(platform)]


def lowered(x):
    return by_platform(named, x)[0]


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_variable_says_for_which_platform(lower_as, platform):
    lower_as(platform)
    number = PLATFORMS.index(platform)
    assert jax.jit(lowered)(1.0) == lowered(1.0) == 1 + number
    np.testing.assert_array_equal(jax.vmap(lowered)(jnp.arange(3.0)), jnp.arange(3.0) + number)
    with jax.disable_jit():
        assert lowered(1.0) == 1 + number


def test_without_the_variable_each_platform_has_its_own_form(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    jax.clear_caches()
    for platform in ("cpu", "cuda", "rocm", "tpu"):
        text = export.export(jax.jit(lowered), platforms=[platform])(jnp.float32(0)).mlir_module()
        number = PLATFORMS.index(platform if platform in PLATFORMS else "gpu")
        assert f"dense<{float(number):e}>".replace("e+00", "") in text.replace("e+00", "")


@pytest.mark.parametrize("value", ["cuda", "TPU", "1"])
def test_another_value_is_an_error_that_lists_the_three(lower_as, value):
    lower_as(value)
    with pytest.raises(ValueError, match=f"{VARIABLE} is '{value}', expected one of cpu, gpu, tpu"):
        jax.jit(normjax.layer_norm)(X)


NORMS = {
    "batch": lambda x: normjax.batch_norm(x, normjax.BatchStats.make(8), train=True)[0],
    "instance": normjax.instance_norm,
    "group": lambda x: normjax.group_norm(x, num_groups=4),
}


@pytest.mark.parametrize("norm", NORMS)
def test_the_three_forms_are_three_programs_with_one_result(lower_as, norm):
    results, texts = [], set()
    for platform in PLATFORMS:
        lower_as(platform)
        program = jax.jit(NORMS[norm]).lower(X)
        texts.add(program.as_text())
        results.append(program.compile()(X))
    assert len(texts) == len(PLATFORMS)
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], rtol=1e-5, atol=1e-5)


def test_one_export_serves_all_platforms():
    exported = export.export(jax.jit(NORMS["batch"]), platforms=["cpu", "cuda", "tpu"])(X)
    np.testing.assert_allclose(exported.call(X), NORMS["batch"](X), rtol=1e-6, atol=1e-6)


def test_the_second_pass_is_a_conditional(lower_as):
    """Not a select, which would always run the second pass."""
    lower_as("tpu")
    text = jax.jit(NORMS["batch"]).lower(X).as_text()
    assert "stablehlo.case" in text or "stablehlo.if" in text
    lower_as("cpu")
    assert "stablehlo.case" not in jax.jit(NORMS["batch"]).lower(X).as_text()
