"""Examples run in their short mode, and a training that is killed ends in the same bits."""

import importlib
import subprocess
import sys

import pytest

from tests import kill_and_resume

ROOT = kill_and_resume.ROOT


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shard_map", "sharded_jit"])
def test_the_example_ends_with_the_numbers_of_pmap(name):
    """The example compares them itself; here it only has to finish."""
    ran = subprocess.run(
        [sys.executable, f"examples/{name}.py", "--smoke"],
        cwd=ROOT,
        env=kill_and_resume.ENVIRONMENT,
        check=False,
        capture_output=True,
        text=True,
        timeout=kill_and_resume.LIMIT,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "largest difference" in ran.stdout
    assert "29 of 128 images are real" in ran.stdout


@pytest.mark.slow
def test_a_killed_training_ends_with_the_same_bits(tmp_path):
    code, output = kill_and_resume.finish(kill_and_resume.start(tmp_path / "whole"))
    assert code == 0, output
    again, saved = kill_and_resume.trial(tmp_path / "killed", 2, 0.05, "process 1")
    assert 2 <= saved == kill_and_resume.first_step(again)
    assert kill_and_resume.fingerprint(again) == kill_and_resume.fingerprint(output)


@pytest.fixture
def multihost(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module("multihost")


def refusal(multihost, folder, *options):
    """The message of an example that does not start; it must not change the folder."""
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        multihost.main(["--checkpoints", str(folder), *options])
    assert before == sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))
    return str(stopped.value)


def test_a_missing_checkpoint_is_an_error(multihost, tmp_path):
    assert f"there is no checkpoint in {tmp_path} to resume" in refusal(
        multihost, tmp_path, "--resume"
    )


def test_a_stale_checkpoint_is_an_error(multihost, tmp_path):
    args = multihost.parse(["--checkpoints", str(tmp_path), "--seed", "1"])
    multihost.note_settings(args)
    message = refusal(multihost, tmp_path, "--epochs", "3")
    assert "epochs=10 there and 3 here, seed=1 there and 0 here. Nothing was overwritten" in message


def test_a_folder_of_other_files_is_left_alone(multihost, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert "holds files that are not from this script" in refusal(multihost, tmp_path)
