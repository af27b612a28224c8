"""What benchmarks/gpu.py does on a GPU it does here on a CPU, small: the same code."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("gpu", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_path_prints_a_table_and_writes_its_json(tmp_path):
    command = [sys.executable, str(FILE), "decode", "--small", "--device", "cpu", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "decode on cpu" in done.stdout
    assert "these numbers mean nothing" in done.stdout
    result = json.loads((tmp_path / "gpu-decode.json").read_text())
    assert {"device", "date", "python", "torch", "transformers", "accelerate", "peft", "safetensors"} <= result.keys()
    rows = result["rows"]
    assert rows["replayed"]["tokens as in the first row"] == 1.0
    assert all(row["rows"] == 8 and row["tokens a second"] > 0 for row in rows.values())


def test_the_package_need_not_be_installed():
    others = {"PYTHONPATH": str(Path(pytest.__file__).parents[1])}  # without site, which would find an editable install
    help_ = [sys.executable, "-S", str(FILE), "--help"]
    done = subprocess.run(help_, capture_output=True, text=True, env=os.environ | others, cwd=FILE.anchor)
    assert done.returncode == 0, done.stderr
    assert "decode" in done.stdout


@pytest.mark.parametrize("way", ["0.5B, LoRA 16", "0.5B, checkpointing"])
def test_a_step_is_timed_beside_its_plan(gpu, tmp_path, way):
    row = gpu.step(way, "cpu", True, str(tmp_path))
    assert row["seconds"] > 0
    assert row["planned, seconds"] > 0
    assert row["planned, GiB"] > 0.1  # Python and PyTorch alone
    assert row["tokens a step"] == 2 * 4 * (16 + 12)  # prompts x K x what each prompt and completion has


@pytest.mark.slow
def test_the_pocket_model_trains_in_half_precision(gpu, tmp_path):
    row = gpu.precision("bf16", "cpu", True, str(tmp_path))
    assert row["skipped steps"] == 0
    assert row["largest ratio error at step 1"] < 0.5


@pytest.mark.slow
def test_from_nothing_to_four_numbers(gpu, tmp_path):
    row = gpu.four_numbers("large", "cpu", True, str(tmp_path))
    assert row["steps"] == len(row["reward"]) == 2
    assert row["lines read"] > 0


def test_what_cannot_be_measured_here_says_why(gpu):
    assert gpu.left_out("precision", "fp16", "cpu") == "fp16 needs CUDA"
    assert gpu.left_out("step", "0.5B", "cuda") is None
    if importlib.util.find_spec("vllm") is None:
        assert gpu.left_out("vllm", "vllm", "cuda") == "vllm is not installed"
