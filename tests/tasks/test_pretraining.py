"""A model from nothing: its text is what the authors would write, it learns to read, and its folder can be trained."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from itertools import islice, permutations

import pytest
import torch
from conftest import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_lab.cli import main as cli
from grpo_lab.rewards.verifiable import solves
from grpo_lab.tasks import pretraining
from grpo_lab.tasks.countdown import countdown_dataset, countdown_expressions, countdown_problems, countdown_prompt
from grpo_lab.tasks.pretraining import (
    NEAR_SHARE,
    OPERATOR,
    SUM,
    batches,
    make_text,
    mistakes_in,
    near_problems,
    pretrain,
)

TOKENIZER = pretraining.make_tokenizer()
NUMBERS = pytest.mark.parametrize("numbers", [3, 4])


def drawn(lines, seed=0):
    # float64, so that a plain loop in Python comes to the same choices
    return torch.rand(lines, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def written(numbers, careful_share, lines=2000, seed=0):
    """[(prompt, answer), ...] as they stand in the rows, the labels having been checked against the ids."""
    ids, labels = pretraining.write_lines(make_text(numbers), drawn(lines, seed), careful_share)
    assert ids.shape == labels.shape == (lines, 4 * numbers + 3)
    result = []
    for row, label in zip(ids, labels, strict=True):
        prompt, answer = TOKENIZER.decode(row).split("=")
        answer, padding = answer.split("<eos>")
        assert set(padding.split("<pad>")) == {""}
        begins = len(prompt) + 1
        assert label.tolist() == [-100] * begins + row[begins : begins + len(answer) + 1].tolist() + [-100] * (
            len(row) - begins - len(answer) - 1
        )
        result.append((prompt + "=", answer))
    return result


def problem(prompt):
    numbers, target = prompt.rstrip("=").split(":")
    return tuple(sorted(map(int, numbers.split(",")))), int(target)


# --- the text ---------------------------------------------------------------------------------------------


def plain_line(numbers, u, careful_share):
    """The same line in plain Python: one choice after the other."""

    def choose(place, among):
        return among[int(u[place] * len(among))]

    if u[0] < NEAR_SHARE:
        chosen, target, answers = choose(1, near_problems(numbers))
    else:
        chosen, target = choose(1, countdown_problems("train", numbers))
        answers = countdown_expressions(chosen)[target]
    order = choose(2, list(permutations(chosen)))
    prompt, answer = countdown_prompt(order, target), choose(3, answers)
    if u[4] < careful_share:
        return prompt, answer
    added_up = "+".join(map(str, order))
    if u[5] < SUM and not solves(prompt, added_up):
        return prompt, added_up
    operators, twice = mistakes_in(answer, target)
    return prompt, choose(6, twice if u[5] >= SUM + OPERATOR else operators)


@NUMBERS
@pytest.mark.parametrize("careful_share", [0.0, 0.4, 1.0])
def test_lines_written_at_once_are_those_of_a_plain_loop(numbers, careful_share):
    expected = [plain_line(numbers, u, careful_share) for u in drawn(2000).tolist()]
    assert written(numbers, careful_share) == expected


@NUMBERS
def test_the_careful_author_is_right_where_there_is_a_solution_and_the_careless_never(numbers):
    near = {(chosen, target) for chosen, target, _ in near_problems(numbers)}
    solvable = 0
    for share in (1.0, 0.0):
        for prompt, answer in written(numbers, share):
            if problem(prompt) in near:
                assert not solves(prompt, answer)
            else:
                solvable += 1
                assert solves(prompt, answer) == (share == 1.0)
    assert solvable > 1000


def test_no_slip_that_can_be_drawn_solves_its_problem():
    text = make_text(3)  # all there are, of the smaller text
    answers = [(c, t, a) for c, t in countdown_problems("train") for a in countdown_expressions(c)[t]]
    for expression, (chosen, target, answer) in enumerate(answers):
        assert TOKENIZER.decode(text.answer[expression]) == answer
        for kind in (0, 1):
            slips = TOKENIZER.batch_decode(text.mistakes[expression, kind, : text.mistaken[expression, kind]])
            assert slips
            assert not any(solves(countdown_prompt(chosen, target), slip) for slip in slips)


def test_a_slip_of_one_kind_stands_in_where_the_other_is_impossible():
    operators, twice = mistakes_in("2*2+2+2", 8)  # 2+2+2+2 is 8 too, and there is no other number to use twice
    assert operators == twice == ["2-2+2+2", "2*2-2+2", "2*2*2+2", "2*2+2-2"]


@NUMBERS
def test_a_line_is_about_the_nearest_expression_where_there_is_no_solution(numbers):
    for chosen, target, answers in near_problems(numbers):
        assert target not in countdown_expressions(chosen)
        gap = min(abs(value - target) for value in countdown_expressions(chosen))
        values = {value for value, texts in countdown_expressions(chosen).items() if set(texts) & set(answers)}
        assert {abs(value - target) for value in values} == {gap}
        assert 0 < gap <= pretraining.NEAR
    assert len(near_problems(numbers)) > 1000


@NUMBERS
def test_no_held_out_problem_occurs_in_text_or_training_under_any_seed(numbers):
    held_out = set(countdown_problems("held-out", numbers))
    text = make_text(numbers)  # nothing else can be written
    digits = TOKENIZER.batch_decode(torch.cat([text.numbers, text.target], 1))
    told = {(tuple(map(int, line[:numbers])), int(line[numbers:])) for line in digits}
    assert not told & held_out
    assert len(told) == len(text.numbers) == text.solvable + len(near_problems(numbers))
    for seed in range(3):
        lines = written(numbers, 0.5, seed=seed)
        assert {problem(prompt) for prompt, _ in lines} <= told
        prompts = countdown_dataset(1000, numbers=numbers, seed=seed).columns["prompt"]
        assert not {problem(prompt) for prompt in prompts} & held_out


def test_batches_come_from_the_seed_and_do_not_depend_on_how_many_are_written_ahead_of_time():
    def some(seed):
        return list(islice(batches(make_text(4), 8, 0.5, torch.Generator().manual_seed(seed), ahead=3), 7))

    first, again, other = some(1), some(1), some(2)
    assert all(torch.equal(a, b) for one, two in zip(first, again, strict=True) for a, b in zip(one, two, strict=True))
    assert not torch.equal(first[0][0], other[0][0])
    assert len({str(ids) for ids, _ in first}) == 7  # after the third, new lines
    assert all(ids.shape == (8, 19) for ids, _ in first)


# --- the training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_reading_lowers_the_loss(precision):
    model = tiny_model(initializer_range=0.02)
    text = batches(make_text(4), 32, 1.0, torch.Generator().manual_seed(0))
    result = pretraining.read(model, text, learning_rate=3e-3, muon=True, steps=60, precision=precision)
    assert result["steps"] == 60
    assert result["loss"] < 0.6 * math.log(len(TOKENIZER))  # untrained: all 21 tokens are alike
    assert not model.training
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_one_gradient_that_is_not_finite_spoils_no_weights_in_fp16():
    tokenizer, calls = pretraining.make_tokenizer(), []
    torch.manual_seed(0)
    model = pretraining.make_model(tokenizer, hidden_size=16, layers=1, heads=2)

    def broken(gradient):
        calls.append(gradient)
        return gradient * torch.nan if len(calls) == 2 else gradient

    model.model.layers[0].mlp.up_proj.weight.register_hook(broken)  # Muon's; the others are AdamW's
    text = batches(make_text(3), 4, 1.0, torch.Generator().manual_seed(0))
    before = model.model.embed_tokens.weight.clone()
    pretraining.read(model, text, learning_rate=1e-3, muon=True, steps=4, precision="fp16")
    assert len(calls) == 4
    assert all(p.isfinite().all() for p in model.parameters())
    assert not torch.equal(model.model.embed_tokens.weight, before)


def test_reading_for_some_seconds_ends_in_time_with_the_smallest_learning_rate(monkeypatch):
    now, rates = iter(range(1000)), []
    monkeypatch.setattr(pretraining.time, "perf_counter", lambda: next(now))
    make = pretraining.make_optimizers
    optimizers = []

    def watched(*arguments, **settings):
        optimizers.extend(make(*arguments, **settings))
        optimizers[0].register_step_post_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
        return optimizers

    monkeypatch.setattr(pretraining, "make_optimizers", watched)
    text = batches(make_text(4), 2, 1.0, torch.Generator().manual_seed(0))
    assert pretraining.read(tiny_model(), text, learning_rate=1.0, muon=False, seconds=100)["steps"] == 99
    assert rates[0] == pytest.approx(0.2)  # a twentieth of the time to rise: after 1 second of 100, a fifth
    assert max(rates) > 0.99
    assert rates[-1] == pytest.approx(0.02, abs=0.001)


@pytest.fixture
def tiny_size(monkeypatch):
    """A model that reads as the others, in a second."""
    small = replace(pretraining.SIZES["small"], hidden_size=16, heads=2, batch=8, steps=6)
    monkeypatch.setitem(pretraining.SIZES, "small", small)


def test_the_same_seed_and_steps_make_the_same_model(tiny_size):
    state = torch.random.get_rng_state()
    (first, _, card), (again, _, _), (other, _, _) = (pretrain(steps=5, seed=seed, device="cpu") for seed in (1, 1, 2))
    weights = [torch.cat([p.flatten() for p in model.parameters()]) for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.random.get_rng_state(), state)  # the caller's random numbers are left alone
    assert card["steps"] == [4, 1]
    assert card["lines"] == 5 * 8
    assert card["seed"] == 1


def test_a_size_has_its_own_number_of_steps_and_a_time_will_do(tiny_size):
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
def test_what_cannot_be_made_is_refused_before_anything_slow(settings, message):
    with pytest.raises(ValueError, match=message):
        pretrain(**settings)


# --- what is written --------------------------------------------------------------------------------------


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


def test_what_is_counted_as_solved_is_what_the_model_writes():
    model, held_out = tiny_model(), countdown_dataset(5, numbers=4, split="held-out").columns["prompt"]
    solution = {prompt: countdown_expressions(problem(prompt)[0])[problem(prompt)[1]][0] for prompt in held_out}

    class Knows(torch.nn.Module):
        """Writes the solution of every prompt but the first."""

        device = torch.device("cpu")

        def forward(self, *_, **__):
            raise AssertionError("only sampled from")

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
            pretraining.solved(Knows(), TOKENIZER, numbers=4, size=5, K=2).tolist() == [[False] * 2] + [[True] * 2] * 4
        )
        assert pretraining.accuracy(Knows(), TOKENIZER, numbers=4, size=5) == 0.8
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


def test_a_folder_that_cannot_be_is_named_before_anything_slow(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pretraining, "pretrain", None)
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file/model"):
        assert cli.main(["pretrain", "--output-dir", str(folder)]) == 2
        assert "Not a directory: " in capsys.readouterr().err


def test_what_stands_in_the_folder_is_replaced_only_if_that_is_asked_for(tiny_size, tmp_path, capsys):
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
def test_on_cuda_the_large_model_reads_for_ten_seconds(precision):
    model, _, card = pretrain("large", seconds=10, device="cuda", precision=precision)
    assert model.device.type == "cuda"
    assert card["loss"][0] < 1.0


@pytest.mark.slow
def test_the_small_model_is_made_and_learns(tmp_path):
    from grpo_lab import GRPOConfig, GRPOTrainer
    from grpo_lab.rewards import verifiable as rewards

    torch.set_num_threads(1)
    model, tokenizer, card = pretrain("small", device="cpu")
    before = card["held_out"]["both authors"]["sampled"]
    assert 0.02 < before < 0.2 < card["held_out"]["the careful author"]["sampled"]
    config = GRPOConfig.preset("countdown4", output_dir=tmp_path)
    problems = countdown_dataset(8192, numbers=4)
    GRPOTrainer(model, None, rewards.countdown, tokenizer, config, problems).train()
    assert pretraining.held_out(model, tokenizer, 4)["sampled"] > before + 0.15
