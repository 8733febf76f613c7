"""PyTorch's state dicts: import, export, equal bits, and equal outputs of the twin."""

import builtins

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normjax.linen
from normjax import surgery

KEY = jax.random.key(0)


def shapes(model, x, **options):
    return jax.eval_shape(lambda: model.init(KEY, jnp.asarray(x), **options))


def same_bits(got, want):
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert got[name].dtype == array.dtype, name
        assert got[name].shape == array.shape, name
        assert got[name].flags.c_contiguous, name
        assert got[name].tobytes() == np.ascontiguousarray(array).tobytes(), name


RESNET = surgery.torchvision_rules("resnet")
BATCH_NORM = {"momentum": 0.9, "epsilon": 1e-5, "ddof": 1}


class Block(nn.Module):
    features: int
    stride: int
    norm: dict

    @nn.compact
    def __call__(self, x, train):
        def conv(name, size, stride):
            pad = [(size // 2, size // 2)] * 2
            return nn.Conv(self.features, (size, size), stride, pad, use_bias=False, name=name)

        def norm(name):
            return normjax.linen.BatchNorm(**self.norm, name=name)

        y = nn.relu(norm("bn1")(conv("conv1", 3, self.stride)(x), train=train))
        y = norm("bn2")(conv("conv2", 3, 1)(y), train=train)
        if self.stride > 1:
            x = conv("downsample_0", 1, self.stride)(x)
            x = norm("downsample_1")(x, train=train)
        return nn.relu(x + y)


class ResNet(nn.Module):
    norm: dict

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (7, 7), 2, [(3, 3)] * 2, use_bias=False, name="conv1")(x)
        x = nn.relu(normjax.linen.BatchNorm(**self.norm, name="bn1")(x, train=train))
        x = nn.max_pool(x, (3, 3), (2, 2), [(1, 1)] * 2)
        for i, features in enumerate((4, 6)):
            x = Block(features, 1 + (i > 0), self.norm, name=f"layer{i + 1}_0")(x, train)
        return nn.Dense(5, name="fc")(x.mean((1, 2)))


def torch_resnet(torch):
    class BasicBlock(torch.nn.Module):
        def __init__(self, before, features, stride):
            super().__init__()
            pairs = (before, features, stride), (features, features, 1)
            for k, (n_in, n_out, step) in enumerate(pairs, 1):
                conv = torch.nn.Conv2d(n_in, n_out, 3, step, 1, bias=False)
                setattr(self, f"conv{k}", conv)
                setattr(self, f"bn{k}", torch.nn.BatchNorm2d(n_out))
            self.downsample = torch.nn.Identity()
            if stride > 1:
                self.downsample = torch.nn.Sequential(
                    torch.nn.Conv2d(before, features, 1, stride, bias=False),
                    torch.nn.BatchNorm2d(features),
                )

        def forward(self, x):
            y = torch.relu(self.bn1(self.conv1(x)))
            return torch.relu(self.bn2(self.conv2(y)) + self.downsample(x))

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = torch.nn.Conv2d(3, 4, 7, 2, 3, bias=False)
            self.bn1 = torch.nn.BatchNorm2d(4)
            self.maxpool = torch.nn.MaxPool2d(3, 2, 1)
            self.layer1 = torch.nn.Sequential(BasicBlock(4, 4, 1))
            self.layer2 = torch.nn.Sequential(BasicBlock(4, 6, 2))
            self.fc = torch.nn.Linear(6, 5)

        def forward(self, x):
            x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
            return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))

    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="PyTorch is not installed")


def draw(torch, module, *size):
    """A module that has been trained for a few steps, and its input."""
    x = torch.randn(*size, generator=torch.Generator().manual_seed(1)) * 2 + 1
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
        for _ in range(3):
            module(x)
    return x


