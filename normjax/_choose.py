"""Recommends a norm for a task, by the rules of the textbooks."""

from __future__ import annotations

from typing import NamedTuple

from normjax import _errors

# Below so many examples the statistics of a batch are too noisy: with 16 batch norm is as accurate
# as group norm on ImageNet, with 2 its error is 10 points higher. Wu & He 2018, figure 1.
ENOUGH_EXAMPLES = 16

TASKS = (
    "adversarial", "classification", "detection", "image_generation", "language_modeling",
    "regression", "reinforcement_learning", "segmentation", "speech", "style_transfer",
    "time_series", "translation",
)  # fmt: skip
ARCHITECTURES = ("cnn", "convnext", "mlp", "resnet", "rnn", "transformer", "unet")


class NormChoice(NamedTuple):
    """The recommendation of `choose_normalization`.

    Attributes:
        name: of the function in `normjax`; modules have the same name in CamelCase.
        options: keyword arguments to pass in addition to the input.
        reason: why, in one or two sentences.
        evidence: the page of the documentation that shows it, below `docs/`.
    """

    name: str
    options: dict[str, object]
    reason: str
    evidence: str

    def __str__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"normjax.{self.name}(x, ...{options}): {self.reason} See docs/{self.evidence}.md."


@_errors.named("normjax.choose_normalization")
def choose_normalization(
    task: str, batch_size: int, architecture: str, *, num_devices: int = 1
) -> NormChoice:
    """Recommends a norm for a task, an architecture and a batch size, with the reason.

    The task decides first (adversarial training, style transfer, reinforcement learning), then the
    architecture (transformers, recurrent networks, ConvNeXt), then the batch size: convolutional
    networks and perceptrons get batch norm if a device, or all devices together, have at least 16
    examples in a step.

    Args:
        task: one of "adversarial", "classification", "detection", "image_generation",
            "language_modeling", "regression", "reinforcement_learning", "segmentation", "speech",
            "style_transfer", "time_series", "translation".
        batch_size: examples of a step on one device.
        architecture: one of "cnn", "convnext", "mlp", "resnet", "rnn", "transformer", "unet".
        num_devices: devices that train together.

    Returns:
        A `NormChoice`: the name of a function, its options, the reason, and a page with evidence.

    Guarantees:
        Known functions: `name` is a function of `normjax`, and `options` are arguments of it.

    Raises:
        TypeError, ValueError: an unknown task or architecture, with a list of the known ones, or
            a batch size or number of devices that is not a positive whole number.

    References:
        Wu & He, Group Normalization, 2018 (arXiv:1803.08494).
        Ba, Kiros & Hinton, Layer Normalization, 2016 (arXiv:1607.06450).
        Ulyanov, Vedaldi & Lempitsky, Instance Normalization, 2016 (arXiv:1607.08022).
        Miyato et al., Spectral Normalization for GANs, 2018 (arXiv:1802.05957).

    Example:
        >>> import normjax
        >>> choice = normjax.choose_normalization("detection", 2, "resnet", num_devices=1)
        >>> choice.name, choice.options
        ('group_norm', {'num_groups': 32})
        >>> normjax.choose_normalization("detection", 2, "resnet", num_devices=8).name
        'batch_norm'
    """
    _errors.known("task", task, TASKS)
    _errors.known("architecture", architecture, ARCHITECTURES)
    batch_size = _errors.at_least_one("batch_size", batch_size)
    num_devices = _errors.at_least_one("num_devices", num_devices)
    by_task = _by_task(task)
    return (
        by_task
        or _by_architecture(task, architecture)
        or _by_batch(architecture, batch_size, num_devices)
    )


def _by_task(task: str) -> NormChoice | None:
    if task == "adversarial":
        return NormChoice(
            "spectral_norm", {},
            "Spectral norm bounds the Lipschitz constant of a discriminator, which keeps "
            "adversarial training stable. Apply it to the weights of the discriminator.",
            "which_norm",
        )  # fmt: skip
    if task == "style_transfer":
        return NormChoice(
            "instance_norm", {},
            "The mean and variance of each feature of an image are its style; instance norm "
            "removes them, and scale and bias set those of another style.",
            "evidence/style_transfer",
        )  # fmt: skip
    if task == "reinforcement_learning":
        return NormChoice(
            "layer_norm", {},
            "The distribution of the inputs changes with the policy, so running statistics are "
            "stale; layer norm has none.",
            "evidence/running_statistics",
        )  # fmt: skip
    return None


def _by_architecture(task: str, architecture: str) -> NormChoice | None:
    if architecture == "transformer" and task == "language_modeling":
        return NormChoice(
            "rms_norm", {},
            "RMS norm trains language models as well as layer norm and needs one sum instead of "
            "two. It does not depend on the batch or on padding.",
            "evidence/variable_lengths",
        )  # fmt: skip
    if architecture in ("transformer", "rnn"):
        return NormChoice(
            "layer_norm", {},
            "Layer norm normalizes each position by itself, so it does not depend on the length "
            "of a sequence, on padding or on the batch.",
            "evidence/variable_lengths",
        )  # fmt: skip
    if architecture == "convnext":
        return NormChoice(
            "layer_norm", {},
            "ConvNeXt is built with layer norm over the features of each position. It does not "
            "depend on the batch.",
            "which_norm",
        )  # fmt: skip
    if architecture == "unet" or task == "image_generation":
        return NormChoice(
            "group_norm", {"num_groups": 32},
            "Large images leave few examples on a device; group norm does not depend on their "
            "number and is the same in training and evaluation.",
            "evidence/batch_size",
        )  # fmt: skip
    return None


def _by_batch(architecture: str, batch_size: int, num_devices: int) -> NormChoice:
    total = batch_size * num_devices
    if batch_size >= ENOUGH_EXAMPLES:
        return NormChoice(
            "batch_norm", {},
            f"A device has {batch_size} examples in a step, enough for the statistics of a batch. "
            "Batch norm allows high learning rates and costs nothing in evaluation.",
            "evidence/learning_rate",
        )  # fmt: skip
    if total >= ENOUGH_EXAMPLES:
        return NormChoice(
            "batch_norm", {"axis_name": "batch"},
            f"A device has {batch_size} examples in a step, too few for the statistics of a batch; "
            f"{num_devices} devices that share statistics have {total}. Name the mapped axis; "
            "sharded jit shares them by itself.",
            "evidence/devices",
        )  # fmt: skip
    few = f"{total} examples in a step are few for the statistics of a batch, and "
    if architecture == "mlp":
        return NormChoice(
            "layer_norm", {}, few + "layer norm does not depend on them.", "evidence/batch_size"
        )
    return NormChoice(
        "group_norm", {"num_groups": 32},
        few + "group norm does not depend on them. Take at most half as many groups as a layer has "
        "channels. In layers with many positions batch norm may still work: compare the samples "
        "that normjax.surgery.diagnose reports with 16.",
        "evidence/batch_size",
    )  # fmt: skip
