"""What goes wrong in the middle of a run is named, harms nothing that was written, and can be gone on from."""

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from trainers import likes_threes, make_trainer, weights

from grpo_lab.rewards import reward_models
from grpo_lab.rewards.reward_models import Rewards
from grpo_lab.tasks.pocket.make import make_tokenizer
from grpo_lab.training import output_dir, step

ROOT = Path(__file__).parents[2]
WAIT = 120  # seconds that a test waits for a child process


def ask(reward, **settings):
    return Rewards(reward, make_tokenizer(), **settings)(["1+1=", "2+2="], ["3", "33"], {}).total.tolist()


def failing(at: int, fault):
    """likes_threes, but its call number `at` does something else first."""
    calls = []

    def reward(prompts, completions):
        calls.append(1)
        if len(calls) == at and (answer := fault(completions)) is not None:
            return answer
        return likes_threes(prompts, completions)

    reward.__name__ = "likes_threes"  # a run only goes on with the reward functions that it had
    return reward


# --- reward functions ------------------------------------------------------------------------------------


def raise_(error):
    raise error


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda c: raise_(RuntimeError("no connection")), "raised RuntimeError: no connection"),
        (lambda c: raise_(TimeoutError("no answer")), "raised TimeoutError: no answer"),
        (lambda c: sys.exit(0), "raised SystemExit: 0"),
        (lambda c: [float("inf")] * len(c), "returned inf for the completion"),
        (lambda c: [1.0], "returned 1 values for 16 completions"),
        (lambda c: iter(int, 1), "returned 17 or more values for 16 completions"),
        (lambda c: 0.5, "must return a list with one number per completion, got 0.5"),
        (lambda c: ["good"] * len(c), "must return numbers or None, got 'good'"),
        (lambda c: time.sleep(600), r"on 16 completions did not return within 0\.3 s .* continue with --resume"),
    ],
    ids=["raises", "raises what we raise", "exits", "inf", "short", "endless", "a number", "words", "hangs"],
)
def test_a_fault_in_a_reward_function_is_named_with_its_step_and_the_run_goes_on_from_the_one_before(
    tmp_path, fault, message
):
    whole = make_trainer(tmp_path / "whole")
    whole.train()
    with pytest.raises((ValueError, TimeoutError), match=f"the reward function 'likes_threes' {message}") as caught:
        make_trainer(tmp_path / "broken", reward=failing(3, fault), reward_timeout=0.3).train()
    assert caught.value.__notes__[0] == "It happened in step 3."
    assert "continue with --resume" in caught.value.__notes__[1]
    resumed = make_trainer(tmp_path / "broken")
    resumed.train(resume=True)
    assert torch.equal(weights(whole), weights(resumed))


@pytest.mark.parametrize("value", [None, float("nan")])
def test_a_completion_that_is_not_scored_does_not_stop_or_spoil_a_run(tmp_path, value):
    run = make_trainer(tmp_path, reward=failing(2, lambda c: [value, *[float(i) for i in range(1, len(c))]]))
    assert run.train()[1]["reward"] == pytest.approx(sum(range(1, 16)) / 15)
    assert torch.isfinite(weights(run)).all()


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_random_rewards_are_drawn_again_after_a_fault(tmp_path, timeout):
    def draws(prompts, completions):
        return [random.random() + torch.rand(()).item() for _ in completions]

    def draws_and_fails(prompts, completions):
        rewards = draws(prompts, completions)
        return rewards if broken.step < 2 else [None]

    draws_and_fails.__name__ = "draws"
    whole = make_trainer(tmp_path / "whole", reward=draws)
    whole.train()
    broken = make_trainer(tmp_path / "broken", reward=draws_and_fails, reward_timeout=timeout)
    with pytest.raises(ValueError, match="returned 1 values"):
        broken.train()
    resumed = make_trainer(tmp_path / "broken", reward=draws, reward_timeout=timeout)
    resumed.train(resume=True)
    assert torch.equal(weights(whole), weights(resumed))


def test_a_timeout_changes_no_answer_and_without_one_there_is_no_thread():
    def who(prompts, completions):
        threads.append(threading.current_thread())
        return likes_threes(prompts, completions)

    threads = []
    assert ask(who) == ask(who, timeout=60.0) == [0.25, 0.5]
    assert [thread is threading.main_thread() for thread in threads] == [True, False]


def test_a_slow_function_is_named_although_there_is_no_timeout(monkeypatch):
    monkeypatch.setattr(reward_models, "PATIENCE", 0.05)

    def slow(prompts, completions):
        time.sleep(0.5)
        return [1.0, 2.0]

    with pytest.warns(
        RuntimeWarning, match=r"'slow' on 2 completions has run for 0\.05 s\. Does it hang\? --reward-timeout"
    ):
        assert ask(slow) == [1.0, 2.0]


# --- the disk --------------------------------------------------------------------------------------------


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_only(*_, **__):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


