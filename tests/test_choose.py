"""choose_normalization: recommendations, their reasons, and that names and pages exist."""

import inspect
import itertools
from pathlib import Path

import pytest

import normjax
from normjax import choose_normalization
from normjax._choose import ARCHITECTURES, TASKS

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize(
    ("task", "architecture", "batch_size", "num_devices", "name"),
    [
        ("classification", "resnet", 32, 1, "batch_norm"),
        ("classification", "mlp", 16, 1, "batch_norm"),
        ("classification", "mlp", 15, 1, "layer_norm"),
        ("detection", "resnet", 2, 1, "group_norm"),
        ("segmentation", "cnn", 4, 2, "group_norm"),
        ("classification", "convnext", 64, 1, "layer_norm"),
        ("language_modeling", "transformer", 8, 8, "rms_norm"),
        ("translation", "transformer", 8, 8, "layer_norm"),
        ("speech", "rnn", 64, 1, "layer_norm"),
        ("image_generation", "unet", 4, 8, "group_norm"),
        ("segmentation", "unet", 32, 1, "group_norm"),
        ("style_transfer", "cnn", 1, 1, "instance_norm"),
        ("adversarial", "resnet", 64, 1, "spectral_norm"),
        ("reinforcement_learning", "mlp", 256, 1, "layer_norm"),
    ],
)
def test_the_norm_that_the_literature_uses(task, architecture, batch_size, num_devices, name):
    choice = choose_normalization(task, batch_size, architecture, num_devices=num_devices)
    assert choice.name == name


def test_the_batch_of_all_devices_counts():
    alone = choose_normalization("detection", 4, "resnet")
    together = choose_normalization("detection", 4, "resnet", num_devices=4)
    assert alone.name == "group_norm"
    assert (together.name, together.options) == ("batch_norm", {"axis_name": "batch"})
    assert "4 devices that share statistics have 16" in together.reason


def test_choose_normalization_guarantee_known_functions():
    sizes = ((1, 1), (4, 8), (64, 1))
    for task, architecture, (size, devices) in itertools.product(TASKS, ARCHITECTURES, sizes):
        choice = choose_normalization(task, size, architecture, num_devices=devices)
        known = inspect.signature(getattr(normjax, choice.name)).parameters
        assert choice.options.keys() <= known.keys()
        assert choice.reason.endswith(".")
        assert (DOCS / f"{choice.evidence}.md").exists()


def test_the_known_names_are_listed_in_the_docstring_and_on_the_page():
    page = (DOCS / "which_norm.md").read_text()
    for name in (*TASKS, *ARCHITECTURES):
        assert f'"{name}"' in choose_normalization.__doc__
        assert name in page


def test_a_choice_reads_as_a_sentence():
    text = str(choose_normalization("regression", 2, "mlp"))
    assert text == (
        "normjax.layer_norm(x, ...): 2 examples in a step are few for the statistics of a batch, "
        "and layer norm does not depend on them. See docs/evidence/batch_size.md."
    )
    text = str(choose_normalization("detection", 2, "resnet"))
    assert text.startswith("normjax.group_norm(x, ..., num_groups=32): 2 examples")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("sorting", 8, "cnn"), ValueError, "task='sorting', expected one of 'adversarial', "),
        (("detection", 8, "vit"), ValueError, "architecture='vit', expected one of 'cnn', "),
        (("detection", 0, "cnn"), ValueError, "batch_size=0, expected a whole number of at least"),
        (("detection", 2.5, "cnn"), TypeError, "batch_size=2.5, expected a whole number of at"),
        (("detection", True, "cnn"), TypeError, "batch_size=True, expected a whole number"),
    ],
)
def test_errors_say_which_values_are_expected(arguments, error, message):
    with pytest.raises(error) as raised:
        choose_normalization(*arguments)
    assert str(raised.value).startswith(f"normjax.choose_normalization: {message}")
    with pytest.raises(ValueError, match="num_devices=0, expected"):
        choose_normalization("detection", 2, "cnn", num_devices=0)
