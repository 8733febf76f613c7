"""Attention and bare parameters, between Flax, PyTorch and Keras."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from normjax import surgery

RULES = [("self_attention", "attention", "attention")]


def message(function, *args):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        function(*args)
    return str(caught.value)


def variables(heads=2, of_head=2, features=4, bias=True, of_key=4):
    """The variables of MultiHeadDotProductAttention."""
    rng = np.random.default_rng(0)

    def inner(n_in):
        kernel = {"kernel": rng.normal(size=(n_in, heads, of_head))}
        return {**kernel, "bias": rng.normal(size=(heads, of_head))} if bias else kernel

    out = {"kernel": rng.normal(size=(heads, of_head, features))}
    inputs = {"query": inner(features), "key": inner(of_key), "value": inner(of_key)}
    outputs = {**out, "bias": rng.normal(size=(features,))} if bias else out
    return {"params": {"self_attention": {**inputs, "out": outputs}}}


@pytest.mark.parametrize("bias", [True, False])
def test_attention_agrees_with_pytorch(bias):
    """Two heads of two features, so that every wrong transpose of (4, 4) has the right shape."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    torch.manual_seed(0)
    twin = torch.nn.MultiheadAttention(4, 2, bias=bias, batch_first=True)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.normal_()
    x = torch.randn(2, 3, 4)
    model = nn.MultiHeadDotProductAttention(2, use_bias=bias)
    inputs = jnp.asarray(x.numpy())
    empty = jax.eval_shape(model.init, jax.random.key(0), inputs)
    filled = surgery.import_torch(empty, twin.state_dict(), [("", "", "attention")])
    want = twin(x, x, x)[0].detach().numpy()
    got = model.apply(filled, inputs)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    state = surgery.export_torch(filled, [("", "", "attention")])
    assert state.keys() == twin.state_dict().keys()
    for name, tensor in twin.state_dict().items():
        np.testing.assert_array_equal(state[name], tensor.numpy(), strict=True)


def test_attention_round_trip():
    for bias in (True, False):
        exported = surgery.export_torch(variables(heads=3, bias=bias), RULES)
        assert exported["attention.in_proj_weight"].shape == (18, 4)
        imported = surgery.import_torch(variables(heads=3, bias=bias), exported, RULES)
        jax.tree.map(np.testing.assert_array_equal, imported, variables(heads=3, bias=bias))


def test_attention_of_other_shapes_is_an_error():
    state = surgery.export_torch(variables(), RULES)
    state["attention.in_proj_weight"] = state["attention.in_proj_weight"][:8]
    text = message(surgery.import_torch, variables(), state, RULES)
    assert (
        "gives (8, 4) for params/self_attention/key/kernel of (4, 2, 2), expected (12, 4)" in text
    )
    # PyTorch keeps three arrays where keys have another size than queries.
    text = message(surgery.export_torch, variables(of_key=3), RULES)
    assert "query, key and value of attention.in_proj_weight have shapes (4, 4), (4, 3)" in text
    part = variables()
    del part["params"]["self_attention"]["key"]
    text = message(surgery.export_torch, part, RULES)
    assert "names given in part: attention.in_proj_bias, attention.in_proj_weight" in text
    flat = {"params": {"self_attention": {"query": {"kernel": np.zeros((4, 4))}}}}
    text = message(surgery.export_torch, flat, RULES)
    assert "attention takes (in heads features)" in text


def test_attention_agrees_with_keras():
    exported = surgery.export_keras(variables(heads=3), RULES)
    assert exported["attention/attention_output/kernel"].shape == (3, 2, 4)
    imported = surgery.import_keras(variables(heads=3), exported, RULES)
    jax.tree.map(np.testing.assert_array_equal, imported, variables(heads=3))


def test_einsum_dense_of_any_rank():
    kernel = np.random.default_rng(0).normal(size=(4, 2, 3))
    exported = surgery.export_keras({"params": {"kernel": kernel}}, [("", "d", "einsum_dense")])
    np.testing.assert_array_equal(exported["d/kernel"], kernel)


def test_bare_parameters_of_any_shape():
    params = {"token": np.ones((1, 1, 3)), "encoder": {"scale": np.float32(2), "pos": np.ones(3)}}
    rules = [
        ("token", "cls", "parameter"),
        ("encoder/{name}", "enc.{name}", "parameter"),
    ]
    exported = surgery.export_torch({"params": params}, rules)
    assert {name: array.shape for name, array in exported.items()} == {
        "cls": (1, 1, 3),
        "enc.scale": (),
        "enc.pos": (3,),
    }
    imported = surgery.import_torch({"params": params}, exported, rules)
    jax.tree.map(np.testing.assert_array_equal, imported, {"params": params})
    rules = [("token", "cls", "parameter"), ("encoder/{name}", "enc/{name}", "parameter")]
    exported = surgery.export_keras({"params": params}, rules)
    assert sorted(exported) == ["cls", "enc/pos", "enc/scale"]
    text = message(surgery.import_keras, {"params": params}, {**exported, "cls": np.ones(3)}, rules)
    assert "cls gives (3,) for params/token of (1, 1, 3), expected (1, 1, 3)" in text


def test_a_bare_parameter_can_be_kept():
    params = {"token": np.ones(3), "a": {"bias": np.zeros(2)}}
    rules = [("token", "cls", "keep"), ("a", "a", "linear")]
    state = {"cls": np.zeros(7), "a.bias": np.ones(2)}
    filled = surgery.import_torch({"params": params}, state, rules)
    assert (filled["params"]["token"] == 1).all()
    assert (filled["params"]["a"]["bias"] == 1).all()


def test_a_kernel_is_not_a_bare_parameter():
    """A square one would be imported without its transpose."""
    kernel = {"params": {"a": {"kernel": np.zeros((3, 3))}}}
    text = message(
        surgery.import_torch, kernel, {"a.weight": np.ones((3, 3))},
        [("a/kernel", "a.weight", "parameter")],
    )  # fmt: skip
    assert "variables without a rule: params/a/kernel" in text
    # A pattern of bare names does not match the parameters of layers either.
    rules = [("{module}/{name}", "old", "keep"), ("a", "a", "linear")]
    text = message(surgery.import_torch, kernel, {"a.weight": np.ones((3, 3))}, rules)
    assert "rules that match nothing: ('{module}/{name}', 'old', 'keep')" in text
