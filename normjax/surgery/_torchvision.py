"""Tables of rules for the models of torchvision."""

from __future__ import annotations

from normjax import _errors
from normjax.surgery._name_mapping import Rule

RESNET: list[Rule] = [
    ("conv1", "conv1", "conv"),
    ("bn1", "bn1", "batch_norm"),
    ("layer{i}_{j}/conv{k}", "layer{i}.{j}.conv{k}", "conv"),
    ("layer{i}_{j}/bn{k}", "layer{i}.{j}.bn{k}", "batch_norm"),
    ("layer{i}_{j}/downsample_0", "layer{i}.{j}.downsample.0", "conv"),
    ("layer{i}_{j}/downsample_1", "layer{i}.{j}.downsample.1", "batch_norm"),
    ("fc", "fc", "linear"),
]
VGG: list[Rule] = [
    ("features_{i}", "features.{i}", "conv"),
    ("classifier_{i}", "classifier.{i}", "linear"),
]
DENSENET: list[Rule] = [
    ("conv0", "features.conv0", "conv"),
    ("norm{k}", "features.norm{k}", "batch_norm"),
    ("denseblock{i}/denselayer{j}/conv{k}", "features.denseblock{i}.denselayer{j}.conv{k}", "conv"),
    (
        "denseblock{i}/denselayer{j}/norm{k}",
        "features.denseblock{i}.denselayer{j}.norm{k}",
        "batch_norm",
    ),
    ("transition{i}/conv", "features.transition{i}.conv", "conv"),
    ("transition{i}/norm", "features.transition{i}.norm", "batch_norm"),
    ("classifier", "classifier", "linear"),
]
# The first and the last layer of the families below.
STEM: list[Rule] = [
    ("features_{i}_0", "features.{i}.0", "conv"),
    ("features_{i}_1", "features.{i}.1", "batch_norm"),
    ("classifier_{i}", "classifier.{i}", "linear"),
]
MOBILENET_V2: list[Rule] = [
    *STEM,
    ("features_{i}/conv_{k}_0", "features.{i}.conv.{k}.0", "conv"),
    ("features_{i}/conv_{k}_1", "features.{i}.conv.{k}.1", "batch_norm"),
    ("features_{i}/conv_{k}", "features.{i}.conv.{k}", "conv"),
    ("features_{i}/conv_{k}", "features.{i}.conv.{k}", "batch_norm"),
]
MOBILENET_V3: list[Rule] = [
    *STEM,
    ("features_{i}/block_{k}_0", "features.{i}.block.{k}.0", "conv"),
    ("features_{i}/block_{k}_1", "features.{i}.block.{k}.1", "batch_norm"),
    ("features_{i}/block_{k}/fc{n}", "features.{i}.block.{k}.fc{n}", "conv"),
]
EFFICIENTNET: list[Rule] = [
    *STEM,
    ("features_{i}_{j}/block_{k}_0", "features.{i}.{j}.block.{k}.0", "conv"),
    ("features_{i}_{j}/block_{k}_1", "features.{i}.{j}.block.{k}.1", "batch_norm"),
    ("features_{i}_{j}/block_{k}/fc{n}", "features.{i}.{j}.block.{k}.fc{n}", "conv"),
]
CONVNEXT: list[Rule] = [
    ("features_0_0", "features.0.0", "conv"),
    ("features_{i}_1", "features.{i}.1", "conv"),
    ("features_{i}_{j}", "features.{i}.{j}", "layer_norm"),
    ("features_{i}_{j}/block_0", "features.{i}.{j}.block.0", "conv"),
    ("features_{i}_{j}/block_2", "features.{i}.{j}.block.2", "layer_norm"),
    ("features_{i}_{j}/block_{k}", "features.{i}.{j}.block.{k}", "linear"),
    ("features_{i}_{j}/layer_scale", "features.{i}.{j}.layer_scale", "parameter"),
    ("classifier_0", "classifier.0", "layer_norm"),
    ("classifier_2", "classifier.2", "linear"),
]
LAYER = "encoder_layer_{i}"
VIT: list[Rule] = [
    ("conv_proj", "conv_proj", "conv"),
    ("class_token", "class_token", "parameter"),
    ("encoder/pos_embedding", "encoder.pos_embedding", "parameter"),
    (f"encoder/{LAYER}/ln_{{k}}", f"encoder.layers.{LAYER}.ln_{{k}}", "layer_norm"),
    (
        f"encoder/{LAYER}/self_attention",
        f"encoder.layers.{LAYER}.self_attention",
        "attention",
    ),
    (f"encoder/{LAYER}/mlp_{{k}}", f"encoder.layers.{LAYER}.mlp.{{k}}", "linear"),
    ("encoder/ln", "encoder.ln", "layer_norm"),
    ("head", "heads.head", "linear"),
]
FAMILIES = {
    "resnet": RESNET,
    "vgg": VGG,
    "vgg_bn": [*VGG, ("features_{i}", "features.{i}", "batch_norm")],
    "densenet": DENSENET,
    "mobilenet_v2": MOBILENET_V2,
    "mobilenet_v3": MOBILENET_V3,
    "efficientnet": EFFICIENTNET,
    "convnext": CONVNEXT,
    "vit": VIT,
}


@_errors.named("normjax.surgery.torchvision_rules")
def torchvision_rules(family: str) -> list[Rule]:
    """The rules of `import_torch` for a family of models of torchvision.

        torchvision:  layer1.0.conv2.weight,  features.3.1.block.0.0.weight
        Flax:         layer1_0/conv2/kernel,  features_3_1/block_0_0/kernel

    The Flax model has the names of torchvision: a dot before a number is "_", as Flax names the
    lists of `setup`. Every other level is a module, except levels that contain only one sequence
    (`features` of DenseNet, `encoder.layers` and `heads` of ViT), which are omitted. If a model has
    other names, change the left column of the table.

    Args:
        family: resnet (ResNeXt and Wide ResNet too), vgg, vgg_bn, densenet, mobilenet_v2,
            mobilenet_v3, efficientnet (V2 too), convnext or vit.

    Returns:
        A new list of rules, each (module of Flax, module of torchvision, kind).

    Guarantees:
        the same numbers: a Flax model filled by the table gives the output of the PyTorch model.

    Raises:
        ValueError: an unknown family.

    References:
        torchvision maintainers and contributors (2016), torchvision.models.

    Example:
        >>> from normjax import surgery
        >>> surgery.torchvision_rules("vgg")
        [('features_{i}', 'features.{i}', 'conv'), ('classifier_{i}', 'classifier.{i}', 'linear')]
    """
    if family not in tuple(FAMILIES):
        raise ValueError(
            f"normjax: family is {family!r}, expected one of "
            f"{', '.join(FAMILIES)}. For another model, write its rules after one of these."
        )
    return list(FAMILIES[family])
