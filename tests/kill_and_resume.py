"""Kills examples/multihost.py at random steps, restarts it, and compares results bit by bit.

    python -m tests.kill_and_resume --times 20

tests/test_examples.py does it once.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.compiling import DEFAULT_XLA, OWN_FLAGS

ROOT = Path(__file__).parents[1]
VICTIMS = ("process 0", "process 1", "launcher", "all")
# Some optimization saves time, since a step runs a few dozen times.
LEVEL = [] if DEFAULT_XLA else ["--xla_backend_optimization_level=1"]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": " ".join([*OWN_FLAGS, *LEVEL]),
}
# Seconds, far above what a start takes on a slow machine; it only limits a hang.
LIMIT = 600


def start(folder, *options):
    """Starts the example with few steps, in its own process group."""
    command = [sys.executable, "examples/multihost.py", "--smoke", "--batch-size", "256"]
    return subprocess.Popen(
        [*command, "--save-every", "1", "--checkpoints", str(folder), *options],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process):
    """Waits for a process and returns exit code and output; kills what remains of its group."""
    try:
        output, _ = process.communicate(timeout=LIMIT)
    finally:
        end(process)
    return process.returncode, output


def end(process):
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def fingerprint(output):
    return re.search(r"fingerprint: (\w+)", output).group(1)


def first_step(output):
    return int(re.search(r"starting at step (\d+)", output).group(1))


def saved_step(folder):
    """The last whole checkpoint; those that are being written have longer names."""
    names = [p.name for p in folder.glob("steps/*") if p.name.isdigit()]
    return max(map(int, names), default=0)


def children(process):
    """Process ids of the workers, in the order of their start."""
    found = subprocess.run(
        ["pgrep", "-P", str(process.pid)], check=False, capture_output=True, text=True
    )
    return sorted(map(int, found.stdout.split()))


def alive(pid):
    """A process that has ended but was not waited for by its new parent counts as ended."""
    state = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(pid)], check=False, capture_output=True, text=True
    )
    return state.stdout.strip()[:1] not in ("", "Z")


def wait_until(condition, what, seconds=LIMIT):
    stop = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > stop:
            raise TimeoutError(f"still waiting for {what} after {seconds} s")
        time.sleep(0.005)


def kill(process, victim, workers):
    if victim == "all":
        os.killpg(process.pid, signal.SIGKILL)
    elif victim == "launcher":
        os.kill(process.pid, signal.SIGKILL)
    else:
        os.kill(workers[int(victim.split()[1])], signal.SIGKILL)


def trial(folder, step, delay, victim):
    """Kills `victim` `delay` seconds after the checkpoint of `step`, then restarts the example.

    Returns the output of the second start and the step that was saved when all had ended.
    """
    process = start(folder)
    try:
        wait_until(lambda: len(children(process)) == 2, "the workers")
        workers = children(process)
        wait_until(lambda: saved_step(folder) >= step or process.poll() is not None, "a step")
        time.sleep(delay)
        kill(process, victim, workers)
        code = process.wait(LIMIT)
        assert code != 0, "a killed process must not count as success"
        # A launcher that is killed cannot stop its workers; they must see it and end.
        wait_until(lambda: not any(map(alive, workers)), "the workers to end", 60)
    finally:
        end(process)
        process.stdout.close()
    saved = saved_step(folder)
    code, output = finish(start(folder))
    assert code == 0, output
    return output, saved


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        code, output = finish(start(Path(scratch, "whole")))
        assert code == 0, output
        want = fingerprint(output)
        steps = int(re.search(r"of (\d+)\n", output).group(1))
        print(f"uninterrupted, {steps} steps: {want}", flush=True)
        for number in range(args.times):
            step, delay = int(rng.integers(0, steps)), float(rng.uniform(0, 0.5))
            victim = VICTIMS[number % len(VICTIMS)]
            output, saved = trial(Path(scratch, str(number)), step, delay, victim)
            same = fingerprint(output) == want
            nothing_lost = first_step(output) == saved
            print(
                f"{number + 1:3}: {victim:9} killed {delay:.2f} s after step {step:2}, went on "
                f"from {first_step(output):2}: {'same bits' if same else 'OTHER BITS'}",
                flush=True,
            )
            assert same, output
            assert nothing_lost, output


if __name__ == "__main__":
    main()
