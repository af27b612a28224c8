"""Pre-training: the loss falls, the seed decides the model, and `grpo-lab train` takes the saved folder."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_lab.cli import main as cli
from grpo_lab.tasks import pretraining
from grpo_lab.tasks.character_model import make_tokenizer
from grpo_lab.tasks.countdown import countdown_dataset, countdown_expressions
from grpo_lab.tasks.countdown_text import batches, make_corpus
from grpo_lab.tasks.pretraining import pretrain

TOKENIZER = make_tokenizer()


# --- training ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_lowers_the_loss(precision):
    model = tiny_model(initializer_range=0.02)
    text = batches(make_corpus(4), 32, 1.0, torch.Generator().manual_seed(0))
    result = pretraining.train_lm(model, text, learning_rate=3e-3, muon=True, steps=60, precision=precision)
    assert result["steps"] == 60
    assert result["loss"] < 0.6 * math.log(len(TOKENIZER))  # untrained: all 21 tokens equally likely
    assert not model.training
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_one_gradient_that_is_not_finite_leaves_all_weights_finite_in_fp16():
    calls = []
    torch.manual_seed(0)
    model = pretraining.make_model(TOKENIZER, hidden_size=16, layers=1, heads=2)

    def broken(gradient):
        calls.append(gradient)
        return gradient * torch.nan if len(calls) == 2 else gradient

    model.model.layers[0].mlp.up_proj.weight.register_hook(broken)  # Muon's; the others are AdamW's
    text = batches(make_corpus(3), 4, 1.0, torch.Generator().manual_seed(0))
    before = model.model.embed_tokens.weight.clone()
    pretraining.train_lm(model, text, learning_rate=1e-3, muon=True, steps=4, precision="fp16")
    assert len(calls) == 4
    assert all(p.isfinite().all() for p in model.parameters())
    assert not torch.equal(model.model.embed_tokens.weight, before)


def test_training_for_some_seconds_ends_in_time_at_the_lowest_learning_rate(monkeypatch):
    now, rates = iter(range(1000)), []
    monkeypatch.setattr(pretraining.time, "perf_counter", lambda: next(now))
    make = pretraining.make_optimizers
    optimizers = []

    def watched(*arguments, **settings):
        optimizers.extend(make(*arguments, **settings))
        optimizers[0].register_step_post_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
        return optimizers

    monkeypatch.setattr(pretraining, "make_optimizers", watched)
    text = batches(make_corpus(4), 2, 1.0, torch.Generator().manual_seed(0))
    assert pretraining.train_lm(tiny_model(), text, learning_rate=1.0, muon=False, seconds=100)["steps"] == 99
    assert rates[0] == pytest.approx(0.2)  # warmup takes 5 % of the time: after 1 second of 100, a fifth
    assert max(rates) > 0.99
    assert rates[-1] == pytest.approx(0.02, abs=0.001)


@pytest.fixture
def tiny_size(monkeypatch):
    """Replace the small size by one that trains in a second."""
    small = replace(pretraining.SIZES["small"], hidden_size=16, heads=2, batch=8, steps=6)
    monkeypatch.setitem(pretraining.SIZES, "small", small)


def test_the_same_seed_and_steps_make_the_same_model(tiny_size):
    state = torch.random.get_rng_state()
    (first, _, card), (again, _, _), (other, _, _) = (pretrain(steps=5, seed=seed, device="cpu") for seed in (1, 1, 2))
    weights = [torch.cat([p.flatten() for p in model.parameters()]) for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.random.get_rng_state(), state)  # the caller's RNG state is unchanged
    assert card["steps"] == [4, 1]
    assert card["lines"] == 5 * 8
    assert card["seed"] == 1


def test_a_size_has_its_own_number_of_steps_and_seconds_may_replace_it(tiny_size):
    assert sum(pretrain(device="cpu")[2]["steps"]) == 6
    card = pretrain(seconds=0.2, device="cpu")[2]
    assert card["budget"] == "0.2 seconds"
    assert min(card["steps"]) >= 1


def test_sizes_are_as_large_as_they_say():
    def millions(name):
        size = pretraining.SIZES[name]
        model = pretraining.make_model(TOKENIZER, hidden_size=size.hidden_size, layers=size.layers, heads=size.heads)
        return sum(p.numel() for p in model.parameters()) / 1e6

    assert millions("small") == pytest.approx(0.13, abs=0.01)
    assert millions("medium") == pytest.approx(1.05, abs=0.05)
    assert 10 < millions("large") < 50


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": "huge"}, r"no size 'huge'\. Sizes: small, medium, large"),
        ({"steps": 5, "seconds": 1.0}, "give steps or seconds, not both; got 5 and 1.0"),
        ({"steps": 1}, "steps must be at least 2, seconds more than 0, got 1"),
        ({"seconds": 0.0}, "steps must be at least 2, seconds more than 0, got 0.0"),
        ({"seconds": math.nan}, "seconds more than 0, got nan"),
        ({"seconds": math.inf}, "seconds more than 0, got inf"),
        ({"numbers": 5}, "Countdown has 3 or 4 numbers here, got 5"),
        ({"device": "abacus"}, "device must be auto, cuda, cpu or mps"),
        ({"device": "cpu", "precision": "fp16"}, "fp16 needs CUDA"),
        ({"seed": -1}, "seed must be from 0 to"),
    ],
)
def test_invalid_arguments_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        pretrain(**settings)


# --- evaluation, saving, command line ---------------------------------------------------------------------


def test_its_folder_loads_with_plain_transformers(tiny_size, tmp_path):
    model, tokenizer, card = pretrain(device="cpu")
    pretraining.save(tmp_path / "model", model, tokenizer, card)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    reader = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    inputs = reader(["3,5,7,2:15=", "9,9,9,9:1="], return_tensors="pt", padding=True)
    torch.testing.assert_close(model(**inputs).logits, loaded(**inputs).logits)
    assert loaded.generate(**inputs, max_new_tokens=3, do_sample=False).shape == (2, 14)
    assert json.loads((tmp_path / "model/card.json").read_text()) == card
    assert card["parameters"] == sum(p.numel() for p in loaded.parameters())
    for shares in card["held_out"].values():
        assert all(0 <= share <= 1 for share in shares.values())
        assert shares.keys() == {"sampled", "greedy", "pass@8"}


def test_accuracy_counts_the_problems_that_the_model_solves():
    model, held_out = tiny_model(), countdown_dataset(5, numbers=4, split="held-out").columns["prompt"]
    solution = {}
    for prompt in held_out:
        chosen, target = prompt.rstrip("=").split(":")
        solution[prompt] = countdown_expressions(tuple(sorted(map(int, chosen.split(",")))))[int(target)][0]

    class Solver(torch.nn.Module):
        """Writes the solution of every prompt but the first."""

        device = torch.device("cpu")

        def forward(self, *_, **__):
            raise AssertionError("sample is patched")

    def sample(_, ids, mask, *, num_generations, **__):
        prompts = TOKENIZER.batch_decode(ids, skip_special_tokens=True)
        texts = [
            "1" if prompt == held_out[0] else solution[prompt] for prompt in prompts for _ in range(num_generations)
        ]
        rows = TOKENIZER(texts, padding=True, return_tensors="pt")["input_ids"]
        return type("Rollouts", (), {"completion_ids": rows})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretraining, "sample", sample)
        assert (
            pretraining.solved_mask(Solver(), TOKENIZER, numbers=4, size=5, K=2).tolist()
            == [[False] * 2] + [[True] * 2] * 4
        )
        assert pretraining.accuracy(Solver(), TOKENIZER, numbers=4, size=5) == 0.8
    assert pretraining.accuracy(model, TOKENIZER, numbers=4, size=5) == 0.0


def test_pretrain_and_then_train_from_the_command_line(tiny_size, tmp_path, capsys):
    folder, prompts = str(tmp_path / "model"), tmp_path / "prompts.txt"
    arguments = ["pretrain", "--output-dir", folder, "--steps", "4", "--device", "cpu"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "after the careful author: " in out
    assert f"grpo-lab train --preset countdown4 --model-name {folder}" in out
    assert json.loads((tmp_path / "model/card.json").read_text())["steps"] == [3, 1]

    prompts.write_text("\n".join(countdown_dataset(8, numbers=4).columns["prompt"]))
    train = ["train", "--preset", "countdown4", "--model-name", folder, "--dataset", str(prompts)]
    train += ["--reward", "countdown", "--output-dir", str(tmp_path / "run"), "--warmup-steps", "0"]
    train += ["--max-steps", "2", "--batch-size", "4", "--num-generations", "4"]
    assert cli.main([*train, "--device", "cpu"]) == 0
    assert "2 optimizer steps of 4 prompts × 4 completions" in capsys.readouterr().out
    assert (tmp_path / "run/final_model/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "huge"], "there is no size 'huge'"),
        (["--steps", "1"], "steps must be at least 2"),
        (["--seconds", "-3"], "seconds more than 0, got -3.0"),
        (["--device", "abacus"], "device must be auto, cuda, cpu or mps"),
    ],
)
def test_bad_flags_get_one_sentence(tmp_path, capsys, arguments, message):
    assert cli.main(["pretrain", "--output-dir", str(tmp_path / "model"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("grpo-lab: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_folder_that_cannot_be_made_is_named_before_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pretraining, "pretrain", None)
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file/model"):
        assert cli.main(["pretrain", "--output-dir", str(folder)]) == 2
        assert "Not a directory: " in capsys.readouterr().err


def test_a_folder_with_files_is_replaced_only_with_overwrite_output_dir(tiny_size, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    arguments = ["pretrain", "--output-dir", str(tmp_path), "--steps", "2", "--device", "cpu"]
    assert cli.main(arguments) == 2
    assert "is not empty. Replace what it holds: --overwrite-output-dir" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert cli.main([*arguments, "--overwrite-output-dir"]) == 0
    assert (tmp_path / "model.safetensors").is_file()


def test_no_optional_package_is_needed():
    code = (
        "import sys\n"
        "for name in ('datasets', 'peft', 'wandb', 'ipywidgets', 'matplotlib', 'trl'): sys.modules[name] = None\n"
        "from dataclasses import replace\n"
        "from grpo_lab.tasks import pretraining\n"
        "pretraining.SIZES['small'] = replace(pretraining.SIZES['small'], hidden_size=16, heads=2, batch=8)\n"
        "print(pretraining.pretrain(steps=2, device='cpu')[2]['lines'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "16"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_on_cuda_the_large_model_trains_for_ten_seconds(precision):
    model, _, card = pretrain("large", seconds=10, device="cuda", precision=precision)
    assert model.device.type == "cuda"
    assert card["loss"][0] < 1.0


@pytest.mark.slow
def test_the_small_model_is_pretrained_and_learns_by_grpo(tmp_path):
    from grpo_lab import GRPOConfig, GRPOTrainer
    from grpo_lab.rewards import verifiable as rewards

    torch.set_num_threads(1)
    model, tokenizer, card = pretrain("small", device="cpu")
    before = card["held_out"]["both authors"]["sampled"]
    assert 0.02 < before < 0.2 < card["held_out"]["the careful author"]["sampled"]
    config = GRPOConfig.preset("countdown4", output_dir=tmp_path)
    problems = countdown_dataset(8192, numbers=4)
    GRPOTrainer(model, None, rewards.countdown, tokenizer, config, problems).train()
    assert pretraining.held_out_accuracy(model, tokenizer, 4)["sampled"] > before + 0.15
