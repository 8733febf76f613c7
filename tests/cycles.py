"""Compiles norms and a bottleneck for a described TPU, and prints their cycles as JSON.

    python -m tests.cycles

tests/test_compiled.py starts it as a process, so that other tests do not load libtpu.
"""

import json
import sys

from benchmarks import described, hlo
from benchmarks.blocks import Blocks, bottleneck
from benchmarks.calls import MODES
from benchmarks.compiled import LAYERS, Case
from benchmarks.compiled_tables import BLOCK

LIBRARIES = ("normjax", "flax.linen")
# One layer of each kind, and the bottlenecks of the table.
KINDS = {layer.kind: layer for layer in LAYERS}
ROWS = [
    *(Case(layer, "float32", mode) for layer in KINDS.values() for mode in MODES),
    Case(Blocks("2 bottlenecks", bottleneck, (64, 28, 28, 512)), "bfloat16", BLOCK),
]


def cycles(case, library, devices):
    program = described.compile_for(devices, *case.program(library))
    return hlo.parse(program.as_text()).cycles()


def main():
    devices = described.devices(described.TPU)[:1]
    found = {case.title: [cycles(case, name, devices) for name in LIBRARIES] for case in ROWS}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
