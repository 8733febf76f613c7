"""Every value of an argument is accepted as documented, or refused with the function's name."""

import inspect

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx

import normjax
import normjax.linen
import normjax.nnx

X = np.linspace(-1, 1, 24, dtype=np.float32).reshape(2, 4, 3)
SCALE, BIAS = np.ones(3, np.float32), np.zeros(3, np.float32)
STATS = normjax.BatchStats(np.zeros(3, np.float32), np.ones(3, np.float32))
W, U = X[0], normjax.SpectralStats(np.ones((1, 3), np.float32), np.ones((), np.float32))


class Inner(nn.Module):
    """A layer within a wrapper."""

    @nn.compact
    def __call__(self, x, train=None):
        return x @ self.param("kernel", nn.initializers.ones, (3, 2))


VALUES = {
    "None": None,
    "text": "abc",
    "half": 0.5,
    "one": 1,
    "many": 20,
    "zero": 0,
    "negative": -7,
    "True": True,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "imaginary": 1j,
    "list": [1.0, 1.0, 1.0],
    "tuple": (1.0,),
    "nothing": (),
    "dictionary": {"a": 1.0},
    "object": object(),
    "class": dict,
    "NumPy whole": np.int64(1),
    "NumPy real": np.float32(0.5),
    "NumPy bool": np.bool_(True),
    "NumPy text": np.array("abc"),
    "NumPy objects": np.array([None, 1], object),
    "wrong shape": np.ones((5, 7), np.float32),
    "wrong dtype": np.ones(3, int),
    "wrong rank": np.ones((1, 1, 1, 1), np.float32),
    "complex array": np.ones(3, np.complex64),
    "empty": np.zeros((0, 3), np.float32),
    "dates": np.zeros(3, "datetime64[s]"),
    "key": jax.random.key(0),
    "function": lambda *args: "abc",
    "stats of text": normjax.BatchStats("a", "b", "c"),
    "stats of None": normjax.BatchStats(None, None),
    "moments of text": normjax.Moments("a", "b", "c"),
}

STATEFUL = dict(x=X, stats=STATS, scale=SCALE, bias=BIAS, train=True)
WITHIN = dict(x=X, scale=SCALE, bias=BIAS)
FUNCTIONS = {
    "normjax.batch_norm": STATEFUL,
    "normjax.batch_norm_act": STATEFUL,
    "normjax.batch_renorm": STATEFUL,
    "normjax.normalize": dict(x=X, mean=np.float32(0), var=np.float32(1), scale=SCALE[None, None]),
    "normjax.measure": dict(x=X, axis=0),
    "normjax.update_stats": dict(
        stats=STATS, moments=normjax.Moments(np.float32(2), STATS.mean, STATS.var)
    ),
    "normjax.layer_norm": WITHIN,
    "normjax.rms_norm": dict(x=X, scale=SCALE),
    "normjax.group_norm": WITHIN | dict(num_groups=1),
    "normjax.instance_norm": WITHIN,
    "normjax.add_layer_norm": WITHIN | dict(residual=X),
    "normjax.add_rms_norm": dict(x=X, residual=X, scale=SCALE),
    "normjax.filter_response_norm": WITHIN,
    "normjax.dynamic_tanh": WITHIN,
    "normjax.local_response_norm": dict(x=X),
    "normjax.l2_normalize": dict(x=X),
    "normjax.weight_norm": dict(w=W, scale=SCALE),
    "normjax.standardize_weight": dict(w=W, gain=SCALE),
    "normjax.spectral_norm": dict(w=W, stats=U, train=True),
    "normjax.BatchStats.make": dict(shape=3),
    "normjax.Moments.make": dict(shape=3),
    "normjax.Moments.variance": dict(self=normjax.Moments(np.float32(2), STATS.mean, STATS.var)),
    "normjax.LeakyReLU": {},
    "normjax.ELU": {},
    "normjax.linen.empty_batch_moments": dict(batch_stats={"a": STATS._asdict()}),
    "normjax.linen.move_batch_stats": dict(
        batch_stats={"a": dict(mean=STATS.mean, var=STATS.var)}, batch_moments={}, momentum=0.9
    ),
}


def resolved(called):
    result = normjax
    for name in called.split(".")[1:]:
        result = getattr(result, name)
    return result