def channels_last(x):
    return np.moveaxis(x.detach().numpy(), 1, -1)


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_a_resnet_of_torchvision(torch):
    net = torch_resnet(torch).train()
    x = draw(torch, net, 4, 3, 16, 16)
    model = ResNet(surgery.torch_fields(net.bn1))
    images = channels_last(x)
    variables = surgery.import_torch(shapes(model, images), net.state_dict(), RESNET)
    # One more step in both, which updates the statistics, and then an evaluation.
    apply = jax.jit(model.apply, static_argnames=("train", "mutable"))
    y, moved = apply(variables, images, train=True, mutable=("batch_stats",))
    close(y, net(x).detach().numpy())
    state = surgery.export_torch({**variables, **moved}, RESNET)
    for name, tensor in net.state_dict().items():
        if name.endswith(("running_mean", "running_var")):
            close(state[name], tensor.numpy())
    want = net.eval()(x).detach().numpy()
    close(apply({**variables, **moved}, images, train=False), want)


def test_import_torch_guarantee_identity(torch):
    state = torch_resnet(torch).state_dict()
    variables = surgery.import_torch(
        shapes(ResNet(BATCH_NORM), np.ones((1, 16, 16, 3))), state, RESNET
    )
    want = {k: v.numpy() for k, v in state.items() if not k.endswith("num_batches_tracked")}
    same_bits(surgery.export_torch(variables, RESNET), want)


def test_export_torch_guarantee_identity(torch):
    model = ResNet({**BATCH_NORM, "debias": True})
    rng = np.random.default_rng(0)
    template = shapes(model, np.ones((1, 16, 16, 3), np.float32))
    variables = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(s.dtype), template)
    whole = jax.tree_util.tree_map_with_path(
        lambda path, a: np.full_like(a, 7) if path[-1].key == "count" else a, variables
    )
    state = surgery.export_torch(whole, RESNET)
    back = surgery.import_torch(template, state, RESNET)
    jax.tree.map(np.testing.assert_array_equal, back, whole)
    # PyTorch loads the result.
    tensors = {name: torch.from_numpy(array) for name, array in state.items()}
    torch_resnet(torch).load_state_dict(tensors)


class Twin(nn.Module):
    fields: dict

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3), padding="VALID", feature_group_count=3, kernel_dilation=2)(x)
        x = normjax.linen.GroupNorm(**self.fields["1"])(x)
        x = nn.ConvTranspose(4, (3, 2), (2, 2), "VALID")(x)
        x = normjax.linen.InstanceNorm(**self.fields["3"])(x)
        x = normjax.linen.BatchNorm(**self.fields["4"])(x, train=False)
        x = nn.Dense(5)(jnp.moveaxis(x, -1, 1))
        x = normjax.linen.LayerNorm(**self.fields["6"])(x)
        return normjax.linen.RMSNorm(**self.fields["7"])(x)


TWIN = [
    ("Conv_0", "0", "conv"),
    ("GroupNorm_0", "1", "group_norm"),
    ("ConvTranspose_0", "2", "conv_transpose"),
    ("InstanceNorm_0", "3", "instance_norm"),
    ("BatchNorm_0", "4", "batch_norm"),
    ("Dense_0", "5", "linear"),
    ("LayerNorm_0", "6", "layer_norm"),
    ("RMSNorm_0", "7", "rms_norm"),
]


def torch_twin(torch):
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3, groups=3, dilation=2),
        torch.nn.GroupNorm(2, 6),
        torch.nn.ConvTranspose2d(6, 4, (3, 2), 2),
        torch.nn.InstanceNorm2d(4, affine=True, eps=1e-3),
        torch.nn.BatchNorm2d(4),
        torch.nn.Linear(8, 5),
        torch.nn.LayerNorm((9, 5)),
        torch.nn.RMSNorm(5),
    )


