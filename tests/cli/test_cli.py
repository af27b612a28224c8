"""The command line: every setting is a flag, presets and flags are told apart, and mistakes get one sentence."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from grpo_lab.cli import main as cli
from grpo_lab.cli.parser import config_from
from grpo_lab.training.config import PRESETS, GRPOConfig

ROOT = Path(__file__).parents[2]
QUICK = ["--max-steps", "2", "--batch-size", "2", "--gradient-accumulation-steps", "1", "--max-new-tokens", "4"]
QUICK += ["--warmup-steps", "0", "--logging-steps", "1", "--num-generations", "2"]


@pytest.fixture
def train(model_folder, tmp_path, capsys):
    """Run `grpo-lab train` on the tiny model: (exit status, what it printed, its complaint)."""

    def run(*arguments, model=model_folder, quick=True):
        output = [] if "--output-dir" in arguments else ["--output-dir", str(tmp_path / "out")]
        status = cli.main(["train", "--model-name", model, *output, *(QUICK if quick else []), *arguments])
        captured = capsys.readouterr()
        complaint = [line for line in captured.err.splitlines() if line.startswith("grpo-lab:")]
        return status, captured.out, " ".join(complaint)

    return run


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("1+1=\n2+2=\n\n3+3=\n")
    return str(file)


def parse(*arguments):
    return config_from(cli.make_parser().parse_args(["train", *arguments]))


# --- flags -----------------------------------------------------------------------------------------------


def test_every_setting_is_a_flag_with_its_docstring_as_help(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in fields(GRPOConfig):
        assert "--" + field.name.replace("_", "-") in text
        assert " ".join(GRPOConfig.docs()[field.name].split()[:4]) in text, field.name


def test_flags_win_over_the_preset_and_the_start_is_said():
    config, source = parse("--model-name", "some/model", "--preset", "dapo", "--clip-range-high", "0.5", "--top-k", "0")
    assert (config.aggregation, config.clip_range_high, config.top_k) == ("token-mean", 0.5, 0)
    assert "preset dapo" in source
    assert "clip_range_high=0.5" in source


def test_another_model_starts_from_the_seeds_defaults_and_the_pocket_model_from_its_own():
    assert parse("--model-name", "some/model")[0] == GRPOConfig()
    assert parse()[0] == GRPOConfig.preset("pocket")
    config, source = parse("--preset", "dr_grpo")
    assert config == GRPOConfig(**{**PRESETS["pocket"], **PRESETS["dr_grpo"]})
    assert "preset pocket + preset dr_grpo" in source


def test_flags_without_a_value_and_with_several():
    config, _ = parse(
        "--use-wandb", "--gradient-checkpointing", "--reward-weights", "1", "2.5", "--report-to", "tensorboard"
    )
    assert config.use_wandb
    assert config.gradient_checkpointing
    assert config.reward_weights == (1.0, 2.5)
    assert config.trackers == ("wandb", "tensorboard")
    assert not parse("--no-disable-dropout")[0].disable_dropout


@pytest.mark.parametrize(
    "command",
    [["grpo_lab/train_grpo.py"], ["-m", "grpo_lab.train_grpo"], ["-m", "grpo_lab.cli", "train"]],
    ids=["file", "module", "cli"],
)
def test_three_ways_to_start_it(command):
    result = subprocess.run([sys.executable, *command, "--batch-size", "0"], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "grpo-lab: batch_size must be at least 1, got 0.\n"


# --- a run -----------------------------------------------------------------------------------------------


def test_a_run_says_what_it_does_and_writes_the_tree(train, prompts, tmp_path):
    reward = tmp_path / "mine.py"
    reward.write_text("def short(prompts, completions):\n    return [-len(c) / 4 for c in completions]\n")
    status, out, _ = train("--dataset", prompts, "--reward", f"{reward}:short", "--save-steps", "1")
    assert status == 0
    assert "3 prompts · 2 optimizer steps of 2 prompts × 2 completions = 4" in out
    assert "the defaults of GRPOConfig; changed: " in out
    assert out.count("→") == 6  # three completions before, three after
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {
        "checkpoint-1", "checkpoint-2", "final_model", "metrics.jsonl", "completions.jsonl", "training.png",
    }  # fmt: skip


@pytest.mark.filterwarnings("default")
def test_without_reward_and_dataset_the_policy_judges_itself_with_a_warning(train):
    status, out, complaint = train("--kl-coef", "0")
    assert status == 0
    assert "is a demonstration" in complaint
    assert "using a few example prompts" in out


@pytest.mark.parametrize("name", ["data.jsonl", "data.csv", "data.parquet"])
def test_dataset_files_of_every_kind_with_answers(train, tmp_path, name):
    import datasets

    data = datasets.Dataset.from_dict({"question": ["2+2=", "3+3="], "answer": ["4", "6"]})
    write = {"jsonl": data.to_json, "csv": data.to_csv, "parquet": data.to_parquet}[name.split(".")[1]]
    write(str(tmp_path / name))
    file = str(tmp_path / name)
    arguments = ["--dataset", file, "--prompt-column", "question", "--eval-dataset", file]
    status, out, complaint = train(*arguments, "--reward", "exact_answer", "--reward", r"format:\d+")
    assert (status, complaint) == (0, "")
    assert "right, greedy" in out
    row = json.loads((tmp_path / "out/completions.jsonl").read_text().splitlines()[0])
    assert set(row["rewards"]) == {"exact_answer", "format_reward"}


def test_max_train_samples_takes_the_first_prompts(train, prompts):
    assert "1 prompts" in train("--dataset", prompts, "--max-train-samples", "1", "--reward", "format:.")[1]


def test_a_reward_model_from_a_folder(train, prompts, tmp_path, tokenizer):
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=16, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    Qwen2ForSequenceClassification(config).save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    status, _, complaint = train("--dataset", prompts, "--reward-model", str(tmp_path / "judge"))
    assert (status, complaint) == (0, "")


def test_resume_goes_on_and_the_result_loads(train, prompts, tmp_path):
    common = ["--dataset", prompts, "--reward", "format:1.*", "--save-steps", "1"]
    assert train(*common)[0] == 0
    shutil.rmtree(tmp_path / "out" / "checkpoint-2")  # as if the run had stopped before it
    status, _, complaint = train(*common, "--resume")
    assert (status, complaint) == (0, "")
    steps = [json.loads(line)["step"] for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out/final_model")


# --- mistakes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-generations", "1"], "num_generations_per_prompt must be at least 2, got 1"),
        (["--learning-rate", "nan"], "learning_rate must be greater than 0"),
        (["--learning-rate", "-1"], "learning_rate must be greater than 0"),
        (["--temperature", "0"], "temperature must be greater than 0"),
        (["--top-p", "1.5"], "top_p must be greater than 0 and at most 1, got 1.5"),
        (["--device", "tpu"], "device must be auto, cuda, cpu or mps, got 'tpu'"),
        (["--precision", "fp16", "--device", "cpu"], "precision fp16 needs CUDA"),
        (["--dataset", "missing.txt"], "there is no file missing.txt"),
        (["--reward", "nonsense"], "there is no reward 'nonsense'. Use countdown"),
        (["--reward", "format:("], "is not a regular expression"),
        (["--reward", "missing.py:f"], "there is no file missing.py"),
        (["--reward-model", "./nowhere"], "there is no folder ./nowhere"),
        (["--model-name", "./nowhere"], "there is no folder ./nowhere"),
        (["--resume"], "there is no checkpoint to resume from"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_a_mistake_gets_one_sentence_and_status_2(train, arguments, message):
    status, _, complaint = train("--reward", "format:.", *arguments)
    assert status == 2
    assert message in complaint


@pytest.mark.parametrize("arguments", [["--batch-size", "many"], ["--preset", "magic"], ["--no-such-flag"]], ids=str)
def test_what_argparse_refuses_has_status_2_too(train, arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        train(*arguments)
    assert caught.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_no_cuda_is_said_plainly(train):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    status, _, complaint = train("--device", "cuda")
    assert status == 2
    assert "there is no cuda device here" in complaint
    assert "Use --device auto" in complaint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ('{"prompt": "a"}\n{"prompt": \n', "could not read"),
        ('{"text": "a"}\n', "no column 'prompt', only text"),
    ],
    ids=["empty", "broken", "column"],
)
def test_a_bad_dataset_file_is_named(train, tmp_path, content, message):
    file = tmp_path / "data.jsonl"
    file.write_text(content)
    status, _, complaint = train("--dataset", str(file))
    assert status == 2
    assert message in complaint
    assert "data.jsonl" in complaint


def test_an_occupied_output_folder_is_not_touched(train, prompts, tmp_path):
    common = ["--dataset", prompts, "--reward", "format:1.*"]
    assert train(*common)[0] == 0
    before = (tmp_path / "out/metrics.jsonl").read_bytes()
    status, _, complaint = train(*common)
    assert status == 2
    assert all(flag in complaint for flag in ("--overwrite-output-dir", "--output-dir"))
    assert (tmp_path / "out/metrics.jsonl").read_bytes() == before
    assert train(*common, "--overwrite-output-dir")[0] == 0


def test_an_unwritable_output_folder_is_said(train, prompts, tmp_path):
    (tmp_path / "file").write_text("in the way")
    status, _, complaint = train(
        "--dataset", prompts, "--reward", "format:.", "--output-dir", str(tmp_path / "file" / "out")
    )
    assert status == 2
    assert "cannot write to" in complaint


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("file", ["training_state.pt", "model.safetensors"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(train, prompts, tmp_path, file):
    common = ["--dataset", prompts, "--reward", "format:1.*", "--save-steps", "1"]
    assert train(*common)[0] == 0
    damaged = tmp_path / "out/checkpoint-2" / file
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1  # a single bit
    damaged.write_bytes(content)
    status, _, complaint = train(*common, "--resume")
    assert status == 0
    assert re.search(r"checkpoint-2 cannot be used .*has changed.* Going on from checkpoint-1", complaint)
    status, _, complaint = train(*common, "--resume", str(tmp_path / "nowhere"))
    assert status == 2
    assert "is not a checkpoint" in complaint


def test_a_reward_function_that_raises_is_named_and_the_traceback_is_one_flag_away(train, prompts, tmp_path):
    reward = tmp_path / "mine.py"
    reward.write_text("def bad(prompts, completions):\n    return [1 / 0 for c in completions]\n")
    arguments = ["--dataset", prompts, "--reward", f"{reward}:bad", "--overwrite-output-dir"]
    status, _, complaint = train(*arguments)
    assert status == 2
    assert "the reward function 'bad' raised ZeroDivisionError" in complaint
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        train(*arguments, "--debug")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def f(:", "cannot be imported: SyntaxError"),
        ("import nothing_of_the_kind", "cannot be imported: ModuleNotFoundError"),
        ("raise SystemExit(0)", "cannot be imported: SystemExit"),
        ("g = 1", "has no function 'f'"),
        ("f = lambda prompts, completions, missing: []", "needs the column 'missing', and train_dataset has prompt"),
    ],
)
def test_a_bad_reward_file_is_named(train, prompts, tmp_path, code, message):
    (tmp_path / "mine.py").write_text(code)
    status, _, complaint = train("--dataset", prompts, "--reward", f"{tmp_path / 'mine.py'}:f")
    assert status == 2
    assert message in complaint


def test_a_reward_file_may_hold_dataclasses_and_import_its_neighbours(train, prompts, tmp_path):
    (tmp_path / "neighbour_of_mine.py").write_text("ONE = 1.0\n")
    (tmp_path / "mine2.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom neighbour_of_mine import ONE\n"
        "@dataclass\nclass A:\n    x: int = 1\ndef f(prompts, completions):\n    return [ONE] * len(completions)\n"
    )
    assert train("--dataset", prompts, "--reward", f"{tmp_path / 'mine2.py'}:f")[0] == 0


def test_a_damaged_or_headless_model_is_named(train, prompts, tmp_path, model_folder):
    shutil.copytree(model_folder, tmp_path / "broken")
    (tmp_path / "broken/model.safetensors").write_bytes(b"")
    status, _, complaint = train("--dataset", prompts, "--reward", "format:.", model=str(tmp_path / "broken"))
    assert status == 2
    assert "could not load the model" in complaint
    status, _, complaint = train("--dataset", prompts, "--reward-model", model_folder)
    assert status == 2
    assert "a reward model needs one output" in complaint


def test_an_unknown_tracker_is_refused_before_training(train, prompts):
    status, _, complaint = train("--dataset", prompts, "--reward", "format:.", "--report-to", "notebook_paper")
    assert status == 2
    assert "the tracker 'notebook_paper' is not installed" in complaint


def test_a_fault_of_a_library_is_one_sentence_too(train, prompts, monkeypatch):
    from grpo_lab.training import trainer

    def broken(*_, **__):
        raise RuntimeError("unheard of")

    monkeypatch.setattr(trainer.GRPOTrainer, "evaluate", broken)
    status, _, complaint = train("--dataset", prompts, "--eval-dataset", prompts, "--reward", "format:.")
    assert status == 1
    assert "unexpected RuntimeError: unheard of (--debug shows where)" in complaint


# --- plot ------------------------------------------------------------------------------------------------


@pytest.fixture
def plot(tmp_path, monkeypatch, capsys):
    """Run `grpo-lab plot` beside two seeds of one run and a run without KL: (exit status, output, complaint)."""
    monkeypatch.chdir(tmp_path)
    for name, row in {"a-seed0": {"kl": 0.1}, "a-seed1": {"kl": 0.2}, "b": {}}.items():
        Path(name).mkdir()
        rows = [json.dumps({"step": step, "reward": step / 4, **row}) for step in (1, 2)]
        Path(name, "metrics.jsonl").write_text("\n".join(rows))

    def run(*arguments):
        status = cli.main(["plot", *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_plot_draws_and_says_what(plot):
    status, out, complaint = plot("a-seed0", "a-seed1", "b")
    assert (status, complaint) == (0, "")
    assert Path("comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "a, 2 seeds, steps 1 to 2: reward 0.375 at first, 0.375 at last" in out
    assert "b, steps 1 to 2: reward 0.375 at first, 0.375 at last; no kl" in out
    assert "Not drawn, because no run has it: entropy, completions/mean_length" in out
    assert out.endswith("Written to comparison.png: reward, kl\n")


def test_plot_draws_what_it_is_asked_for_where_it_is_asked_to(plot):
    status, out, _ = plot("a-seed0", "--metrics", "kl", "kl", "--output", "here.png")
    assert (status, Path("comparison.png").exists()) == (0, False)
    assert out.endswith("Written to here.png: kl\n")
    assert "Not drawn" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no folder"),
        (["a-seed0", "."], "it holds a-seed0, a-seed1, b. Give a run's folder."),
        (["a-seed0/metrics.jsonl"], "Give the folder of a run, which holds metrics.jsonl"),
        (["b", "--metrics", "kl"], "no run has the metric 'kl'. There is reward."),
        (["b", "--output", "no/folder.png"], "cannot write no/folder.png (No such file or directory)"),
        (["b", "--output", "."], "--output must end in .png, .svg or .pdf, got '.'."),
        (["b", "--output", "picture.txt"], "--output must end in .png, .svg or .pdf, got 'picture.txt'."),
        (["b", "--output", ""], "--output is empty"),
        ([""], "RUN is empty"),
        (["b", "--metrics", ""], "--metrics is empty"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_a_mistake_with_plot_gets_one_sentence_and_writes_nothing(plot, tmp_path, arguments, message):
    status, out, complaint = plot(*arguments)
    assert (status, out) == (2, "")
    assert message in complaint
    assert complaint.startswith("grpo-lab: ")
    assert complaint.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"a-seed0", "a-seed1", "b"}


def test_plot_says_when_a_run_has_nothing_that_is_drawn_by_default(plot):
    Path("b/metrics.jsonl").write_text('{"step": 1, "loss": 0.0}')
    status, _, complaint = plot("b")
    assert status == 2
    assert "none of reward, kl, entropy, completions/mean_length is in these runs. --metrics takes loss." in complaint


@pytest.mark.parametrize("command", ["plan", "plot", "doctor", "course"])
def test_the_other_commands_explain_themselves_and_show_a_traceback_if_asked(command, capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert f"    {command} " in capsys.readouterr().out
    empty = {"plot": ["x", "--output", ""], "course": [""]}.get(command, ["--output-dir", ""])
    with pytest.raises(ValueError, match="empty"):
        cli.main([command, *empty, "--debug"])
