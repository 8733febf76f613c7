"""Keras and TensorFlow: import and export of weights by path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from normjax import _errors
from normjax.surgery._layouts import ANY, EMBEDDING, FEATURES, VECTOR, Layout, NameMapping
from normjax.surgery._name_mapping import Rule, export_arrays, import_arrays
from normjax.surgery._paths import Tree

INPUTS = ("query", "key", "value")


def _turned(w: np.ndarray) -> np.ndarray:
    return np.flip(np.swapaxes(w, -1, -2), tuple(range(w.ndim - 2)))


CONV = Layout("*window in out", "*window in out")
# The window is flipped, as in PyTorch.
CONV_TRANSPOSE = Layout("*window in out", "*window out in", lambda w, _: _turned(w), _turned)
DEPTHWISE = Layout(
    "*window 1 features",
    "*window features 1",
    lambda w, _: np.swapaxes(w, -1, -2),
    lambda w: np.swapaxes(w, -1, -2),
)
DENSE = Layout("in out", "in out")
HEADS = Layout("in heads features", "in heads features")
HEADS_BIAS = Layout("heads features", "heads features")
OUT = Layout("heads features out", "heads features out")

BIAS = {("params", "bias"): ("bias", VECTOR)}
AFFINE = {("params", "scale"): ("gamma", VECTOR), ("params", "bias"): ("beta", VECTOR)}
KERAS = NameMapping(
    {
        "dense": {("params", "kernel"): ("kernel", DENSE), **BIAS},
        "einsum_dense": {
            ("params", "kernel"): ("kernel", FEATURES),
            ("params", "bias"): ("bias", FEATURES),
        },
        "conv": {("params", "kernel"): ("kernel", CONV), **BIAS},
        "conv_transpose": {("params", "kernel"): ("kernel", CONV_TRANSPOSE), **BIAS},
        "depthwise_conv": {("params", "kernel"): ("kernel", DEPTHWISE), **BIAS},
        "embedding": {("params", "embedding"): ("embeddings", EMBEDDING)},
        "attention": {
            **{("params", f"{n}/kernel"): (f"{n}/kernel", HEADS) for n in INPUTS},
            **{("params", f"{n}/bias"): (f"{n}/bias", HEADS_BIAS) for n in INPUTS},
            ("params", "out/kernel"): ("attention_output/kernel", OUT),
            ("params", "out/bias"): ("attention_output/bias", VECTOR),
        },
        "parameter": {("params", ""): ("", ANY)},
        "batch_norm": {
            **AFFINE,
            ("batch_stats", "mean"): ("moving_mean", VECTOR),
            ("batch_stats", "var"): ("moving_variance", VECTOR),
        },
        "layer_norm": {
            ("params", "scale"): ("gamma", FEATURES),
            ("params", "bias"): ("beta", FEATURES),
        },
        "group_norm": AFFINE,
        "rms_norm": {("params", "scale"): ("scale", FEATURES)},
    },
    separator="/",
)


@_errors.named("normjax.surgery.import_keras")
def import_keras(variables: Tree, weights: Mapping[str, Any], rules: Sequence[Rule]) -> Tree:
    """Fills the variables of a Flax model from the weights of the same model in Keras.

        rule: (module of Flax, layer of Keras, kind), as ("Conv_{i}", "net/conv{i+1}", "conv")

    Rules are those of `import_torch`. Kinds, with the rank of their kernels: dense (2),
    einsum_dense (any), conv and conv_transpose (3 or more), depthwise_conv (likewise, of
    multiplier 1), attention (of `MultiHeadAttention`), embedding, batch_norm (gamma, beta,
    moving_mean, moving_variance), layer_norm, group_norm, rms_norm, parameter (an array that is not
    a kernel, by its own name), and keep. Keras' momentum is Flax's, its epsilon is 1e-3.

    Args:
        variables: of the Flax model, as returned by `init` or by `jax.eval_shape` of it; or a model
            of flax.nnx.
        weights: arrays by path: `{w.path: np.asarray(w) for w in model.weights}`. Names of
            TensorFlow end in ":0", which is not a part of the path: remove it.
        rules: the table.

    Returns:
        Variables of the same structure, NumPy arrays in the dtypes of the weights; or a copy of
        the model that holds them.

    Guarantees:
        identity: `export_keras` of the result is bitwise equal to the weights.
        all or nothing: it is an error if a leaf has no array or an array has no leaf.

    Raises:
        ValueError: names missing or left over, shapes that differ, a variable of another rank
            than its kind takes, a rule that matches nothing, a variable without a rule.
        TypeError: `weights` or `variables` is not a mapping, or `rules` is not a list of three
            strings each.

    References:
        Keras (2024), keras.layers.BatchNormalization.

    Example:
        >>> import numpy as np
        >>> from normjax import surgery
        >>> variables = {"params": {"norm": {"scale": np.zeros(2), "bias": np.zeros(2)}}}
        >>> weights = {"net/ln/gamma": np.ones(2), "net/ln/beta": np.zeros(2)}
        >>> rules = [("norm", "net/ln", "layer_norm")]
        >>> surgery.import_keras(variables, weights, rules)["params"]["norm"]["scale"]
        array([1., 1.])
    """
    if not isinstance(weights, Mapping):
        raise TypeError(
            f"normjax: weights is {type(weights).__name__}, expected a mapping of paths to "
            "arrays. Pass {w.path: np.asarray(w) for w in model.weights}."
        )
    return import_arrays(KERAS, variables, weights, rules)


@_errors.named("normjax.surgery.export_keras")
def export_keras(variables: Any, rules: Sequence[Rule]) -> dict[str, np.ndarray]:
    """The weights of the same model in Keras by path, from the variables of a Flax model.

        for w in model.weights: w.assign(weights[w.path])

    Args:
        variables: of the Flax model; or a model of flax.nnx.
        rules: the table of `import_keras`.

    Returns:
        A dict of contiguous NumPy arrays by Keras' paths.

    Guarantees:
        identity: `import_keras` of the result is bitwise equal to the variables.

    Raises:
        ValueError: a rule that matches nothing, a variable without a rule or of another rank than
            its kind takes, a name given twice.
        TypeError: `variables` is not a mapping, or `rules` is not a list of three strings each.

    References:
        Keras (2024), keras.layers.BatchNormalization.

    Example:
        >>> import numpy as np
        >>> from normjax import surgery
        >>> variables = {"params": {"norm": {"scale": np.ones(2), "bias": np.zeros(2)}}}
        >>> sorted(surgery.export_keras(variables, [("norm", "net/ln", "layer_norm")]))
        ['net/ln/beta', 'net/ln/gamma']
    """
    return export_arrays(KERAS, variables, rules)