def test_every_kind_agrees_with_pytorch(torch):
    net = torch_twin(torch)
    x = draw(torch, net, 2, 3, 8, 8)
    net.eval()
    fields = {
        name: surgery.torch_fields(m) for name, m in net.named_modules() if name in "13467" and name
    }
    model, images = Twin(fields), channels_last(x)
    state = net.state_dict()
    variables = surgery.import_torch(shapes(model, images), state, TWIN)
    close(jax.jit(model.apply)(variables, images), net(x).detach().numpy())
    want = {k: v.numpy() for k, v in state.items() if not k.endswith("num_batches_tracked")}
    same_bits(surgery.export_torch(variables, TWIN), want)


DENSE = [("{name}", "{name}", "linear")]
HEAD = {"params": {"a": {"kernel": np.zeros((2, 3)), "bias": np.zeros(3)}}}
STATE = {"a.weight": np.ones((3, 2)), "a.bias": np.ones(3)}


def test_import_torch_guarantee_all_or_nothing():
    filled = surgery.import_torch(HEAD, STATE, DENSE)
    assert all((leaf == 1).all() for leaf in jax.tree.leaves(filled))
    assert not any(leaf.any() for leaf in jax.tree.leaves(HEAD))
    for broken in (
        {"a.weight": STATE["a.weight"]},
        {**STATE, "b.weight": np.ones(2)},
        {**STATE, "a.bias": np.ones(4)},
        {**STATE, "a.weight": np.ones(3)},
    ):
        with pytest.raises(ValueError, match=r"(?s)surgery.import_torch: .* Nothing was changed"):
            surgery.import_torch(HEAD, broken, DENSE)
    assert not any(leaf.any() for leaf in jax.tree.leaves(HEAD))


def test_no_memory_is_shared_with_the_state(torch):
    tensors = {name: torch.from_numpy(array.copy()) for name, array in STATE.items()}
    arrays = {name: array.copy() for name, array in STATE.items()}
    for state in (tensors, arrays):
        filled = surgery.import_torch(HEAD, state, DENSE)
        for entry in state.values():
            entry[:] = 5
        assert all((leaf == 1).all() for leaf in jax.tree.leaves(filled))


def message(function, *args, error=ValueError):
    with pytest.raises(error) as caught:
        function(*args)
    return str(caught.value)


def test_missing_and_left_over_names_are_listed_together():
    text = message(surgery.import_torch, HEAD, {"a.weights": 1, "a.bias": np.ones(4)}, DENSE)
    assert "missing in the state: a.weight (for params/a/kernel)" in text
    assert "left over in it: a.weights" in text
    assert "of other shapes: a.bias gives (4,) for params/a/bias of (3,)" in text


def test_rules_that_do_not_fit():
    rules = [("a", "a", "linear"), ("b{i}", "b", "conv")]
    text = message(surgery.import_torch, HEAD, STATE, rules)
    assert "rules that match nothing: ('b{i}', 'b', 'conv')" in text
    assert text.endswith("The modules are: 'a'.")
    text = message(surgery.export_torch, HEAD, [("a", "a", "embedding")])
    assert "variables without a rule: params/a/bias, params/a/kernel" in text
    text = message(surgery.export_torch, HEAD, [("a", "a", "lstm")])
    assert "has kind 'lstm', expected one of linear, conv" in text
    two = {"params": {"a": HEAD["params"]["a"], "b": HEAD["params"]["a"]}}
    text = message(surgery.export_torch, two, [("{x}", "fc", "linear")])
    assert "names given twice: fc.bias, fc.weight" in text
    text = message(surgery.export_torch, HEAD, [("a", "a{i}", "linear")])
    assert "asks for {i}, which 'a' does not have" in text
    text = message(surgery.export_torch, HEAD, [("{i}", "{i+1}", "linear")])
    assert "asks for {i+1}, and i='a'" in text


