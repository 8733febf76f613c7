"""PyTorch: import and export of state dicts, and the fields of an equivalent module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from typing import Any

import jax.numpy as jnp
import numpy as np

from normjax import _errors
from normjax.surgery._layouts import (
    ANY,
    EMBEDDING,
    FEATURES,
    VECTOR,
    Kind,
    Layout,
    NameMapping,
)
from normjax.surgery._name_mapping import Rule, export_arrays, import_arrays
from normjax.surgery._paths import Tree
from normjax.surgery._safetensors import read


def _axes(array: np.ndarray) -> tuple[int, ...]:
    return tuple(range(array.ndim - 2))


LINEAR = Layout("in out", "out in", lambda w, _: w.T, lambda w: w.T)
CONV = Layout(
    "*window in out",
    "out in *window",
    lambda w, _: np.moveaxis(w, (1, 0), (-2, -1)),
    lambda w: np.moveaxis(w, (-1, -2), (0, 1)),
)
# PyTorch flips the window, Flax does not.
CONV_TRANSPOSE = Layout(
    "*window in out",
    "in out *window",
    lambda w, _: np.flip(np.moveaxis(w, (0, 1), (-2, -1)), _axes(w)),
    lambda w: np.moveaxis(np.flip(w, _axes(w)), (-2, -1), (0, 1)),
)
# One number for each module in PyTorch, one for each feature in normjax.
COUNT = Layout(
    "*features",
    "",
    lambda n, leaf: np.full(leaf.shape, n, leaf.dtype),
    lambda count: np.asarray(count.max(initial=0), np.int64),
)


def _heads(part: int) -> tuple[Layout, Layout]:
    """Kernel and bias of query, key or value, the parts of one array in PyTorch."""
    kernel = Layout(
        "in heads features",
        "3*heads*features in",
        lambda w, leaf: w.T.reshape(leaf.shape),
        lambda w: w.reshape(w.shape[0], w.shape[1] * w.shape[2]).T,
        part,
    )
    bias = Layout(
        "heads features",
        "3*heads*features",
        lambda b, leaf: b.reshape(leaf.shape),
        lambda b: b.ravel(),
        part,
    )
    return kernel, bias


OUT = Layout(
    "heads features out",
    "out heads*features",
    lambda w, leaf: w.T.reshape(leaf.shape),
    lambda w: w.reshape(w.shape[0] * w.shape[1], w.shape[2]).T,
)


def _attention() -> Kind:
    """`MultiHeadDotProductAttention` of Flax and `MultiheadAttention` of PyTorch."""
    entries = {
        ("params", "out/kernel"): ("out_proj.weight", OUT),
        ("params", "out/bias"): ("out_proj.bias", VECTOR),
    }
    for part, name in enumerate(("query", "key", "value")):
        kernel, bias = _heads(part)
        entries["params", f"{name}/kernel"] = ("in_proj_weight", kernel)
        entries["params", f"{name}/bias"] = ("in_proj_bias", bias)
    return entries


BATCH_NORMS = ("BatchNorm", "SyncBatchNorm")
NORMS = (*BATCH_NORMS, "InstanceNorm", "GroupNorm", "LayerNorm", "RMSNorm")
BIAS = {("params", "bias"): ("bias", VECTOR)}
AFFINE = {("params", "scale"): ("weight", VECTOR), **BIAS}
AFFINE_OF_AXES = {("params", "scale"): ("weight", FEATURES), ("params", "bias"): ("bias", FEATURES)}
TORCH = NameMapping(
    {
        "linear": {("params", "kernel"): ("weight", LINEAR), **BIAS},
        "conv": {("params", "kernel"): ("weight", CONV), **BIAS},
        "conv_transpose": {("params", "kernel"): ("weight", CONV_TRANSPOSE), **BIAS},
        "embedding": {("params", "embedding"): ("weight", EMBEDDING)},
        "attention": _attention(),
        "parameter": {("params", ""): ("", ANY)},
        "batch_norm": {
            **AFFINE,
            ("batch_stats", "mean"): ("running_mean", VECTOR),
            ("batch_stats", "var"): ("running_var", VECTOR),
            ("batch_stats", "count"): ("num_batches_tracked", COUNT),
        },
        "layer_norm": AFFINE_OF_AXES,
        "group_norm": AFFINE,
        "instance_norm": AFFINE,
        "rms_norm": AFFINE_OF_AXES,
    },
    separator=".",
    optional=("num_batches_tracked",),
)


@_errors.named("normjax.surgery.import_torch")
def import_torch(
    variables: Tree, state: Mapping[str, Any] | str | PathLike[str], rules: Sequence[Rule]
) -> Tree:
    """Fills the variables of a Flax model from the state dict of the same model in PyTorch.

        rule: (module of Flax, module of PyTorch, kind), as ("block{i}/Conv_{j}", "{i}.conv{j+1}",
        "conv")

    A name in braces matches any part of a module's name; `{j+1}` is one more than the number that
    `{j}` matched. The first rule that fits a leaf applies. `torchvision_rules` has the tables of
    torchvision's models.

    ===============  ==========================================  ===============================
    kind             axes in PyTorch                             axes in Flax
    ===============  ==========================================  ===============================
    linear           weight (out in)                             kernel (in out)
    conv             weight (out in window...)                   kernel (window... in out)
    conv_transpose   weight (in out window...)                   kernel (window... in out), reversed
    embedding        weight (entries features)                   embedding (entries features)
    attention        in_proj_weight (3*heads*features in)        query ... (in heads features)
                     out_proj.weight (out heads*features)        out (heads features out)
    batch_norm       weight, running_mean, ... (features)        scale, mean, ... (features)
    group_norm       weight (features)                           scale (features)
    instance_norm    weight (features)                           scale (features)
    layer_norm       weight (features...)                        scale (features...), in one order
    rms_norm         weight (features...)                        scale (features...), in one order
    parameter        an array outside of layers                  the same axes; not a kernel
    keep             ignored                                     not changed
    ===============  ==========================================  ===============================

    A rule for attention names `MultiHeadDotProductAttention` and `MultiheadAttention`, a rule for a
    parameter the parameter itself: `("encoder/pos", "encoder.pos_embedding", "parameter")`. Arrays
    of another rank are errors. If two layouts have the same shape, the kind decides: a
    `ConvTranspose` is conv_transpose, or conv with `transpose_kernel=True`.

    The fields of the Flax model must match, too. PyTorch's momentum is the weight of the NEW value,
    its running variance is unbiased (ddof=1) and its epsilon is 1e-5; `torch_fields` reads these
    from a module. With a stride, PyTorch's padding=1 is ((1, 1), (1, 1)) in Flax, not "SAME". A
    Linear after a flattened image reads (channels, height, width): transpose before flattening.

    Args:
        variables: of the Flax model, as returned by `init` or by `jax.eval_shape` of it; or a model
            of flax.nnx, whose paths are those of its attributes.
        state: mapping of names to arrays or tensors, or the path of a safetensors file (needs the
            package safetensors). Never a pickle: pass `torch.load(path, weights_only=True)`.
        rules: the table, a list of rules.

    Returns:
        Variables of the same structure, NumPy arrays in the dtypes of the state; or a copy of the
        model that holds them.

    Guarantees:
        identity: `export_torch` of the result is bitwise equal to the state.
        all or nothing: it is an error if a leaf has no array or an array has no leaf.

    Edge cases:
        ===================================  ==================================================
        num_batches_tracked                  `batch_stats/count` if the Flax model has it, else
                                             ignored
        bfloat16                             stays bfloat16
        a rule of kind keep                  ignores the module and its names
        ===================================  ==================================================

    Raises:
        ValueError: names missing or left over (the first five of each are listed, and a prefix or
            a level that they lack, if there is one), shapes that differ, a variable of
            another rank than its kind takes, a rule that matches nothing, a variable without a
            rule, a file that is not safetensors.
        TypeError: `state` is neither a mapping nor a path, `variables` is not a mapping, or `rules`
            is not a list of three strings each.
        FileNotFoundError: there is no file at the path.
        ImportError: a path, if safetensors is not installed.

    References:
        PyTorch (2024), torch.nn.BatchNorm2d; Hugging Face (2022), safetensors, file format.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, numpy as np
        >>> from normjax import surgery
        >>> model = nn.Sequential([nn.Dense(3)])
        >>> variables = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 2)))
        >>> state = {"0.weight": np.ones((3, 2)), "0.bias": np.zeros(3)}
        >>> filled = surgery.import_torch(variables, state, [("layers_{i}", "{i}", "linear")])
        >>> filled["params"]["layers_0"]["kernel"].shape
        (2, 3)
    """
    if isinstance(state, (str, PathLike)):
        state = read(fspath(state))
    if not isinstance(state, Mapping):
        raise TypeError(
            f"normjax: state is {type(state).__name__}, expected a mapping of names to arrays or "
            "the path of a safetensors file. Pass model.state_dict()."
        )
    return import_arrays(TORCH, variables, state, rules)


@_errors.named("normjax.surgery.export_torch")
def export_torch(variables: Any, rules: Sequence[Rule]) -> dict[str, np.ndarray]:
    """The state dict of the same model in PyTorch, from the variables of a Flax model.

        model.load_state_dict({name: torch.from_numpy(a) for name, a in state.items()})

    Args:
        variables: of the Flax model; or a model of flax.nnx.
        rules: the table of `import_torch`.

    Returns:
        A dict of contiguous NumPy arrays by PyTorch's names, for `torch.from_numpy` and
        `safetensors.numpy.save_file`.

    Guarantees:
        identity: `import_torch` of the result is bitwise equal to the variables.

    Edge cases:
        ===================================  ==================================================
        no batch_stats/count                 no num_batches_tracked, which PyTorch then creates
        ===================================  ==================================================

    Raises:
        ValueError: a rule that matches nothing, a variable without a rule or of another rank than
            its kind takes, a name given twice, query, key and value of several shapes.
        TypeError: `variables` is not a mapping, or `rules` is not a list of three strings each.

    References:
        PyTorch (2024), torch.nn.Module.load_state_dict.

    Example:
        >>> import jax.numpy as jnp
        >>> from normjax import surgery
        >>> variables = {"params": {"head": {"kernel": jnp.ones((2, 3))}}}
        >>> surgery.export_torch(variables, [("head", "fc", "linear")])["fc.weight"].shape
        (3, 2)
    """
    return export_arrays(TORCH, variables, rules)


@_errors.named("normjax.surgery.torch_fields")
def torch_fields(module: Any) -> dict[str, Any]:
    """The fields of the linen module that is equivalent to a norm of PyTorch.

        momentum = 1 - PyTorch's momentum,  ddof = 1,  epsilon = eps

    Args:
        module: a BatchNorm, SyncBatchNorm, LayerNorm, GroupNorm, InstanceNorm or RMSNorm of
            torch.nn, or a module that extends one.

    Returns:
        Keyword arguments of the module of that name in `normjax.linen`, and in `normjax.nnx`,
        which also needs the number of features.

    Guarantees:
        acts alike: equal results in training and evaluation, and equal running statistics.

    Edge cases:
        ===================================  ==================================================
        momentum=None                        momentum=None, the plain average, with a count
        affine=False                         neither scale nor bias
        a subclass                           the fields of the norm, without additions such as the
                                             activation of timm's BatchNormAct2d
        RMSNorm with eps=None                the eps of float32
        ===================================  ==================================================

    Raises:
        TypeError: a module of another type.
        ValueError: a batch norm without running statistics or an instance norm with them, which
            no fields reproduce in evaluation.

    References:
        PyTorch (2024), torch.nn, normalization layers.

    Example:
        >>> from types import SimpleNamespace
        >>> from normjax import surgery
        >>> BatchNorm2d = type("BatchNorm2d", (SimpleNamespace,), {})  # of torch.nn
        >>> surgery.torch_fields(BatchNorm2d(momentum=0.1, eps=1e-5, weight=1, bias=1))["momentum"]
        0.9
    """
    got = f"normjax: module is {type(module).__name__}"
    # Bases are compared by name: PyTorch is never imported here.
    bases = [base.__name__.strip("_123d") for base in type(module).__mro__]
    kind = next((base for base in bases if base in NORMS), None)
    if kind is None:
        raise TypeError(
            f"{got}, expected a BatchNorm, SyncBatchNorm, LayerNorm, GroupNorm, InstanceNorm "
            "or RMSNorm of torch.nn, or a module that extends one. Pass the norm itself, for "
            "example model.bn1."
        )
    tracks = getattr(module, "track_running_stats", kind in BATCH_NORMS)
    if kind in BATCH_NORMS and not tracks:
        raise ValueError(
            f"{got} with track_running_stats=False, expected True: without running statistics "
            "it uses those of the batch in evaluation too, for which there is no field. Call "
            "normjax.linen.BatchNorm with train=True in evaluation too."
        )
    if kind == "InstanceNorm" and tracks:
        raise ValueError(
            f"{got} with track_running_stats=True, expected False: in evaluation it is a batch "
            "norm by running statistics, which normjax.linen.InstanceNorm does not keep. For "
            "evaluation alone, use normjax.linen.BatchNorm and the kind batch_norm."
        )
    try:
        return _fields(kind, module)
    except AttributeError as error:
        raise TypeError(
            f"{got}, which lacks a field of {kind} of torch.nn ({error}). Give the fields of "
            "normjax.linen yourself."
        ) from None


def _fields(kind: str, module: Any) -> dict[str, Any]:
    """The fields of a norm of this kind."""
    uses = {
        "use_scale": module.weight is not None,
        "use_bias": getattr(module, "bias", None) is not None,
    }
    fields: dict[str, Any] = {"epsilon": module.eps, **uses}
    if kind in BATCH_NORMS:
        momentum = None if module.momentum is None else 1 - module.momentum
        return {"momentum": momentum, "ddof": 1, **fields}
    if kind == "InstanceNorm":
        return fields
    if kind == "GroupNorm":
        return {"num_groups": module.num_groups, **fields}
    axes = tuple(range(-len(module.normalized_shape), 0))
    fields |= {"reduction_axes": axes, "feature_axes": axes}
    if kind == "RMSNorm":
        del fields["use_bias"]
        fields["epsilon"] = float(jnp.finfo("float32").eps) if module.eps is None else module.eps
    return fields
