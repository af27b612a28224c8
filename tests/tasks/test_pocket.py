"""The embedded model: what its card says is so, it can be made again, and it learns."""

import hashlib
import json
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


def test_it_is_small_a_qwen2_and_loads_without_a_network(loaded):
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


def test_its_card_has_the_hash_of_the_weights_and_what_they_can_do(loaded):
    assert hashlib.sha256((pocket.WEIGHTS / "model.safetensors").read_bytes()).hexdigest() == CARD["sha256"]
    measured = make.accuracy(*loaded)
    assert measured == pytest.approx(CARD["held_out_accuracy"]["sampled"], abs=0.01)  # a token may flip elsewhere
    assert 0.15 < measured < 0.40  # something to learn, and something to start from


def test_it_generates_as_any_model_of_transformers():
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


def test_the_careful_author_is_always_right_where_there_is_a_solution_and_the_careless_never():
    random = Random(0)
    solvable = {"right": 0, "wrong": 0}
    near = {prompt for numbers, target, _ in make.near_problems() for prompt in [(tuple(numbers), target)]}
    for share in (1.0, 0.0):
        for _ in range(2000):
            prompt, answer = make.write_line(random, careful_share=share)
            numbers, target = prompt[:-1].split(":")
            if (tuple(sorted(map(int, numbers.split(",")))), int(target)) in near:
                assert not solves(prompt, answer)
            else:
                solvable["right" if solves(prompt, answer) else "wrong"] += 1
                assert solves(prompt, answer) == (share == 1.0)
    assert min(solvable.values()) > 500


def test_it_can_be_made_again(tmp_path, monkeypatch, capsys):
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