def test_patterns():
    variables = {"params": {"up_0": {"Conv_2": {"bias": np.ones(1)}}}}
    got = surgery.export_torch(variables, [("{side}_{i}/Conv_{k}", "{i}.{side}.c{k-2}", "conv")])
    assert list(got) == ["0.up.c0.bias"]
    rules = [("{0}_{1}/Conv_{2}", "{1}.{0}.c{2-2}", "conv")]
    assert list(surgery.export_torch(variables, rules)) == ["0.up.c0.bias"]
    twice = {"params": {"a_1": {"b_1": {"bias": np.ones(1)}}}}
    assert list(surgery.export_torch(twice, [("a_{i}/b_{i}", "c{i}", "conv")])) == ["c1.bias"]
    assert list(surgery.export_torch({"params": {"bias": np.ones(1)}}, [("", "", "conv")])) == [
        "bias"
    ]


def test_variables_with_partitioning():
    model = nn.Dense(3, kernel_init=nn.with_partitioning(nn.initializers.zeros, ("x", None)))
    boxed = shapes(model, np.ones((1, 2)))
    state = {"weight": STATE["a.weight"], "bias": STATE["a.bias"]}
    filled = surgery.import_torch(boxed, state, [("", "", "linear")])
    assert filled["params"]["kernel"].names == ("x", None)
    same_bits(surgery.export_torch(filled, [("", "", "linear")]), state)


def test_import_torch_edge_num_batches_tracked():
    rules = [("", "", "batch_norm")]
    vector = np.ones(3, np.float32)
    stats = {"mean": vector, "var": vector}
    params = {"scale": vector, "bias": vector}
    state = {"running_mean": vector, "running_var": vector, "weight": vector, "bias": vector}
    tracked = {**state, "num_batches_tracked": np.asarray(7)}
    plain = {"params": params, "batch_stats": stats}
    assert "count" not in surgery.import_torch(plain, tracked, rules)["batch_stats"]
    counted = {"params": params, "batch_stats": {**stats, "count": vector}}
    filled = surgery.import_torch(counted, tracked, rules)
    np.testing.assert_array_equal(filled["batch_stats"]["count"], np.full(3, 7, np.float32))
    same_bits(surgery.export_torch(filled, rules), tracked)


def test_import_torch_edge_bfloat16(torch, tmp_path):
    tensors = {"a.weight": torch.ones(3, 2).bfloat16() / 3, "a.bias": torch.ones(3).bfloat16()}
    filled = surgery.import_torch(HEAD, tensors, DENSE)
    assert {leaf.dtype for leaf in jax.tree.leaves(filled)} == {jnp.bfloat16.dtype}
    np.testing.assert_array_equal(
        filled["params"]["a"]["kernel"], np.full((2, 3), 1 / 3, jnp.bfloat16)
    )
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    of_file = surgery.import_torch(HEAD, tmp_path / "model.safetensors", DENSE)
    jax.tree.map(np.testing.assert_array_equal, of_file, filled)


def test_import_torch_edge_a_rule_of_kind_keep():
    variables = {"params": {"a": HEAD["params"]["a"], "new": {"kernel": np.full((9, 9), 5.0)}}}
    state = {**STATE, "old.weight": np.ones(7)}
    rules = [("a", "a", "linear"), ("new", "old", "keep")]
    filled = surgery.import_torch(variables, state, rules)
    assert (filled["params"]["new"]["kernel"] == 5).all()
    assert (filled["params"]["a"]["kernel"] == 1).all()
    assert set(surgery.export_torch(filled, rules)) == set(STATE)


def test_export_torch_edge_no_batch_stats_count(torch):
    norm = torch.nn.BatchNorm1d(2)
    model = normjax.linen.BatchNorm()
    variables = model.init(KEY, jnp.ones((2, 2)), train=False)
    state = surgery.export_torch(variables, [("", "", "batch_norm")])
    assert "num_batches_tracked" not in state
    norm.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})


