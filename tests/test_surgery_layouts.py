"""Each kind of rule requires arrays of its own rank."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from normjax import surgery


def message(error, function, *args):
    with pytest.raises(error) as caught:
        function(*args)
    return str(caught.value)


# Every size is 4, so that a wrong transpose has the right shape.
TORCH_RANKS = {"linear": 2, "conv": 4, "conv_transpose": 4}
KERAS_RANKS = {"dense": 2, "conv": 4, "conv_transpose": 4, "depthwise_conv": 4}


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
def test_a_kernel_of_another_rank_is_an_error_in_every_kind(rank):
    w = np.zeros((4,) * rank)
    variables = {"params": {"a": {"kernel": w}}}
    calls = [
        (TORCH_RANKS, "weight", surgery.import_torch, surgery.export_torch),
        (KERAS_RANKS, "kernel", surgery.import_keras, surgery.export_keras),
    ]
    for ranks, name, import_arrays, export_arrays in calls:
        separator = "." if name == "weight" else "/"
        for kind, own in ranks.items():
            # A convolution has one or more axes of its window.
            if rank == own or (own == 4 and rank in (3, 5) and kind != "depthwise_conv"):
                continue
            rules = [("a", "a", kind)]
            for text in (
                message(ValueError, import_arrays, variables, {f"a{separator}{name}": w}, rules),
                message(ValueError, export_arrays, variables, rules),
            ):
                assert f"params/a/kernel has shape {w.shape}, and {kind} takes (" in text


def test_a_square_convolution_is_not_a_linear_layer():
    """Reversing all axes passes the check of shapes, and would exchange height and width."""
    kernel = {"params": {"a": {"kernel": np.zeros((3, 3, 3, 3))}}}
    state = {"a.weight": np.arange(81.0).reshape(3, 3, 3, 3)}
    text = message(ValueError, surgery.import_torch, kernel, state, [("a", "a", "linear")])
    assert "linear takes (in out); its rank fits conv, conv_transpose" in text
    dense = {"params": {"a": {"kernel": np.zeros((3, 3))}}}
    text = message(ValueError, surgery.import_torch, dense, state, [("a", "a", "linear")])
    assert "a.weight gives (3, 3, 3, 3) for params/a/kernel of (3, 3), expected (3, 3)" in text
    assert "linear is (out in) there and (in out) here" in text


def test_a_depthwise_kernel_of_keras_is_not_a_grouped_one():
    """Swapping the last axes of (3, 3, 2, 4), a multiplier of 4, fits a kernel of groups of 4."""
    grouped = {"params": {"a": {"kernel": np.zeros((3, 3, 4, 2))}}}
    weights = {"a/kernel": np.zeros((3, 3, 2, 4))}
    text = message(
        ValueError, surgery.import_keras, grouped, weights, [("a", "a", "depthwise_conv")]
    )
    assert "depthwise_conv takes (*window 1 features); its rank fits" in text


def test_vectors_and_tables_of_another_rank_are_errors():
    square = np.zeros((3, 3))
    for kind, leaf, name in (
        ("batch_norm", "scale", "weight"),
        ("group_norm", "bias", "bias"),
        ("conv", "bias", "bias"),
    ):
        variables = {"params": {"a": {leaf: square}}}
        rules = [("a", "a", kind)]
        text = message(ValueError, surgery.import_torch, variables, {f"a.{name}": square}, rules)
        assert f"params/a/{leaf} has shape (3, 3), and {kind} takes (features)" in text
    variables = {"params": {"a": {"embedding": np.zeros((2, 3, 3))}}}
    assert "embedding takes (entries features)" in message(
        ValueError, surgery.export_torch, variables, [("a", "a", "embedding")]
    )
    # PyTorch has one count for all features.
    vector = np.zeros(3, np.float32)
    variables = {"batch_stats": {"count": vector}}
    state = {"num_batches_tracked": np.ones(3)}
    text = message(ValueError, surgery.import_torch, variables, state, [("", "", "batch_norm")])
    assert "gives (3,) for batch_stats/count of (3,), expected ()" in text


def test_conv_is_the_kind_of_a_transposed_convolution_with_transpose_kernel():
    """Both layouts fit a square kernel: the docstring says which kind to use."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    torch.manual_seed(0)
    up = torch.nn.ConvTranspose2d(4, 4, 3, 2)
    x = torch.randn(1, 4, 5, 5)
    want = np.moveaxis(up(x).detach().numpy(), 1, -1)
    images = np.moveaxis(x.numpy(), 1, -1)
    for kind, transposed in (("conv", True), ("conv_transpose", False)):
        model = nn.ConvTranspose(4, (3, 3), (2, 2), "VALID", transpose_kernel=transposed)
        like = jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(images))
        variables = surgery.import_torch(like, up.state_dict(), [("", "", kind)])
        got = model.apply(variables, images)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_a_kept_module_at_the_root_does_not_hide_unused_names():
    variables = {"params": {"token": np.zeros(2), "a": {"bias": np.zeros(2)}}}
    state = {"a.bias": np.ones(2), "b.bias": np.ones(2)}
    rules = [("", "", "keep"), ("a", "a", "linear")]
    text = message(ValueError, surgery.import_torch, variables, state, rules)
    assert "left over in it: b.bias" in text
