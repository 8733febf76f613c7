"""Promise 3 across processes: results equal those of one, and all stop if one is killed."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tests import reference
from tests.kill_and_resume import ENVIRONMENT
from tests.worker import (
    AXES,
    CASES,
    DTYPES,
    HEARTBEAT,
    MOMENTUM,
    TRANSFORMATIONS,
    make_inputs,
    results,
)

# Usually they take ten seconds. The limit only ends a hang, also on a slow machine.
LIMIT = 600
NAMES = ("y", "dx", "dscale", "dbias", "mean", "var")
REPLICATED = NAMES[2:]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def started(count, folder):
    """Starts `count` processes connected on loopback, and kills them after the block."""
    address = f"127.0.0.1:{free_port()}"
    root = Path(__file__).parents[1]
    environment = {**ENVIRONMENT, "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")}
    workers = []
    try:
        for index in range(count):
            log = (folder / f"log{index}").open("w")
            command = [sys.executable, "-m", "tests.worker", address, str(count), str(index)]
            workers.append(
                subprocess.Popen(
                    [*command, str(folder)], cwd=root, env=environment, stdout=log, stderr=log
                )
            )
            log.close()
        yield workers
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def logs(folder):
    return "\n".join(path.read_text()[-2000:] for path in sorted(folder.glob("log*")))


def wait_until(condition, seconds, folder):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"still waiting after {seconds} s\n{logs(folder)}"
        time.sleep(0.05)


def assemble(count, folder):
    """Joins the arrays that the processes wrote; replicated ones must be equal."""
    parts = [dict(np.load(folder / f"part{index}.npz")) for index in range(count)]
    whole = {}
    for key in parts[0]:
        held = [part[key] for part in parts]
        if key.split("/")[-1] in REPLICATED:
            for other in held[1:]:
                np.testing.assert_array_equal(held[0], other, f"processes disagree on {key}")
            whole[key] = held[0]
        else:
            whole[key] = np.concatenate(held)
    return whole


@cache
def one_process():
    return results()


@cache
def expected(case, dtype):
    """The results of the oracle, and tolerances for rounding."""
    x, scale, bias, mask, dy = make_inputs(case, dtype)
    x, dy = x.astype(np.float64), dy.astype(np.float64)
    want = reference.batch_norm(x, scale, bias, dy, axes=AXES, mask=mask)
    arrays = dict(
        y=want.y,
        dx=want.dx,
        dscale=want.dscale,
        dbias=want.dbias,
        mean=(1 - MOMENTUM) * want.mean,
        var=MOMENTUM + (1 - MOMENTUM) * want.var,
    )
    # A sum of 40 products of values up to 10 has an error of at most 40 eps of 10. y and dx are
    # also rounded to their own dtype; dx is the sum of two parts that may cancel.
    fine = 40 * 10 * reference.EPS["float32"]
    coarse = 0 if dtype == "float32" else reference.EPS[dtype]
    direct = np.abs(dy * scale / np.sqrt(want.var + 1e-5)).max()
    slack = dict.fromkeys(NAMES, fine)
    slack.update(y=fine + coarse * np.abs(want.y).max(), dx=fine + 2 * coarse * direct)
    return arrays, slack


def compare(found, count):
    for transformation in TRANSFORMATIONS:
        for case in CASES:
            for dtype in DTYPES:
                want, slack = expected(case, dtype)
                for name in NAMES:
                    key = f"{transformation}/{case}/{dtype}/{name}"
                    options = dict(rtol=2e-5, atol=slack[name])
                    label = f"{key} of {count} processes"
                    np.testing.assert_allclose(found[key], want[name], err_msg=label, **options)
                    alone = one_process()[key]
                    np.testing.assert_allclose(found[key], alone, err_msg=label, **options)


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    with started(2, tmp_path) as workers:
        for worker in workers:
            assert worker.wait(LIMIT) == 0, logs(tmp_path)
    compare(assemble(2, tmp_path), 2)


@pytest.mark.slow
def test_four_processes_equal_one_and_all_stop_if_one_is_killed(tmp_path):
    (tmp_path / "continue").touch()
    with started(4, tmp_path) as workers:
        wait_until(lambda: len(list(tmp_path.glob("done*"))) == 4, LIMIT, tmp_path)
        compare(assemble(4, tmp_path), 4)
        workers[2].send_signal(signal.SIGKILL)
        start = time.monotonic()
        # One heartbeat to detect the death, and one to stop the other processes.
        codes = [worker.wait(2 * HEARTBEAT + 10) for worker in workers]
        print(f"the others stopped {time.monotonic() - start:.1f} s after it")
    assert codes[2] == -signal.SIGKILL
    assert all(code != 0 for code in codes), codes
