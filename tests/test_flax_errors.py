"""Where a norm of flax.linen raises, ours raises an error of the same class.

Errors that Flax passes on from JAX or NumPy, for example of axes out of range, are not compared.
Ours are ValueErrors that say what to do.
"""

from functools import partial

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normjax.linen
from tests.strategies import DTYPES, examples
from tests.test_random_flax import KEY, NORMS, Weight, lenient


def train(layer, x, **given):
    """One step in training; only batch norm has a mode."""
    if "use_running_average" in type(layer).__dataclass_fields__ and "mode" not in given:
        given["use_running_average"] = False
    return layer.init_with_output(KEY, x, **{k: v for k, v in given.items() if k != "mode"})


def wrong_parameters(layer, x, **given):
    mode = dict(use_running_average=True) if hasattr(layer, "use_running_average") else {}
    variables = layer.init(KEY, x, **mode)
    longer = {"scale": jnp.ones((*variables["params"]["scale"].shape, 2))}
    return layer.apply({**variables, "params": {**variables["params"], **longer}}, x, **mode)


def immutable(layer, x, **given):
    variables = layer.init(KEY, x, use_running_average=True)
    return layer.apply(variables, x, use_running_average=False)


def spectral(layer, x):
    return layer.init(KEY, x, update_stats=False)


def raised(call):
    with jax.disable_jit():
        try:
            call()
        except Exception as error:
            return error
    return None


FAULTS = {
    "no mode": ("BatchNorm", {}, partial(train, mode=None)),
    "immutable statistics": ("BatchNorm", {}, immutable),
    "parameters of another shape": (None, {}, wrong_parameters),
    "a mask of another shape": (None, {}, partial(train, mask=np.ones((1, 3, 1), bool))),
    "groups twice": ("GroupNorm", dict(num_groups=2, group_size=2), train),
    "no groups": ("GroupNorm", dict(num_groups=None), train),
    "groups that do not divide": ("GroupNorm", dict(num_groups=3), train),
    "groups by default": ("GroupNorm", {}, train),
    "a group size that does not divide": ("GroupNorm", dict(num_groups=None, group_size=3), train),
    "no group": ("GroupNorm", dict(num_groups=0), train),
    "the leading axis": ("InstanceNorm", dict(feature_axes=(0, -1)), train),
    "no matrix": ("SpectralNorm", dict(error_on_non_matrix=True), spectral),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_where_flax_raises_ours_raises_the_same_class(fault):
    @examples(3, tests=len(FAULTS))
    @hypothesis.given(st.data())
    def compare(data):
        only, fields, call = FAULTS[fault]
        name = only or data.draw(st.sampled_from(NORMS[:5]))
        if fault in ("parameters of another shape", "a mask of another shape"):
            fields = dict(num_groups=2) if name == "GroupNorm" else {}
        if name == "SpectralNorm":
            fields = {**fields, "layer_instance": Weight((3, 2, 4), "float32", name="layer")}
        fields = {**fields, "dtype": data.draw(st.sampled_from([None, *DTYPES]))}
        x = jnp.ones((3, 5, 4), data.draw(st.sampled_from(DTYPES)))
        with lenient():
            theirs = raised(lambda: call(getattr(nn, name)(**fields), x))
        ours = raised(lambda: call(getattr(normjax.linen, name)(**fields), x))
        assert theirs is not None
        assert isinstance(ours, type(theirs)), (ours, theirs)

    compare()
