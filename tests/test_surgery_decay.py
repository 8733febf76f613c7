"""Weight decay: applies to kernels, not to biases or to the scales of norms."""

import flax.linen as nn
import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normjax.linen
from normjax import surgery

KEY = jax.random.key(0)
X = jax.ShapeDtypeStruct((2, 4, 6), jnp.float32)
NORMS = [
    *(getattr(nn, name) for name in ("BatchNorm", "LayerNorm", "RMSNorm", "InstanceNorm")),
    *(getattr(normjax.linen, name) for name in ("BatchNorm", "BatchRenorm", "LayerNorm")),
    *(getattr(normjax.linen, name) for name in ("RMSNorm", "InstanceNorm", "AddLayerNorm")),
    *(getattr(normjax.linen, name) for name in ("FilterResponseNorm", "DynamicTanh")),
]
LAYERS = {
    "dense": nn.Dense(3),
    "heads": nn.DenseGeneral((2, 3)),
    "convolution": nn.Conv(6, 3, feature_group_count=6),
    "transposed": nn.ConvTranspose(3, (3,)),
    "attention": nn.MultiHeadDotProductAttention(2),
    "recurrent": nn.RNN(nn.GRUCell(3)),
}


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def params(module, *args, **options):
    args = args or (X,)
    return jax.eval_shape(lambda: module.init(KEY, *map(zeros, args), **options))["params"]


def zeros(spec):
    return jnp.zeros(spec.shape, spec.dtype)


def by_name(tree):
    """The mask as {slashed name: whether it decays}."""
    leaves = jax.tree_util.tree_leaves_with_path(surgery.decay_mask(tree))
    return {jax.tree_util.keystr(p, simple=True, separator="/"): v for p, v in leaves}


@pytest.mark.parametrize("name", LAYERS)
def test_decay_mask_guarantee_kernels_yes(name):
    mask = by_name(params(LAYERS[name]))
    assert {path.split("/")[-1]: v for path, v in mask.items()} == {"kernel": True, "bias": False}


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: f"{norm.__module__}.{norm.__name__}")
def test_decay_mask_guarantee_norms_and_biases_no(norm):
    module = norm(use_running_average=True) if "Batch" in norm.__name__ else norm()
    inputs = (X, X) if "Add" in norm.__name__ else (X,)
    mask = by_name(params(module, *inputs))
    assert mask
    assert not any(mask.values())


TORCH = {
    "conv.weight": (shape(4, 3, 3, 3), True),
    "conv1d.weight": (shape(1, 1, 3), True),
    "head.weight": (shape(1, 512), True),
    "cls": (shape(1, 1, 8), False),
    "query": (shape(1, 5, 8), True),
    "conv.bias": (shape(4), False),
    "depthwise.weight": (shape(4, 1, 1, 3), True),
    "bn.weight": (shape(4), False),
    "bn.bias": (shape(4), False),
    "bn.running_mean": (shape(4), False),
    "bn.num_batches_tracked": (jax.ShapeDtypeStruct((), jnp.int32), False),
    "norm_of_two_axes.weight": (shape(4, 3), False),
    "norm_of_two_axes.bias": (shape(4, 3), False),
    "attention.in_proj_weight": (shape(12, 4), True),
    "attention.in_proj_bias": (shape(12), False),
    "attention.bias_k": (shape(1, 1, 4), False),
    "attention.relative_position_bias_table": (shape(9, 2), False),
    "lora_a": (shape(4, 2), True),
    "lora_b": (shape(2, 4), True),
    "prelu.weight": (shape(1), False),
    "cls_token": (shape(1, 1, 4), False),
    "pos_embed": (shape(1, 9, 4), False),
    "embeddings.position_embeddings.weight": (shape(9, 4), False),
    "embeddings.word_embeddings.weight": (shape(9, 4), True),
    "embeddings.token_type_embeddings.weight": (shape(2, 4), True),
    "normed.weight_g": (shape(4, 1), True),
    "normed.weight_v": (shape(4, 3), True),
    "normed2.parametrizations.weight.original0": (shape(4, 1), True),
    "layer_scale.gamma": (shape(4), False),
    "logit_scale": (shape(), False),
    # Attention biases, positions and tokens of torch models, and kernels with such names.
    "levit.attention_biases": (shape(8, 49), False),
    "conformer.pos_bias_u": (shape(4, 16), False),
    "t5.relative_attention_bias.weight": (shape(32, 8), False),
    "mvit.rel_pos_w": (shape(111, 96), False),
    "tnt.patch_pos": (shape(1, 197, 64), False),
    "tnt.pixel_pos": (shape(1, 40, 4, 4), False),
    "halo.pos_embed.height_rel": (shape(31, 64), False),
    "clip.positional_embedding": (shape(77, 8), False),
    "clip.class_embedding": (shape(8), False),
    "gpt2.wpe.weight": (shape(64, 8), False),
    "gpt2.wte.weight": (shape(90, 8), True),
    "bart.embed_positions.weight": (shape(64, 8), False),
    "bart.embed_tokens.weight": (shape(90, 8), True),
    "dino.mask_token": (shape(1, 8), False),
    "dino.register_tokens": (shape(1, 4, 8), False),
    "timm.reg_token": (shape(1, 4, 8), False),
    "convit.pos_proj.weight": (shape(16, 3), True),
    "xl.pos_emb.weight": (shape(16, 3), True),
    "xl.pos_emb.bias": (shape(16), False),
    "xcit.pos_embed.token_projection.weight": (shape(8, 64, 1, 1), True),
    "fastvit.pos_emb.pos_enc.weight": (shape(8, 1, 7, 7), True),
    "resmlp.linear_tokens.weight": (shape(7, 7), True),
}


