"""Layers that were not measured, batches that are not a sequence, and compiling once."""

import gc
import warnings
import weakref
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from normjax import surgery

pytestmark = pytest.mark.usefixtures("lenient")

EPS = np.finfo(np.float32).eps
X = jnp.asarray(np.random.default_rng(0).normal(2.0, 3.0, (32, 3)), jnp.float32)
TOOLS = [surgery.recompute, surgery.diagnose]


class Dropping(nn.Module):
    """Passes train only to its first norm, like FlaxRegNet; the last norm is optional."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train, head=True, drop=True):
        norm = partial(nn.BatchNorm, axis_name=self.axis_name)
        x = norm(name="first")(x, use_running_average=not train)
        x = norm(name="second")(x, use_running_average=drop or not train)
        return norm(name="head")(x, use_running_average=not train) if head else x


MODEL = Dropping()
FRESH = MODEL.init(jax.random.key(0), X, False)
# With statistics as after training.
TRAINED = {
    **FRESH,
    "batch_stats": {
        name: {"mean": node["mean"] + 0.5, "var": node["var"] * 2}
        for name, node in FRESH["batch_stats"].items()
    },
}


def call_of(apply, **options):
    def call(variables, batch, *, train, mutable=False):
        return apply(variables, batch, train, mutable=mutable, **options)

    return call


def findings(report):
    return {(finding.path, finding.kind) for finding in report.findings if finding.serious}


def test_recompute_guarantee_nothing_left_out():
    taken = []

    def batches():
        for _ in range(3):
            taken.append(1)
            yield X

    message = "1 chosen batch norms were not measured.*'second' ran in evaluation mode.*at="
    with pytest.raises(ValueError, match=message):
        surgery.recompute(call_of(MODEL.apply), TRAINED, batches())
    assert len(taken) == 1, "the error comes after the first batch"
    with pytest.raises(ValueError, match="1 chosen .*'head' did not run"):
        surgery.recompute(call_of(MODEL.apply, head=False, drop=False), TRAINED, [X])
    with pytest.raises(ValueError, match=r"\['second'\] in training mode. Pass train to"):
        surgery.recompute(call_of(MODEL.apply), TRAINED, [X], at="second")
    call = call_of(MODEL.apply)
    new = surgery.recompute(call, TRAINED, [X], at=["first", "head"])["batch_stats"]
    expected = np.asarray(X, np.float64).mean(0)
    np.testing.assert_allclose(new["first"]["mean"], expected, rtol=8 * EPS)
    assert new["second"] is TRAINED["batch_stats"]["second"]


def test_recompute_with_a_head_that_runs_in_some_batches():
    """A layer that did not run in the first batch may run in a later one."""

    def call(variables, batch, *, train, mutable=False):
        options = dict(head=batch.shape[0] == 16, drop=False, mutable=mutable)
        return MODEL.apply(variables, batch, train, **options)

    new = surgery.recompute(call, TRAINED, [X[:8], X[:16]])["batch_stats"]
    assert not np.array_equal(new["head"]["mean"], TRAINED["batch_stats"]["head"]["mean"])


def test_diagnose_edge_layer_that_was_not_measured():
    call = call_of(partial(MODEL.apply, head=False))
    report = surgery.diagnose(call, TRAINED, [X])
    assert [norm.path for norm in report.norms] == ["first"]
    unmeasured = {("second", "not measured"), ("head", "not measured")}
    assert unmeasured <= findings(report)
    assert "second: the layer ran in evaluation mode" in str(report)
    assert "NOT MEASURED" in str(report)
    # Initial statistics are found even if the layer did not run.
    report = surgery.diagnose(call, FRESH, [X])
    assert {(path, "never updated") for path in ("first", "second", "head")} <= findings(report)
    assert not {path for path, _ in findings(surgery.diagnose(call, FRESH, [X], at="first"))} - {
        "first"
    }
    # No layer ran in training mode.
    report = surgery.diagnose(call, FRESH, [X], at="second")
    assert findings(report) == {("second", "not measured"), ("second", "never updated")}


def test_a_layer_with_every_entry_masked_was_not_measured():
    class Masked(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.BatchNorm(use_running_average=not train, name="seen")(x)
            mask = jnp.zeros(x.shape, bool)
            return nn.BatchNorm(use_running_average=not train, name="masked")(x, mask=mask)

    variables = jax.tree.map(lambda leaf: leaf + 0.5, Masked().init(jax.random.key(0), X, False))
    report = surgery.diagnose(call_of(Masked().apply), variables, [X])
    assert "masked: the layer had every entry masked" in str(report)


def test_diagnose_edge_layer_that_is_frozen_inside_call():
    call = call_of(surgery.freeze(MODEL.apply, at=["second", "head"]))
    report = surgery.diagnose(call, TRAINED, [X])
    assert {finding.path for finding in report.findings} <= {"first"}
    report = surgery.diagnose(call, FRESH, [X])
    assert ("head", "never updated") in findings(report)
    assert ("head", "not measured") not in findings(report)


@pytest.mark.parametrize("stacked", [False, True])
def test_recompute_guarantee_unbound_axis(stacked):
    """The ResNet of Flax's ImageNet example names an axis in its code."""
    model = Dropping(axis_name="batch")
    call = call_of(model.apply, drop=False)
    new = surgery.recompute(call, TRAINED, [X[:8], X[8:]], at="first")["batch_stats"]["first"]
    expected = np.asarray(X, np.float64)
    np.testing.assert_allclose(new["mean"], expected.mean(0), rtol=8 * EPS)
    np.testing.assert_allclose(new["var"], expected.var(0), rtol=8 * EPS)
    variables = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), TRAINED) if stacked else TRAINED
    report = surgery.diagnose(call, variables, [X])
    assert [norm.path for norm in report.norms] == ["first", "second", "head"]