@pytest.mark.parametrize(
    ("where", "what", "fault"),
    [
        (torch, "save", full_disk),
        (os, "fsync", full_disk),
        (os, "replace", read_only),
        (Path, "mkdir", read_only),
        (Path, "open", read_only),
    ],
    ids=["state", "flush", "rename", "folder", "rows"],
)
def test_a_disk_that_refuses_in_the_middle_of_a_run_costs_no_step_that_was_saved(
    tmp_path, monkeypatch, where, what, fault
):
    whole = make_trainer(tmp_path / "whole", save_steps=1)
    whole.train()
    broken = make_trainer(tmp_path / "broken", save_steps=1)
    with monkeypatch.context() as patch:
        real, saved = getattr(where, what), tmp_path / "broken" / "checkpoint-1"
        patch.setattr(where, what, lambda *a, **k: (fault if saved.exists() else real)(*a, **k))
        with pytest.raises(OSError, match=r"No space left|Read-only") as caught:
            broken.train()
    assert "continue with --resume" in " ".join(caught.value.__notes__)
    assert [path.name for path in output_dir.all_checkpoints(tmp_path / "broken")] == ["checkpoint-1"]
    resumed = make_trainer(tmp_path / "broken", save_steps=1)
    resumed.train(resume=True)
    assert torch.equal(weights(whole), weights(resumed))
    rows = [[{**row, "step_time": 0} for row in run.log.metrics.read()] for run in (whole, resumed)]
    assert rows[0] == rows[1]


FULL = """
import resource, sys
from grpo_lab.cli.main import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.exit(main(["train", "--output-dir", sys.argv[2], "--max-steps", "2", "--save-steps", "1", "--warmup-steps", "0",
               "--max-train-samples", "8", "--eval-dataset", sys.argv[3]]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
@pytest.mark.parametrize("size", [1_000_000, 3_000_000], ids=["weights", "state"])
def test_a_disk_that_is_really_full_gets_one_sentence(tmp_path, size):
    (tmp_path / "eval.txt").write_text("2,3,4:9=\n")
    result = subprocess.run(
        [sys.executable, "-c", FULL, str(size), str(tmp_path / "out"), str(tmp_path / "eval.txt")],
        cwd=ROOT, capture_output=True, text=True, timeout=WAIT,
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert "Is the disk full?" in result.stderr.splitlines()[-1]
    assert not list((tmp_path / "out").glob(".unfinished*"))


# --- the arithmetic --------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_are_skipped_logged_and_in_the_end_stop_the_run(tmp_path, monkeypatch, damage):
    run, real = make_trainer(tmp_path, max_steps=9, max_skipped_steps=3, save_steps=2), step.grpo_loss

    def spoiled(logprobs, *arguments, **settings):
        return real(logprobs * (1.0 if run.step < 4 else damage), *arguments, **settings)

    monkeypatch.setattr(step, "grpo_loss", spoiled)
    with pytest.raises(ArithmeticError, match=r"3 steps in a row .* weights are as they were .* Lower --learning-rate"):
        run.train()
    assert [row["skipped_steps"] for row in run.log.metrics.read()] == [0, 0, 0, 0, 1, 2]
    good = make_trainer(tmp_path, max_steps=9, save_steps=2)
    good.load(tmp_path / "checkpoint-4")
    assert torch.equal(weights(good), weights(run))
    assert torch.isfinite(weights(good)).all()


# --- Ctrl-C ----------------------------------------------------------------------------------------------

REWARD = """
import pathlib, time
calls = []
def mine(prompts, completions):
    calls.append(1)
    pathlib.Path(f"call {len(calls)}").touch()
    time.sleep(SECONDS if len(calls) > 1 else 0)  # the first call judges the examples before training
    return [float(len(c)) for c in completions]
"""


@contextmanager
def started(folder, *arguments, seconds):
    """A run in a process of its own, which ends with the block at the latest, and after `WAIT` seconds."""
    (folder / "prompts.txt").write_text("1+1=\n2+2=\n")
    (folder / "mine.py").write_text(REWARD.replace("SECONDS", seconds))
    command = [sys.executable, "-m", "grpo_lab.cli", "train", "--reward", "mine.py:mine", "--dataset", "prompts.txt"]
    command += ["--max-steps", "3", "--warmup-steps", "0", "--output-dir", "out", *arguments]
    with subprocess.Popen(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        limit = threading.Timer(WAIT, process.kill)  # ends a wait for its output, too
        limit.start()
        try:
            yield process
        finally:
            limit.cancel()
            process.kill()


def interrupt_in_step_1(process, folder):
    while not (folder / "call 2").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert any("Ctrl-C again stops at once" in line for line in process.stdout)


no_signals = pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT for another process")


@pytest.mark.slow
@no_signals
@pytest.mark.parametrize("arguments", [[], ["--reward-timeout", "600"]], ids=["no timeout", "timeout"])
def test_the_second_ctrl_c_ends_a_run_whose_reward_function_hangs(tmp_path, arguments):
    with started(tmp_path, *arguments, seconds="600") as process:
        interrupt_in_step_1(process, tmp_path)
        process.send_signal(signal.SIGINT)
        _, complaint = process.communicate()
    assert process.returncode == 130, complaint
    assert "Traceback" not in complaint


@pytest.mark.slow
@no_signals
def test_ctrl_c_finishes_the_step_saves_it_and_says_how_to_go_on(tmp_path):
    with started(tmp_path, seconds="1") as process:
        interrupt_in_step_1(process, tmp_path)
        _, complaint = process.communicate()
    assert process.returncode == 130, complaint
    assert "checkpoint-1. Go on with the same command and --resume" in complaint.splitlines()[-1]
    with started(tmp_path, "--resume", seconds="0") as again:
        _, complaint = again.communicate()
    assert again.returncode == 0, complaint
    assert (tmp_path / "out/final_model/model.safetensors").exists()
