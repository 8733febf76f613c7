"""Orbax: variables, folded arrays and exported states survive a checkpoint, to the bit."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normjax.linen
from normjax import surgery

X = np.random.default_rng(0).normal(size=(2, 6, 6, 3)).astype(np.float32)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        norm = normjax.linen.BatchNorm(momentum=None, use_running_average=True)
        return norm(nn.Conv(4, (3, 3), param_dtype=jnp.bfloat16)(x))


@pytest.mark.usefixtures("lenient")
@pytest.mark.filterwarnings("ignore")
def test_round_trip(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint", reason="Orbax is not installed")
    variables = Net().init(jax.random.key(0), X)
    serve, folded, _ = surgery.fold(Net().apply, variables, X)
    state = surgery.export_torch(
        variables, [("Conv_0", "conv", "conv"), ("BatchNorm_0", "bn", "batch_norm")]
    )
    kept = {"variables": variables, "folded": list(folded), "state": state}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "kept", kept)
        checkpointer.wait_until_finished()
        loaded = checkpointer.restore(tmp_path / "kept", jax.tree.map(np.zeros_like, kept))
    for want, got in zip(jax.tree.leaves(kept), jax.tree.leaves(loaded), strict=True):
        assert want.dtype == got.dtype
        assert np.asarray(want).tobytes() == np.asarray(got).tobytes()
    np.testing.assert_array_equal(serve(loaded["folded"], X), serve(folded, X))