TRAINED = dict(call=dict(x=X, train=True))
MODULES = {
    "normjax.linen.BatchNorm": TRAINED,
    "normjax.linen.BatchNormAct": TRAINED,
    "normjax.linen.BatchRenorm": TRAINED,
    "normjax.linen.LayerNorm": dict(call=dict(x=X)),
    "normjax.linen.RMSNorm": dict(call=dict(x=X)),
    "normjax.linen.GroupNorm": dict(fields=dict(num_groups=1), call=dict(x=X)),
    "normjax.linen.InstanceNorm": dict(call=dict(x=X)),
    "normjax.linen.AddLayerNorm": dict(call=dict(x=X, residual=X)),
    "normjax.linen.AddRMSNorm": dict(call=dict(x=X, residual=X)),
    "normjax.linen.FilterResponseNorm": dict(call=dict(x=X)),
    "normjax.linen.DynamicTanh": dict(call=dict(x=X)),
    "normjax.linen.LocalResponseNorm": dict(call=dict(x=X)),
    "normjax.linen.WeightNorm": dict(fields=dict(layer_instance=Inner()), args=(X,)),
    "normjax.linen.SpectralNorm": dict(
        fields=dict(layer_instance=Inner()), args=(X,), call=dict(train=True)
    ),
    "normjax.linen.WeightStandardized": dict(
        fields=dict(layer_instance=Inner(), use_gain=True), args=(X,)
    ),
}

FEATURES = dict(num_features=3)
NNX_MODULES = {
    "normjax.nnx.BatchNorm": dict(fields=FEATURES, call=dict(x=X)),
    "normjax.nnx.BatchNormAct": dict(fields=FEATURES, call=dict(x=X)),
    "normjax.nnx.BatchRenorm": dict(fields=FEATURES, call=dict(x=X)),
    "normjax.nnx.LayerNorm": dict(fields=FEATURES, call=dict(x=X)),
    "normjax.nnx.RMSNorm": dict(fields=FEATURES, call=dict(x=X)),
    "normjax.nnx.GroupNorm": dict(fields=FEATURES | dict(num_groups=1), call=dict(x=X)),
    "normjax.nnx.InstanceNorm": dict(fields=FEATURES, call=dict(x=X)),
    "normjax.nnx.AddLayerNorm": dict(fields=FEATURES, call=dict(x=X, residual=X)),
    "normjax.nnx.AddRMSNorm": dict(fields=FEATURES, call=dict(x=X, residual=X)),
    "normjax.nnx.FilterResponseNorm": dict(fields=FEATURES, call=dict(x=X)),
    "normjax.nnx.DynamicTanh": dict(fields=FEATURES, call=dict(x=X)),
    "normjax.nnx.LocalResponseNorm": dict(fields={}, call=dict(x=X)),
    "normjax.nnx.WeightNorm": dict(fields={}, call=dict(x=X)),
    "normjax.nnx.SpectralNorm": dict(fields={}, call=dict(x=X)),
    "normjax.nnx.WeightStandardized": dict(fields=dict(use_gain=True), args=(X,)),
}
# The values that may be accepted; every function refuses the others.
WHOLE = {"one", "zero", "NumPy whole"}
NUMBER = WHOLE | {"half", "many", "NumPy real"}
SWITCH = {"True", "NumPy bool"}
ARRAY = {"wrong shape", "wrong rank", "complex array", "empty"}
VECTOR = NUMBER | {"None", "negative", "NaN", "infinity"}
COUNT = {"None", "one", "many", "True", "NumPy whole"}
KINDS = {
    "x w residual": ARRAY,
    "scale bias gain threshold mean var": VECTOR,
    "alpha beta": VECTOR - {"None"},
    "epsilon ddof d_max k negative_slope": NUMBER | {"infinity"},
    "r_max": {"one", "many", "infinity", "NumPy whole"},
    "momentum": {"half", "one", "zero", "NumPy whole", "NumPy real", "None"},
    "train debias centered scaled counted accumulate frozen": SWITCH,
    "update_stats use_running_average mask": SWITCH | {"None"},
    "axis feature_axis feature_axes reduction_axes": WHOLE | {"None", "nothing", "empty"},
    "virtual_batch_size num_groups group_size size": COUNT,
    "num_features": set(),
    "n_steps": WHOLE | {"many", "negative", "True"},
    "dtype param_dtype stats axis_index_groups activation": {"None"},
    "axis_name": {"None", "nothing"},
    "shape": WHOLE | {"many", "nothing", "wrong dtype", "empty"},
    "moments batch_moments layer_instance": set(),
    "scale_init bias_init gain_init alpha_init threshold_init": set(),
    "batch_stats": {"dictionary"},
    "collection_name": {"text"},
    "variable_filter": {"None", "nothing", "dictionary", "stats of text", "moments of text"},
}
ACCEPTED = {name: accepted for names, accepted in KINDS.items() for name in names.split()}
# As in Flax, the mask of a module may be any number, and nonzero means True.
NONZERO = VECTOR | SWITCH | {"imaginary", "wrong dtype", "complex array"}


