"""N processes end with the weights of one. The others are real: started by a launcher, and talking by gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file
from two_processes import run

from grpo_lab.hardware import processes
from grpo_lab.hardware.processes import Processes
from grpo_lab.training import shards
from grpo_lab.training.checkpoints import load_state
from grpo_lab.training.metrics import JsonLines

TESTS = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
              "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip

# name: what differs from the run of two_processes.py
RUNS = {
    "plain": {},
    "evaluated, batch std, two updates": {
        "scale_rewards": "batch", "aggregation": "token-mean", "num_iterations": 2, "eval_steps": 2,
    },
    "no KL": {"kl_coef": 0.0, "gamma": 0.9, "top_k": 5, "temperature": 0.8},
    "KL in the reward": {
        "kl_in": "reward", "kl_estimator": "k1", "baseline": "leave-one-out", "scale_rewards": "none",
    },
    "shards": {"fsdp": True, "num_iterations": 2},
    "shards, no KL": {
        "fsdp": True, "kl_coef": 0.0, "gradient_checkpointing": True, "num_iterations": 2, "temperature": 0.1,
    },
}  # fmt: skip


def launch(launcher: list[str], *arguments: str, folder: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent), "MASTER_PORT": "0"}
    return subprocess.run(
        [*launcher, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final_model" / "model.safetensors")


def difference(one: Path, other: Path) -> float:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def logged(folder: Path) -> tuple[list[dict], list[str]]:
    rows = JsonLines(folder / "metrics.jsonl").read()
    timeless = [{k: v for k, v in row.items() if k != "step_time" and "logp_difference" not in k} for row in rows]
    return timeless, [c["completion"] for c in JsonLines(folder / "completions.jsonl").read()]


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """Every run, by two processes."""
    folder = tmp_path_factory.mktemp("two")
    runs = [[str(folder / name), changes] for name, changes in RUNS.items()]
    finished = launch(TORCHRUN, str(TESTS / "two_processes.py"), json.dumps(runs), folder=folder)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def differing(tmp_path_factory):
    """What is found where the two processes have not the same: each name -> what each process says of it."""
    folder = tmp_path_factory.mktemp("differing")
    finished = launch(TORCHRUN, str(TESTS / "two_processes.py"), str(folder), folder=folder)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout.splitlines()[-1]), folder


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_end_with_the_weights_of_one(of_two, tmp_path, name):
    run(str(tmp_path), {**RUNS[name], "fsdp": False})
    assert difference(tmp_path, of_two / name) < 1e-12  # float64; a step moves a weight by about 1e-3
    (rows, completions), (their_rows, their_completions) = logged(tmp_path), logged(of_two / name)
    assert their_completions == completions
    assert [row.keys() for row in their_rows] == [row.keys() for row in rows]
    for row, theirs in zip(rows, their_rows, strict=True):
        assert theirs == pytest.approx(row, rel=1e-5, abs=1e-6)  # log-probabilities of the sampler are float32


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "evaluated, batch std, two updates", "shards"])
def test_a_run_of_two_processes_goes_on_in_one(of_two, tmp_path, name):
    # its checkpoint of step 3 is, with two updates to a rollout, in the middle of one
    run(str(tmp_path), {**RUNS[name], "fsdp": False, "max_steps": 5}, str(of_two / name / "checkpoint-3"))
    assert difference(tmp_path, of_two / name) < 1e-12
    assert [row["step"] for row in logged(tmp_path)[0]] == [4, 5]


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run_with_a_clear_error_and_two_others_go_on_to_the_same_bits(of_two, tmp_path):
    script, runs = str(TESTS / "two_processes.py"), json.dumps([[str(tmp_path / "run"), RUNS["plain"]]])
    died = launch(TORCHRUN, script, runs, "die", folder=tmp_path)
    assert died.returncode != 0
    assert "ConnectionError: another process of this run has ended" in died.stderr
    assert sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    went_on = launch(TORCHRUN, script, runs, "resume", folder=tmp_path)
    assert went_on.returncode == 0, went_on.stderr[-3000:]
    assert went_on.stdout.count("Resumed after step 4.") == 1
    assert difference(tmp_path / "run", of_two / "plain") == 0
    assert logged(tmp_path / "run") == logged(of_two / "plain")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["evaluated, batch std, two updates", "shards", "shards, no KL"])
def test_a_run_of_one_process_goes_on_in_two(of_two, tmp_path, name):
    run(str(tmp_path / "one"), {**RUNS[name], "fsdp": False})
    parts = load_state(tmp_path / "one" / "checkpoint-3")["batch"][0]["parts"]
    assert any(part["no_gradient"] for part in parts) == (name == "shards, no KL")  # of which shards make none
    runs = json.dumps([[str(tmp_path / "two"), RUNS[name]]])
    checkpoint = str(tmp_path / "one" / "checkpoint-3")
    went_on = launch(TORCHRUN, str(TESTS / "two_processes.py"), runs, checkpoint, folder=tmp_path)
    assert went_on.returncode == 0, went_on.stderr[-3000:]
    assert difference(tmp_path / "two", of_two / name) < 1e-12


@pytest.mark.slow
def test_all_processes_start_from_the_weights_of_the_first(differing, tmp_path):
    found, folder = differing
    assert found["weights"][0] == found["weights"][1]
    run(str(tmp_path), {"save_steps": 9})
    assert difference(tmp_path, folder / "weights") < 1e-12


@pytest.mark.slow
def test_data_that_is_shuffled_without_a_seed_is_refused(differing):
    found, _ = differing
    assert len(found["data"]) == 2
    for words in found["data"]:
        assert "the processes of this run have different training data" in words


@pytest.mark.slow
def test_what_rewards_draw_differs_between_processes_and_comes_again_after_a_resume(differing):
    unbroken, resumed = differing[0]["noise"][:2]
    assert unbroken[-len(resumed) :] == resumed
    assert len(set(unbroken)) == len(unbroken)


@pytest.mark.slow
def test_the_model_that_is_sharded_can_be_its_own_judge(differing, tmp_path):
    model = tiny_model(tie_word_embeddings=True).double()
    with pytest.warns(UserWarning, match="demonstration"):
        trainer = run(str(tmp_path), {"max_steps": 2}, model=model, reward=model)
    assert differing[0]["judge"] == [pytest.approx(trainer.log.metrics.read()[-1]["reward"], rel=1e-6)] * 2
    assert difference(tmp_path, differing[1] / "judge") < 1e-12


@pytest.mark.slow
def test_a_process_waits_for_one_that_is_slow_much_longer_than_ten_minutes(differing):
    assert differing[0]["collective timeout"] == [6 * 3600] * 2


@pytest.mark.slow
def test_a_weight_that_one_process_alone_has_used_gets_its_gradient_in_all(differing):
    of_each = [[3.0, 3.0], None, [2.0, 2.0]]  # used by one, by none, by both
    assert differing[0]["gradients"] == of_each * 2


def test_a_process_with_fewer_micro_batches_repeats_its_first_which_counts_nothing(monkeypatch):
    monkeypatch.setattr(Processes, "gather", lambda self, mine: [*mine, 3])  # another has three
    parts = [SimpleNamespace(no_gradient=True), SimpleNamespace(no_gradient=False)]
    assert shards.pad_micro_batches(parts, Processes(2, 0)) == [(parts[0], 2.0), (parts[1], 2.0), (parts[0], 0.0)]
    assert not any(part.no_gradient for part in parts)


def test_being_out_of_memory_is_not_said_of_another_process():
    with pytest.raises((RuntimeError, ConnectionError)) as said, processes.peer_failures_explained():
        raise torch.OutOfMemoryError("mine")
    assert said.type is torch.OutOfMemoryError
    with pytest.raises(ConnectionError, match="another process"), processes.peer_failures_explained():
        raise RuntimeError("connection closed by peer")


@pytest.mark.slow
def test_accelerate_launches_the_command_line_and_one_process_speaks(tmp_path):
    flags = ["--max-steps", "2", "--output-dir", "run", "--device", "cpu"]
    done = launch([*ACCELERATE, "-m"], "grpo_lab.train_grpo", *flags, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("GRPO on pocket") == done.stdout.count("Right answers, sampled") == 1
    assert "2 processes" in done.stdout
    assert len(JsonLines(tmp_path / "run" / "metrics.jsonl").read()) == 2


@pytest.mark.slow
def test_an_error_of_any_process_is_said_and_that_it_is_slow(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import os, time\nfrom grpo_lab.rewards import reward_models\nreward_models.PATIENCE = 0.5\n"
        "def f(prompts, completions):\n    time.sleep(2 * int(os.environ['RANK']))\n"
        "    return [1 / (1 - int(os.environ['RANK']))] * len(completions)\n"
    )
    flags = ["--max-steps", "2", "--output-dir", "run", "--device", "cpu", "--reward", "mine.py:f"]
    done = launch([*TORCHRUN, "-m"], "grpo_lab.train_grpo", *flags, folder=tmp_path)
    assert done.returncode != 0
    assert "rank 1: the reward function 'f' on " in done.stderr
    assert "rank 1: the reward function 'f' raised ZeroDivisionError" in done.stderr
    assert "training/trainer.py" not in done.stderr  # only the launcher prints a traceback


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [0, 1, 5, 7, 64])
def test_shares_are_everything_once_and_in_order(count, size):
    shares = [Processes(count, index).shard_range(size) for index in range(count)]
    assert [i for share in shares for i in share] == list(range(size))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_more_processes_than_prompts_in_a_step_are_refused(tmp_path, monkeypatch):
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "num_processes", 5)
    with pytest.raises(ValueError, match="24 prompts in steps of 4 one step has 4, too few for 5 processes"):
        run(str(tmp_path), {})


def test_one_process_has_nobody_to_share_its_weights_with(tmp_path):
    run(str(tmp_path / "plain"), {"max_steps": 2})
    run(str(tmp_path / "shards"), {"max_steps": 2, "fsdp": True})
    assert difference(tmp_path / "plain", tmp_path / "shards") == 0


def test_shards_and_an_optimizer_that_knows_none_are_refused(tmp_path):
    with pytest.raises(ValueError, match="bitsandbytes takes no shards"):
        run(str(tmp_path), {"fsdp": True, "optimizer": "adamw_8bit"})


@pytest.mark.parametrize("changes", [{"lora_rank": 4}, {"precision": "fp16", "device": "auto"}])
def test_shards_of_an_adapter_or_in_fp16_are_refused(tmp_path, changes, monkeypatch):
    monkeypatch.setattr("grpo_lab.training.trainer.resolve_precision", lambda name, device: name)
    with pytest.raises(ValueError, match="fsdp shards a model that is trained whole"):
        run(str(tmp_path), {"fsdp": True, **changes})
