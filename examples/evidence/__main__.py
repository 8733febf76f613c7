"""All claims of the textbooks, one after the other, and the table of what held.

python examples/evidence            # all pages below docs/evidence, under 30 minutes
python examples/evidence --smoke    # a few steps of each, under 3 minutes
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
PAGES = HERE.parents[1] / "docs" / "evidence"
# Scripts at a time: compiling leaves one core idle.
JOBS = 2
QUICK = " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# In the order of the questions: how it trains, how it is served, what it is used for.
SCRIPTS = (
    "learning_rate", "initialization", "depth", "landscape", "regularization", "placement",
    "batch_size", "devices", "wrong_mode", "running_statistics", "half_precision",
    "variable_lengths", "style_transfer", "cost",
)  # fmt: skip


def run(name: str, smoke: bool) -> tuple[str, int, str]:
    """Runs one script; its name, exit code, and what it printed."""
    command = [sys.executable, str(HERE / f"{name}.py"), *(["--smoke"] if smoke else [])]
    # Most of the time of a short run is compiling.
    flags = {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + QUICK} if smoke else {}
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env={**os.environ, **flags}
    )
    return name, done.returncode, (done.stdout + done.stderr).strip()


def index() -> str:
    """The table of all claims, from the records that the scripts wrote."""
    records = [json.loads((PAGES / f"{name}.json").read_text()) for name in SCRIPTS]
    rows = [
        f"| [{r['title']}]({r['name']}.md) | {r['claim']} | {r['held']} | {r['number']} |"
        for r in records
    ]
    held = [r["held"] for r in records]
    return "\n".join(
        [
            "# Evidence",
            "",
            "What textbooks say about normalization, tested on real data: handwritten digits and",
            "two photographs that come with scikit-learn. Each page has the claim and its source,",
            "a picture, the numbers over several seeds, and the script that made them. The",
            "networks are small, so that everything runs on two CPU cores in less than half an",
            "hour: `make evidence`.",
            "",
            f"Of {len(held)} claims {held.count('yes')} held, {held.count('partly')} held in part, "
            f"and {held.count('no')} did not hold.",
            "",
            "| page | claim | held here | figure |",
            "|---|---|---|---|",
            *rows,
            "",
            "```{toctree}",
            ":hidden:",
            "",
            *SCRIPTS,
            "```",
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--smoke", action="store_true", help="little of all, and no claim")
    args = parser.parse_args()
    started, failed = time.perf_counter(), []
    with ThreadPoolExecutor(JOBS) as pool:
        for name, code, output in pool.map(lambda name: run(name, args.smoke), SCRIPTS):
            print(f"== {name}\n{output}\n", flush=True)
            if code:
                failed.append(name)
    print(f"{len(SCRIPTS)} scripts in {time.perf_counter() - started:.0f} s")
    if failed:
        print(f"failed: {', '.join(failed)}")
        return 1
    if not args.smoke:
        (PAGES / "index.md").write_text(index())
    return 0


if __name__ == "__main__":
    sys.exit(main())