def swept(called, argument, call, values, accepted):
    """Calls once with each value of an argument; returns the faults found."""
    faults = []
    for name in values:
        try:
            call(VALUES[name])
            if name not in accepted:
                faults.append(f"{argument}={name}: accepted")
        except Exception as error:
            if not str(error).startswith(f"{called}:") or argument not in str(error):
                faults.append(f"{argument}={name}: {error!r}")
    return faults


@pytest.mark.parametrize("called", FUNCTIONS)
def test_a_function_refuses_undocumented_values_in_its_own_name(called):
    function, good, faults = resolved(called), FUNCTIONS[called], []

    def sweep():
        function(**good)
        for name in inspect.signature(function).parameters:
            if name != "self":
                call = lambda v, name=name: function(**good | {name: v})  # noqa: E731
                faults.extend(swept(called, name, call, VALUES, ACCEPTED[name]))

    jax.eval_shape(sweep)
    assert not faults


FEW = ["None", "text", "half", "negative", "True", "list", "dictionary", "NumPy text", "dates"]
FEW += ["wrong shape", "complex array"]


@pytest.mark.parametrize("called", MODULES)
def test_a_module_refuses_undocumented_values_in_its_own_name(called):
    kind, good, faults = resolved(called), MODULES[called], []
    inputs, mode = good.get("args", ()), good.get("call", {})

    def run(fields, call):
        module, key = kind(**good.get("fields", {}) | fields), jax.random.key(0)
        variables = module.init(key, *inputs, **mode | call)
        # init does not use all fields.
        module.apply(variables, *inputs, **mode | call, mutable=["batch_stats"])

    def sweep():
        run({}, {})
        for name in kind.__dataclass_fields__:
            # As in Flax, switches take any truth value; Flax itself checks parent and name.
            if not name.startswith(("use_", "force_", "error_")) and name not in ("parent", "name"):
                call = lambda v, name=name: run({name: v}, {})  # noqa: E731
                some = [n for n in FEW if n != "text" or name != "collection_name"]
                faults.extend(swept(called, name, call, some, ACCEPTED[name]))
        for name in set(inspect.signature(kind.__call__).parameters) - {"self", "args", "kwargs"}:
            call = lambda v, name=name: run({}, {name: v})  # noqa: E731
            accepted = NONZERO if name == "mask" else ACCEPTED[name]
            faults.extend(swept(called, name, call, FEW, accepted))

    jax.eval_shape(sweep)
    assert not faults


# As in linen, and what NNX itself checks: metadata, keys, a filter, a function of the user.
UNCHECKED = ("use_", "error_", "promote_", "bias_m", "scale_m", "rngs", "variable_filter")


@pytest.mark.parametrize("called", NNX_MODULES)
def test_an_nnx_module_refuses_undocumented_values_in_its_own_name(called):
    kind, good, faults = resolved(called), NNX_MODULES[called], []
    known = inspect.signature(kind.__init__).parameters
    inputs, mode = good.get("args", ()), good.get("call", {})
    # A wrapper passes its arguments on to its layer.
    given = {"self", "args", "kwargs"} | ({"x"} if "layer_instance" in known else set())

    def run(fields, call):
        made = {"rngs": nnx.Rngs(0)} if "rngs" in known else {}
        if "layer_instance" in known:
            made["layer_instance"] = nnx.Linear(3, 2, rngs=made["rngs"])
        kind(**made | good["fields"] | fields)(*inputs, **mode | call)

    def sweep():
        run({}, {})
        for name in set(known) - {"self"}:
            if not name.startswith(UNCHECKED):
                call = lambda v, name=name: run({name: v}, {})  # noqa: E731
                faults.extend(swept(called, name, call, FEW, ACCEPTED[name]))
        for name in set(inspect.signature(kind.__call__).parameters) - given:
            call = lambda v, name=name: run({}, {name: v})  # noqa: E731
            # With train=None a module uses its own mode.
            accepted = {"mask": NONZERO, "train": SWITCH | {"None"}}.get(name, ACCEPTED[name])
            faults.extend(swept(called, name, call, FEW, accepted))

    jax.eval_shape(sweep)
    assert not faults
