"""The pocket model: its card is right, its script is reproducible, and it learns."""

import hashlib
import json
from itertools import islice
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

from grpo_lab import pocket
from grpo_lab.cli import main as cli
from grpo_lab.rewards.verifiable import solves
from grpo_lab.tasks.countdown import countdown_problems
from grpo_lab.tasks.pocket import make

CARD = json.loads((pocket.FOLDER / "card.json").read_text())


@pytest.fixture(scope="module")
def loaded():
    return pocket.load()


def test_it_is_a_small_qwen2_that_loads_without_a_network(loaded):
    model, tokenizer = loaded
    assert isinstance(model, Qwen2ForCausalLM)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(p.numel() for p in model.parameters()) == CARD["parameters"] < 1_000_000
    assert sum(file.stat().st_size for file in pocket.WEIGHTS.iterdir()) < 4 * 2**20
    text = "3,5,7:22=(9+8)-4/1*6"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert make.make_tokenizer()(text)["input_ids"] == ids


def test_its_card_has_the_hash_of_the_weights_and_their_accuracy(loaded):
    assert hashlib.sha256((pocket.WEIGHTS / "model.safetensors").read_bytes()).hexdigest() == CARD["sha256"]
    measured = make.accuracy(*loaded)
    # rounding differs between machines, so a token may too
    assert measured == pytest.approx(CARD["held_out_accuracy"]["sampled"], abs=0.01)
    assert 0.15 < measured < 0.40  # neither 0 nor near 1: GRPO has something to start from and something to gain


def test_the_text_of_the_shipped_model_does_not_change():
    # 50 batches of the first phase at seed 0; from other text the script would make other weights
    digest, batches = hashlib.sha256(), make.make_batches(Random(0), make.make_tokenizer(), 1.0)
    for ids, labels in islice(batches, 50):
        digest.update(ids.numpy().tobytes() + labels.numpy().tobytes())
    assert digest.hexdigest()[:16] == "6dc7e8b324caa2d8"


def test_it_generates_with_plain_transformers():
    model = AutoModelForCausalLM.from_pretrained(pocket.WEIGHTS)
    tokenizer = AutoTokenizer.from_pretrained(pocket.WEIGHTS)
    inputs = tokenizer(["3,5,7:15=", "2,2,9:13="], return_tensors="pt", padding=True)
    out = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    answers = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert all(len(answer) == 5 for answer in answers)


def test_no_held_out_problem_occurs_in_the_text_it_was_trained_on():
    held_out = set(countdown_problems("held-out"))
    random = Random(0)
    for _ in range(5000):
        prompt, _ = make.write_line(random, careful_share=0.5)
        numbers, target = prompt[:-1].split(":")
        assert (tuple(sorted(map(int, numbers.split(",")))), int(target)) not in held_out


def test_the_careful_author_is_always_right_on_solvable_problems_and_the_careless_never():
    random = Random(0)
    solvable = {"right": 0, "wrong": 0}
    unsolvable = {(numbers, target) for numbers, target, _ in make.unsolvable_problems()}
    for share in (1.0, 0.0):
        for _ in range(2000):
            prompt, answer = make.write_line(random, careful_share=share)
            numbers, target = prompt[:-1].split(":")
            if (tuple(sorted(map(int, numbers.split(",")))), int(target)) in unsolvable:
                assert not solves(prompt, answer)
            else:
                solvable["right" if solves(prompt, answer) else "wrong"] += 1
                assert solves(prompt, answer) == (share == 1.0)
    assert min(solvable.values()) > 500


def test_the_script_makes_the_same_weights_twice(tmp_path, monkeypatch, capsys):
    for name in ("a", "b"):
        monkeypatch.setattr("sys.argv", ["make", "--output", str(tmp_path / name), "--steps", "3", "2"])
        make.main()
    same = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert same[0] == same[1]
    assert json.loads((tmp_path / "a/card.json").read_text())["steps"] == [3, 2]


@pytest.mark.slow
def test_the_default_run_learns(tmp_path, capsys):
    assert cli.main(["train", "--output-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    print(out)

    def shares(label):
        lines = [line for line in out.splitlines() if line.strip().startswith(f"right, {label}:")]
        return [float(line.split(":")[1].split("%")[0]) / 100 for line in lines]

    sampled, greedy = shares("sampled"), shares("greedy")
    assert sampled[0] <= 0.40
    assert sampled[1] >= 0.80
    assert greedy[1] >= max(0.85, greedy[0])
    assert "Settings: preset pocket; changed: output_dir=" in out
    assert {p.name for p in tmp_path.iterdir()} == {
        "checkpoint-50", "checkpoint-100", "final_model", "metrics.jsonl", "completions.jsonl", "training.png",
    }  # fmt: skip