def test_a_safetensors_file_round_trips(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    path = str(tmp_path / "model.safetensors")
    state = surgery.export_torch(HEAD, DENSE)
    safetensors.save_file(state, path)
    same_bits(surgery.export_torch(surgery.import_torch(HEAD, path, DENSE), DENSE), state)


def test_a_pickle_is_never_read(torch, tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"a.weight": torch.ones(3, 2)}, path)
    text = message(surgery.import_torch, HEAD, path, DENSE)
    assert "is not a safetensors file but a pickle of PyTorch" in text
    assert "Pass torch.load(path, weights_only=True)" in text
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    path.write_bytes(b"no header at all")
    assert "but something else" in message(surgery.import_torch, HEAD, path, DENSE)
    missing = tmp_path / "no.safetensors"
    text = message(surgery.import_torch, HEAD, missing, DENSE, error=FileNotFoundError)
    assert "surgery.import_torch: " in text


def test_a_path_without_safetensors_is_an_error(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("safetensors"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    text = message(surgery.import_torch, HEAD, "model.safetensors", DENSE, error=ImportError)
    assert "pip install 'normjax[safetensors]'" in text


def test_other_kinds_of_input_are_errors(torch):
    text = message(surgery.import_torch, HEAD, torch.nn.Linear(2, 3), DENSE, error=TypeError)
    assert "state is Linear, expected a mapping" in text
    assert text.endswith("Pass model.state_dict().")
    text = message(surgery.import_torch, nn.Dense(3), STATE, DENSE, error=TypeError)
    assert "variables is Dense, expected the collections of a Flax model" in text
    text = message(surgery.import_torch, HEAD["params"], STATE, DENSE)
    assert text.endswith("Pass all that model.init returns, 'params' included.")
    for rules, got in (
        ({"a": "a"}, "rules is dict, expected a list of rules"),
        ("a", "rules is str, expected a list"),
        (None, "rules is NoneType, expected a list"),
        (DENSE[0], "rules holds '{name}', expected three strings"),
        ([("a", "a")], "rules holds ('a', 'a'), expected three strings"),
        ([("a", "a", None)], "rules holds ('a', 'a', None), expected three strings"),
    ):
        assert got in message(surgery.import_torch, HEAD, STATE, rules, error=TypeError)
        assert got in message(surgery.export_torch, HEAD, rules, error=TypeError)
    filled = surgery.import_torch(HEAD, STATE, (rule for rule in DENSE))
    assert (filled["params"]["a"]["bias"] == 1).all()
    text = message(surgery.import_torch, HEAD, {**STATE, "a.bias": "ones"}, DENSE)
    assert "no arrays: a.bias is str" in text
    for value in ([[1], [1, 2]], None, {"a": 1}, torch.empty(3, device="meta")):
        text = message(surgery.import_torch, HEAD, {**STATE, "a.bias": value}, DENSE)
        assert f"no arrays: a.bias is {type(value).__name__}\n" in text
    abstract = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, HEAD))
    assert "params/a/bias is ShapeDtypeStruct" in message(surgery.export_torch, abstract, DENSE)


def test_long_errors_are_abbreviated():
    layers = {f"a{i}": {"bias": np.zeros(1)} for i in range(70)}
    state = {f"b{i}.bias": np.zeros(1) for i in range(60)}
    text = message(surgery.import_torch, {"params": layers}, state, DENSE)
    assert text.count("(for params/") == 5
    assert "(for params/a12/bias), ... (70 in all)" in text
    assert "b3.bias, b4.bias, ... (60 in all)" in text
    assert len(text) < 600
    text = message(surgery.export_torch, {"params": layers}, [("c", "c", "linear")])
    assert text.endswith("The modules are: 'a*'.")


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        (
            lambda state: {f"module.{name}": array for name, array in state.items()},
            "in state, where they begin with 'module.': pass "
            "{name.removeprefix('module.'): array for name, array in state.items()}",
        ),
        (
            lambda state: {"epoch": 3, "state_dict": state},
            "in state['state_dict']: pass state['state_dict']",
        ),
        (
            lambda state: {"model": {f"net.{k}": v for k, v in state.items()}, "optimizer": {}},
            "in state['model'], where they begin with 'net.': pass "
            "{name.removeprefix('net.'): array for name, array in state['model'].items()}",
        ),
        (
            lambda state: {name.removeprefix("a."): array for name, array in state.items()},
            "in state, where they lack 'a.': pass {'a.' + name: array for name",
        ),
    ],
    ids=["prefix", "level", "both", "shorter"],
)
def test_usual_causes_of_missing_names_are_found(change, hint):
    text = message(surgery.import_torch, HEAD, change(STATE), DENSE)
    assert f"2 of the 2 missing names are {hint}" in text
    assert "missing names are" not in message(surgery.import_torch, HEAD, {"b": 1}, DENSE)


