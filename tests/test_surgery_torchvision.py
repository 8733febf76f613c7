"""The tables for torchvision's families: a Flax twin gives the outputs of the PyTorch model.

The PyTorch models are small and have torchvision's names, which are compared with torchvision if it
is installed. ResNet is in test_surgery_torch.py.
"""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from normjax import surgery
from tests import torchvision_flax as twins
from tests.torchvision_torch import small_models

POOLED = (4, "M", 6, "M")
# For each family a function from the fields of its norms to its Flax twin, and an image size.
TWINS = {
    "vgg": (lambda norm: twins.VGG(POOLED, 5, 3), 8),
    "vgg_bn": (lambda norm: twins.VGG(POOLED, 5, 3, norm), 8),
    "densenet": (lambda norm: twins.DenseNet(2, (2, 1), 4, 2, 3, norm), 16),
    "mobilenet_v2": (
        lambda norm: twins.MobileNetV2(4, ((1, 4, 1, 1), (2, 6, 1, 2)), 8, 3, norm),
        8,
    ),
    "mobilenet_v3": (
        lambda norm: twins.MobileNetV3(
            4, ((3, 4, 4, 0, nn.relu, 1), (5, 6, 5, 2, nn.hard_swish, 2)), 8, 6, 3, norm
        ),
        8,
    ),
    "efficientnet": (
        lambda norm: twins.EfficientNet(4, ((1, 3, 1, 4, 1), (2, 5, 2, 6, 1)), 8, 3, norm),
        8,
    ),
    "convnext": (lambda norm: twins.ConvNeXt(((4, 1), (6, 1)), 3, norm), 16),
    "vit": (lambda norm: twins.VisionTransformer(4, 1, 2, 6, 8, 3, norm), 8),
}


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="PyTorch is not installed")


@pytest.mark.usefixtures("lenient")  # for flax.linen.avg_pool
@pytest.mark.parametrize("family", TWINS)
def test_torchvision_rules_guarantee_the_same_numbers(torch, family):
    torch.manual_seed(0)
    net = small_models(torch)[family]()
    make_twin, size = TWINS[family]
    x = torch.randn(4, 3, size, size) * 2 + 1
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
        net(x)  # moves the running statistics
        want = net.eval()(x).numpy()
    is_norm = (torch.nn.BatchNorm2d, torch.nn.LayerNorm)
    norms = [module for module in net.modules() if isinstance(module, is_norm)]
    model = make_twin(surgery.torch_fields(norms[0]) if norms else None)
    images = jnp.asarray(np.moveaxis(x.numpy(), 1, -1))
    empty = jax.eval_shape(model.init, jax.random.key(0), images)
    rules = surgery.torchvision_rules(family)
    variables = surgery.import_torch(empty, net.state_dict(), rules)
    got = jax.jit(model.apply)(variables, images)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    exported = surgery.export_torch(variables, rules)
    for name, tensor in net.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert exported.pop(name).tobytes() == tensor.numpy().tobytes(), name
    assert not exported


OF_TORCHVISION = {
    "vgg": "vgg11",
    "vgg_bn": "vgg11_bn",
    "densenet": "densenet121",
    "mobilenet_v2": "mobilenet_v2",
    "mobilenet_v3": "mobilenet_v3_small",
    "efficientnet": "efficientnet_b0",
    "convnext": "convnext_tiny",
    "vit": "vit_b_16",
}


def test_the_small_models_have_torchvisions_names(torch):
    try:
        from torchvision import models
    except (ImportError, RuntimeError) as error:  # RuntimeError: made for another PyTorch
        pytest.skip(f"torchvision cannot be imported: {error}")

    def names(net):
        return {re.sub(r"\d+", "#", name) for name in net.state_dict()}

    for family, make in small_models(torch).items():
        with torch.device("meta"):
            assert names(make()) == names(getattr(models, OF_TORCHVISION[family])()), family


def test_a_family_without_a_table_is_an_error():
    with pytest.raises(ValueError, match="family is 'swin', expected one of resnet, vgg, vgg_bn"):
        surgery.torchvision_rules("swin")


def test_a_table_is_a_new_list_each_time():
    surgery.torchvision_rules("resnet").clear()
    assert surgery.torchvision_rules("resnet")
