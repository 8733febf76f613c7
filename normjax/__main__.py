"""Prints versions, the form of each platform and whether kernels run, for bug reports.

python -m normjax
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib import metadata

import jax

import normjax
from normjax._core.lowering import PLATFORMS, VARIABLE, lowered_as
from normjax._core.platforms import kernels

FORMS = {
    "cpu": "the mean, then the squared deviations from it",
    "gpu": "rows in one kernel; columns in one pass, around an estimate of the mean",
    "tpu": "moments merged within the reduction; batch norm around its running mean",
}


def lines() -> Iterator[str]:
    """The lines to print."""
    yield f"normjax {normjax.__version__}, Python {platform.python_version()}, {platform.machine()}"
    yield ", ".join(f"{name} {version(name)}" for name in ("jax", "jaxlib", "flax", "numpy"))
    yield f"devices: {', '.join(sorted({d.platform for d in jax.devices()}))}"
    plugin = kernels.plugin()
    forms = dict(FORMS)
    if os.environ.get(VARIABLE):
        asked = lowered_as("cpu")
        yield f"{VARIABLE}={asked}: every platform computes as {asked} does, without kernels"
    elif plugin is not None:
        forms["cpu"] = f"the kernels of normjax-cpu; where there is none, {FORMS['cpu']}"
    for name in PLATFORMS:
        yield f"{name}: {forms[name]}"
    own = f"normjax-cpu {version('normjax-cpu')}"
    if plugin is None:
        yield f"{own}: not loaded; with a C++ compiler: pip install ./native"
    else:
        yield f"{own} for {plugin.PROCESSOR}: loaded"


def version(name: str) -> str:
    """The version of an installed distribution."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    print("\n".join(lines()))
