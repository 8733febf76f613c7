"""Promise 3 for NNX: a batch norm that shares over devices equals one call on the whole batch."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from normjax.nnx import BatchNorm
from tests import reference
from tests.reference import EPS
from tests.test_devices import AXES, MOMENTUM, SHAPE, cases, every_transformation
from tests.transformations import SIZES, TRANSFORMATIONS

close = partial(np.testing.assert_allclose, rtol=2e-5, atol=64 * 10 * EPS["float32"])


@pytest.fixture(scope="module")
def parts():
    """A layer as (graph, params, rest); `loss_of` sets the axis name."""
    return nnx.split(BatchNorm(SHAPE[-1], momentum=MOMENTUM, rngs=nnx.Rngs(0)), nnx.Param, ...)


def loss_of(graph, rest):
    """The functional form: a layer is merged, called and split within the loss."""

    def loss(x, params, mask, dy, axis_name):
        layer = nnx.merge(graph, params, rest, copy=True)
        layer.set_attributes(axis_name=axis_name)
        y = layer(x, mask=mask)
        return jnp.sum(dy * y), (y, nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat)))

    return loss


@pytest.mark.parametrize("devices", [SIZES[0], pytest.param(SIZES[1], marks=pytest.mark.slow)])
@every_transformation
def test_promise_3_sharing_equals_one_call_on_the_whole_batch(rng, parts, transformation, devices):
    graph, params, rest = parts
    scale, bias = rng.random((2, SHAPE[-1])).astype(np.float32) + 0.5
    params = nnx.clone(params)
    params["scale"].set_value(jnp.asarray(scale))
    params["bias"].set_value(jnp.asarray(bias))
    dy = rng.normal(size=SHAPE).astype(np.float32)
    run = TRANSFORMATIONS[transformation](loss_of(graph, rest), devices)
    for name, (x, mask) in cases(rng).items():
        y, stats, (dx, dparams) = run(x, params, mask, dy)
        want = reference.batch_norm(x, scale, bias, dy, axes=AXES, mask=mask)
        close(y, want.y, err_msg=name)
        close(dx, want.dx, err_msg=name)
        close(dparams["scale"][...], want.dscale, err_msg=name)
        close(dparams["bias"][...], want.dbias, err_msg=name)
        close(stats["mean"], (1 - MOMENTUM) * want.mean, err_msg=name)
        close(stats["var"], MOMENTUM + (1 - MOMENTUM) * want.var, err_msg=name)
