from __future__ import annotations

import time

import jax
import numpy as np
import torch
from torch import nn

from benchmarks.calls import EVALUATION, TRAINING, Call
from benchmarks.layers import EPSILON, MOMENTUM
from benchmarks.machine import cores
from benchmarks.peers import Missing

# As many threads as XLA uses.
torch.set_num_threads(cores())
ON_GPU = jax.default_backend() == "gpu" and torch.cuda.is_available()
ROWS = ("layer_norm", "rms_norm")


def norm_of(layer, dtype):
    c, is_image = layer.features, len(layer.shape) == 4
    if layer.kind == "batch_norm":
        batch_norm = nn.BatchNorm2d if is_image else nn.BatchNorm1d
        norm = batch_norm(c, eps=EPSILON, momentum=1 - MOMENTUM)
    elif layer.kind == "layer_norm":
        norm = nn.LayerNorm(c, eps=EPSILON)
    elif layer.kind == "rms_norm":
        # There is no fused kernel for a bfloat16 x and a float32 weight; models that use this
        # norm keep their weights in bfloat16.
        norm = nn.RMSNorm(c, eps=EPSILON, dtype=dtype)
    elif layer.kind == "group_norm":
        norm = nn.GroupNorm(layer.num_groups, c, eps=EPSILON)
    else:
        norm = nn.InstanceNorm2d(c, eps=EPSILON, affine=True)
    return norm.cuda() if ON_GPU else norm


def calls(layer, x, dy):
    """In PyTorch's own layout: features of images are the second axis, also in memory."""
    return _calls(layer, x, dy, torch.contiguous_format)


def channels_last_calls(layer, x, dy):
    """Features are the last axis in memory, as they are for the JAX libraries."""
    if layer.kind in ROWS or len(layer.shape) != 4:
        raise Missing("the layout is that of torch")
    return _calls(layer, x, dy, torch.channels_last)


def compiled_calls(layer, x, dy):
    """With torch.compile, in PyTorch's own layout."""
    # Without this a ninth layer would not be compiled, and would run eagerly.
    torch.compiler.reset()
    # Without this the compile time would be that of a cache hit on disk.
    torch._inductor.config.force_disable_caches = True
    return _calls(layer, x, dy, torch.contiguous_format, compiled=True)


def _calls(layer, x, dy, layout, compiled=False):
    features_first = layer.kind not in ROWS and len(layer.shape) > 2
    x, dy = (_tensor(a, features_first, layout) for a in (x, dy))
    # A module for each mode, since training steps update the running statistics.
    training, serving = norm_of(layer, x.dtype), norm_of(layer, x.dtype).eval()
    if compiled:
        training, serving = torch.compile(training), torch.compile(serving)

    def training_step():
        leaf = x.detach().requires_grad_()
        y = training(leaf)
        dx, *_ = torch.autograd.grad(y, (leaf, *training.parameters()), dy)
        return y.detach(), dx

    @torch.no_grad()
    def evaluation():
        return (serving(x),)

    def call(function, kept_bytes=None):
        start = time.perf_counter()
        function()
        seconds = time.perf_counter() - start if compiled else None
        return Call(
            _finished(function),
            lambda: [_array(t, features_first) for t in function()],
            seconds,
            kept_bytes,
        )

    return {
        # The hooks that count kept bytes do not see those of compiled code.
        TRAINING: call(training_step, None if compiled else _kept_bytes(training, x)),
        EVALUATION: call(evaluation),
    }


def _finished(function):
    def run():
        result = function()
        if ON_GPU:
            torch.cuda.synchronize()
        return result

    return run


def _tensor(array, features_first, layout):
    # PyTorch cannot read a bfloat16 array of NumPy.
    tensor = torch.tensor(np.asarray(array, np.float32)).to(getattr(torch, array.dtype.name))
    tensor = tensor.movedim(-1, 1).contiguous(memory_format=layout) if features_first else tensor
    return tensor.cuda() if ON_GPU else tensor


def _array(tensor, features_first):
    array = tensor.float().cpu().numpy()
    return np.moveaxis(array, 1, -1) if features_first else array


def _kept_bytes(norm, x):
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        norm.train()(x.detach().requires_grad_())
    return sum(kept.values())