@pytest.mark.parametrize("tool", TOOLS)
def test_one_batch_in_place_of_several_is_an_error(tool):
    call = call_of(MODEL.apply, drop=False)
    cases = {
        r"an array of shape \(32, 3\).* rows one by one": X,
        r"an array of shape \(32, 3\)": np.asarray(X),
        "a dict, .* its keys": {"image": X},
        "a tuple, .*it may be one batch": (X, X),
        "'images', .* its characters": "images",
    }
    for message, batches in cases.items():
        with pytest.raises(
            TypeError, match=f"{tool.__name__}: batches is {message}" + r".*\[batch"
        ):
            tool(call, TRAINED, batches)


@pytest.mark.parametrize("tool", TOOLS)
def test_error_messages_of_unsuitable_batches(tool):
    call = call_of(MODEL.apply, drop=False)
    labels = jnp.zeros(32, jnp.int32)
    for batch, kind in (((X, labels), "tuple"), ({"image": X, "label": labels}, "dict")):
        message = rf"{tool.__name__}: call does not take batch 0 .*a {kind} of the shapes"
        with pytest.raises(TypeError, match=message + r".*images for images, labels in batches"):
            tool(call, TRAINED, [batch])
    torch = pytest.importorskip("torch")
    for batch in (torch.zeros(4, 3), (np.zeros((4, 3)), ["a"])):
        with pytest.raises(TypeError, match=r"batch 0 .* holds a (torch.Tensor|builtins.str)"):
            tool(call, TRAINED, [batch])
    spent = iter([X])
    list(spent)
    with pytest.raises(ValueError, match=f"{tool.__name__}: the batches are empty"):
        tool(call, TRAINED, spent)


def counting(model, traces):
    def call(variables, batch, *, train, mutable=False):
        traces.append(train)
        return model.apply(variables, batch, train, drop=False, mutable=mutable)

    return call


@pytest.mark.parametrize("tool", TOOLS)
def test_recompute_guarantee_compiled_once(tool):
    traces = []
    call = counting(MODEL, traces)
    first = tool(call, TRAINED, [X])
    before = len(traces)
    again = tool(call, FRESH, [X, X])
    # The report traces shapes each time, but does not compile again.
    assert len(traces) - before <= (2 if tool is surgery.diagnose else 0)
    if tool is surgery.recompute:
        jax.tree.map(partial(np.testing.assert_allclose, atol=8 * EPS), first, again)

    alive = weakref.ref(call)
    del call
    gc.collect()
    assert alive() is None, "a compiled function must not keep the call alive"


def test_the_apply_of_a_model_is_compiled_once():
    traces = []

    class Counted(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            traces.append(train)
            return nn.BatchNorm(use_running_average=not train)(x)

    model = Counted()
    variables = model.init(jax.random.key(0), X, False)
    surgery.recompute(model.apply, variables, [X])
    before = len(traces)
    surgery.recompute(model.apply, variables, [X])
    assert len(traces) == before
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_a_trace_is_not_used_once_the_call_reads_another_model():
    """As in a notebook, where `model` is redefined and `call` is not."""
    model = Dropping()

    def inner(variables, batch, train, mutable):
        return model.apply(variables, batch, train, drop=False, mutable=mutable)

    def call(variables, batch, *, train, mutable=False):
        return inner(variables, batch, train, mutable)

    plain = surgery.recompute(call, TRAINED, [X])["batch_stats"]["second"]["var"]

    class Tripled(Dropping):
        @nn.compact
        def __call__(self, x, train, head=True, drop=True):
            x = 3 * nn.BatchNorm(name="first")(x, use_running_average=not train)
            x = nn.BatchNorm(name="second")(x, use_running_average=not train)
            return nn.BatchNorm(name="head")(x, use_running_average=not train)

    model = Tripled()
    tripled = surgery.recompute(call, TRAINED, [X])["batch_stats"]["second"]["var"]
    np.testing.assert_allclose(tripled, 9 * plain, rtol=1e-4)


def test_diagnose_emits_no_warning():
    """Constant images, layers that overflow, and unusable statistics."""
    images = jnp.broadcast_to(X[:8, None, :], (8, 4, 3))
    layer = nn.BatchNorm()
    variables = layer.init(jax.random.key(0), images, True)

    def call(variables, batch, *, train, mutable=False):
        return layer.apply(variables, batch, not train, mutable=mutable)

    # All images have the same mean, but the positions within an image differ.
    swapped = jnp.tile(jnp.array([[-1.0], [1.0]]), (8, 2, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in (images, swapped, images * 0, images * 1e15):
            for mean, var in ((0.0, 1.0), (np.inf, np.nan), (3e38, 0.0), (-3e38, -1.0)):
                filled = {"mean": jnp.full(3, mean), "var": jnp.full(3, var)}
                report = surgery.diagnose(call, {**variables, "batch_stats": filled}, [batch])
                assert np.isfinite(report.norms[0].samples)
                assert str(report)
