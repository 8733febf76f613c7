"""Common mistakes: arguments of PyTorch, a mode by position. The errors say what to do."""

import inspect
import pickle

import flax.linen as nn
import jax
import numpy as np
import pytest

import normjax.linen
from normjax.linen import BatchNorm, BatchNormAct, BatchRenorm, ImmutableBatchStatsError

X = np.arange(6, dtype=np.float32).reshape(2, 3)
KEY = jax.random.key(0)
CLASSES = [
    getattr(normjax.linen, name)
    for name in normjax.linen.__all__
    if isinstance(getattr(normjax.linen, name), type) and not name.endswith("Error")
]
FUNCTIONS = [
    getattr(normjax, name)
    for name in normjax.__all__
    if inspect.isfunction(getattr(normjax, name))
    and "epsilon" in inspect.signature(getattr(normjax, name)).parameters
]


@pytest.mark.parametrize("function", CLASSES + FUNCTIONS, ids=lambda function: function.__name__)
def test_eps_of_pytorch_is_called_epsilon(function):
    module = "normjax.linen" if isinstance(function, type) else "normjax"
    with pytest.raises(TypeError, match=r"eps=1e-05.*it is called epsilon.*Pass epsilon=") as error:
        function(eps=1e-5)
    assert str(error.value).startswith(f"{module}.{function.__name__}: ")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("BatchNorm", {"num_features": 64}),
        ("GroupNorm", {"num_channels": 64}),
        ("LayerNorm", {"normalized_shape": 64}),
    ],
)
def test_no_features_are_needed(name, options):
    with pytest.raises(TypeError, match=r"=64, an argument of PyTorch; no features needed.*input"):
        getattr(normjax.linen, name)(**options)


@pytest.mark.parametrize(
    ("name", "first"), [("BatchNorm", "use_running_average"), ("LayerNorm", "epsilon")]
)
def test_no_features_are_needed_by_position(name, first):
    """Flax reads the 64 of LayerNorm(64) as epsilon."""
    with pytest.raises(TypeError, match=f"got 64 as the first argument, which is {first}; no feat"):
        getattr(normjax.linen, name)(64)


def test_a_constructor_is_otherwise_that_of_flax():
    assert normjax.linen.GroupNorm(8).num_groups == 8
    assert normjax.linen.BatchNorm(True, 1, 0.9).axis == 1
    for name in ("BatchNorm", "LayerNorm"):
        ours, flax = getattr(normjax.linen, name), getattr(nn, name)
        wanted = list(inspect.signature(flax).parameters)
        found = inspect.signature(ours).parameters
        assert [name for name in found if name in wanted] == wanted
        assert ours(epsilon=0.5).clone(epsilon=0.25) == ours(epsilon=0.25)
        with pytest.raises(TypeError, match="unexpected keyword argument 'gamma'"):
            ours(gamma=1)
    layer = normjax.linen.LayerNorm(epsilon=0.5)
    assert pickle.loads(pickle.dumps(layer)) == layer
    assert pickle.loads(pickle.dumps(normjax.layer_norm)) is normjax.layer_norm


def raised(kind, module, *args, x=X, **options):
    variables = BatchNorm().init(KEY, X, train=True)
    with pytest.raises(kind) as error:
        module.apply(variables, x, *args, **options)
    return str(error.value)


@pytest.mark.parametrize("cls", [BatchNorm, BatchNormAct, BatchRenorm])
def test_a_mode_by_position_is_that_of_flax_and_errors_say_so(cls):
    """`layer(x, train)` with train=False trains, as in Flax: the error in evaluation says why."""
    message = raised(ImmutableBatchStatsError, cls(), False)
    assert f"normjax.linen.{cls.__name__} at '/': use_running_average=False updates the" in message
    assert "train=True" not in message
    assert "or pass use_running_average=True. A mode passed by position is use_run" in message
    assert "A mode passed by position is use_running_average" in raised(ValueError, cls())
    assert "A mode passed by position" in raised(ValueError, cls(), False, train=False)


def test_errors_name_the_mode_as_the_caller_did():
    at_call = raised(ImmutableBatchStatsError, BatchNorm(), train=True)
    assert "'/': train=True updates" in at_call
    assert at_call.endswith("or pass train=False.")
    field = raised(ImmutableBatchStatsError, BatchNorm(use_running_average=False))
    assert "'/': use_running_average=False (at construction) updates" in field
    assert field.endswith("or construct it with use_running_average=True.")
    for mode, names in (
        (dict(train=True), ("with train=True", "or pass train=False.")),
        (
            dict(use_running_average=False),
            ("with use_running_average=False", "pass use_running_average=True."),
        ),
    ):
        message = raised(ValueError, BatchNorm(), x=X[:1], mutable=["batch_stats"], **mode)
        assert message.startswith("normjax.linen.BatchNorm: x with shape (1, 3) has one value")
        assert all(name in message for name in names)