def test_torch_fields_guarantee_acts_alike(torch):
    """Here the fields. The tests of the ResNet use those of its norms."""
    got = surgery.torch_fields(torch.nn.BatchNorm2d(3, momentum=0.25, eps=1e-3))
    assert got == {
        "momentum": 0.75, "ddof": 1, "epsilon": 1e-3, "use_scale": True, "use_bias": True
    }  # fmt: skip
    assert surgery.torch_fields(torch.nn.SyncBatchNorm(3))["ddof"] == 1
    normjax.linen.BatchNorm(**got)
    got = surgery.torch_fields(torch.nn.LayerNorm((4, 3), bias=False))
    assert (got["reduction_axes"], got["use_bias"]) == ((-2, -1), False)


def test_torch_fields_edge_momentum_none(torch):
    assert surgery.torch_fields(torch.nn.BatchNorm1d(3, momentum=None))["momentum"] is None


def test_torch_fields_edge_affine_false(torch):
    for norm in (torch.nn.BatchNorm1d(3, affine=False), torch.nn.GroupNorm(1, 3, affine=False)):
        fields = surgery.torch_fields(norm)
        assert (fields["use_scale"], fields["use_bias"]) == (False, False)


def test_torch_fields_edge_rmsnorm_with_eps_none(torch):
    got = surgery.torch_fields(torch.nn.RMSNorm(3))
    assert got["epsilon"] == torch.finfo(torch.float32).eps
    assert "use_bias" not in got


def test_torch_fields_edge_a_subclass(torch):
    class BatchNormAct2d(torch.nn.BatchNorm2d):  # as timm's
        pass

    class OfAnotherLibrary(torch.nn.modules.batchnorm._BatchNorm):  # as apex's
        pass

    for kind in (BatchNormAct2d, OfAnotherLibrary):
        want = surgery.torch_fields(torch.nn.BatchNorm2d(3, eps=1e-3))
        assert surgery.torch_fields(kind(3, eps=1e-3)) == want
    layer_norm = type("LayerNorm2d", (torch.nn.LayerNorm,), {})(3)
    assert surgery.torch_fields(layer_norm)["feature_axes"] == (-1,)


def test_norms_with_a_different_evaluation_are_errors(torch):
    norm = torch.nn.BatchNorm1d(3, track_running_stats=False)
    text = message(surgery.torch_fields, norm)
    assert "BatchNorm1d with track_running_stats=False, expected True" in text
    norm = torch.nn.InstanceNorm1d(3, track_running_stats=True)
    text = message(surgery.torch_fields, norm)
    assert "InstanceNorm1d with track_running_stats=True, expected False" in text

    class RMSNorm(torch.nn.Module):  # not PyTorch's
        weight, eps = None, 1e-6

    text = message(surgery.torch_fields, RMSNorm(), error=TypeError)
    assert "lacks a field of RMSNorm of torch.nn" in text


def test_a_module_that_is_not_a_norm_is_an_error(torch):
    text = message(surgery.torch_fields, torch.nn.Linear(2, 3), error=TypeError)
    assert "module is Linear, expected a BatchNorm" in text