FLAX = {
    "wpe/embedding": (shape(64, 8), False),
    "wte/embedding": (shape(90, 8), True),
    "decoder/embed_positions/embedding": (shape(64, 8), False),
    "shared/embedding": (shape(90, 8), True),
    "SelfAttention/relative_attention_bias/embedding": (shape(32, 8), False),
    "PositionEmbs_0/Embed_0/embedding": (shape(64, 8), False),
    "embeddings/token_type_embeddings/embedding": (shape(2, 8), True),
    "vision_model/embeddings/class_embedding": (shape(8), False),
    "class_embedding/embedding": (shape(9, 8), True),
    "posembed_input/pos_embedding": (shape(1, 64, 8), False),
    "embeddings/mask_token": (shape(1, 8), False),
    "pos_conv_embed/conv/kernel": (shape(5, 4, 8), True),
    "final_logits_bias": (shape(1, 90), False),
}


def test_decay_mask_guarantee_positions_and_tokens_no():
    assert by_name({k: v for k, (v, _) in FLAX.items()}) == {k: v for k, (_, v) in FLAX.items()}


def nested(flat, separator):
    tree = {}
    for path, value in flat.items():
        *parents, name = path.split(separator)
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = value
    return tree


@pytest.mark.parametrize("name", TORCH)
def test_pytorch_names(name):
    given, want = TORCH[name]
    siblings = {k: v for k, (v, _) in TORCH.items()}
    assert siblings[name] is given
    assert by_name(siblings)[name] is want


def test_decay_mask_guarantee_any_tree():
    shapes = {name: value for name, (value, _) in TORCH.items()}
    slashed = {name.replace(".", "/"): value for name, value in shapes.items()}
    want = {name: value for name, (_, value) in TORCH.items()}
    assert surgery.decay_mask(shapes) == want
    assert by_name(slashed) == {name.replace(".", "/"): v for name, v in want.items()}
    assert surgery.decay_mask(nested(shapes, ".")) == nested(want, ".")


