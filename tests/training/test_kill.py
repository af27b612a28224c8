"""Killed in the middle of a save, at each of its steps, a run goes on as if nothing had been."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WAIT = 120  # seconds that a test waits for one run

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")

RUN = """
import os, signal, sys, warnings
import torch
from pathlib import Path
sys.path[:0] = ["benchmarks"]
import kill
from grpo_lab.training.output_dir import all_checkpoints

torch.set_num_threads(1)
warnings.simplefilter("ignore")
calls = 0

def counting(name):
    real = getattr(os, name)
    def call(*arguments, **keywords):
        global calls
        calls += 1
        if calls == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **keywords)
    return call

os.fsync, os.replace = counting("fsync"), counting("replace")  # every step of every write goes through one of them
folder = Path(sys.argv[1])
settings = {"num_iterations": 2, "batch_size": 4, "kl_coef": 0.05}
kill.make_trainer(folder, settings).train(resume=bool(all_checkpoints(folder)))
print(*kill.result(folder).values())
"""


def run(folder, kill_at=0):
    command = [sys.executable, "-c", RUN, str(folder), str(kill_at)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=WAIT)


@pytest.mark.slow
def test_a_run_killed_inside_its_saves_ends_with_the_same_bits(tmp_path):
    whole = run(tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    expected = whole.stdout.splitlines()[-1]
    # a save is nine steps: six files, their folder, the new name, the folder above; rows are written in between
    for kill_at in (12, 15, 18, 20, 21, 23):
        assert run(tmp_path / "killed", kill_at).returncode == -signal.SIGKILL
    ended = run(tmp_path / "killed")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == expected


@pytest.mark.slow
def test_the_random_killer_finds_nothing_lost():
    result = subprocess.run(
        [sys.executable, "benchmarks/kill.py", "--kills", "8"],
        cwd=ROOT, capture_output=True, text=True, timeout=8 * WAIT,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1] == "8 kills survived"