def test_keras_haiku_and_pairs():
    keras = {
        "conv/kernel": (shape(3, 3, 2, 4), True),
        "separable/depthwise_kernel": (shape(3, 3, 4, 1), True),
        "gru/recurrent_kernel": (shape(3, 9), True),
        "gru/bias": (shape(2, 9), False),
        "norm/gamma": (shape(4), False),
        "norm/beta": (shape(4), False),
        "norm/moving_variance": (shape(4), False),
        "embedding/embeddings": (shape(9, 4), True),
    }
    assert by_name({k: v for k, (v, _) in keras.items()}) == {k: v for k, (_, v) in keras.items()}
    haiku = {
        "mlp/~/linear_0": {"w": shape(2, 3), "b": shape(3)},
        "norm": {"scale": shape(1, 1, 3), "offset": shape(1, 1, 3)},
    }
    assert surgery.decay_mask(haiku) == {
        "mlp/~/linear_0": {"w": True, "b": False},
        "norm": {"scale": False, "offset": False},
    }
    pairs = [(shape(2, 3), shape(3)), (shape(3, 1), shape(1))]
    assert surgery.decay_mask(pairs) == [(True, False), (True, False)]


def test_nnx_state():
    state = nnx.state(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), nnx.Param)
    assert not any(jax.tree.leaves(surgery.decay_mask(state)))
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    assert sorted(jax.tree.leaves(surgery.decay_mask(state))) == [False, True]


def test_decay_mask_edge_bias_of_rank_2_attention_heads():
    tree = params(nn.DenseGeneral((2, 3)))
    assert tree["bias"].shape == (2, 3)
    assert surgery.decay_mask(tree) == {"kernel": True, "bias": False}


def test_decay_mask_edge_scale_of_rank_2_norm_of_two_axes():
    tree = params(normjax.linen.LayerNorm(reduction_axes=(-2, -1), feature_axes=(-2, -1)))
    assert tree["scale"].shape == (4, 6)
    assert surgery.decay_mask(tree) == {"scale": False, "bias": False}


def test_decay_mask_edge_kernel_of_one_axis():
    assert surgery.decay_mask({"kernel": shape(4), "bias": shape(4)}) == {
        "kernel": True,
        "bias": False,
    }


@pytest.mark.parametrize("kind", [nn.WeightNorm, normjax.linen.WeightNorm])
def test_decay_mask_edge_scale_of_weightnorm(kind):
    mask = by_name(params(kind(nn.Dense(3))))
    scale = "layer_instance/kernel/scale"
    assert mask == {scale: True, "layer_instance/kernel": True, "layer_instance/bias": False}


def test_gain_of_a_standardized_weight():
    mask = by_name(params(normjax.linen.WeightStandardized(nn.Dense(3), use_gain=True)))
    gain = "layer_instance/kernel/gain"
    assert mask == {gain: False, "layer_instance/kernel": True, "layer_instance/bias": False}


def test_statistics_do_not_decay():
    """The vectors of a power iteration have rank 2."""
    tree = {"kernel": shape(3, 4), "batch_stats": {"layer/kernel/u": shape(1, 4)}}
    assert by_name(tree) == {"kernel": True, "batch_stats/layer/kernel/u": False}


def test_all_variables_of_a_linen_model_are_an_error():
    variables = normjax.linen.BatchNorm().init(jax.random.key(0), jnp.ones((2, 3)), train=True)
    with pytest.raises(ValueError, match=r"surgery.decay_mask: .*\['batch_stats', 'params'\]"):
        surgery.decay_mask(variables)


def test_decay_mask_edge_empty_tree():
    assert surgery.decay_mask({}) == {}


@pytest.mark.usefixtures("lenient")
def test_in_optax():
    """A step with zero gradients changes only the parameters that decay, by the rate."""
    optax = pytest.importorskip("optax", reason="optax is not installed")
    tree = {"Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "scale": jnp.ones(3)}
    optimizer = optax.adamw(0.5, weight_decay=0.5, mask=surgery.decay_mask)
    zero = jax.tree.map(jnp.zeros_like, tree)
    updates, _ = optimizer.update(zero, optimizer.init(tree), tree)
    np.testing.assert_allclose(updates["Dense_0"]["kernel"], -0.25)
    assert not updates["Dense_0"]["bias"].any()
    assert not updates["scale"].any()


def test_a_leaf_that_is_not_an_array_is_an_error():
    with pytest.raises(TypeError, match=r"surgery.decay_mask: Dense_0/kernel is str, expected"):
        surgery.decay_mask({"Dense_0": {"kernel": "large"}})
