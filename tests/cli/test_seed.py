"""The document that this package implements, line by line: every name, default, flag, file and piece of advice.

Names and values stand here as the document has them, so that a change of ours is noticed.
"""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from grpo_lab import GRPOConfig, GRPOTrainer, SimplePromptDataset
from grpo_lab.cli import main as cli
from grpo_lab.cli.parser import config_from
from grpo_lab.tasks.registry import TASKS
from grpo_lab.training.config import PRESETS

QUICK_START = """
from grpo_lab import GRPOTrainer, GRPOConfig, SimplePromptDataset
from transformers import AutoModelForCausalLM, AutoTokenizer

# Load models
model_name = "Qwen/Qwen2.5-1.5B-Instruct"
model = AutoModelForCausalLM.from_pretrained(model_name)
ref_model = AutoModelForCausalLM.from_pretrained(model_name)
tokenizer = AutoTokenizer.from_pretrained(model_name)

# Create dataset
prompts = ["Your prompt 1", "Your prompt 2", "..."]
dataset = SimplePromptDataset(prompts)

# Configure training
config = GRPOConfig(
    batch_size=4,
    num_epochs=3,
    learning_rate=1e-6,
    num_generations_per_prompt=4,
    output_dir="./grpo_output"
)

# Train
trainer = GRPOTrainer(
    model=model,
    ref_model=ref_model,
    reward_model=model,  # Use proper reward model in production
    tokenizer=tokenizer,
    config=config,
    train_dataset=dataset
)

trainer.train()
"""

USING_THE_RESULT = """
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("./grpo_checkpoints/final_model")
tokenizer = AutoTokenizer.from_pretrained("./grpo_checkpoints/final_model")

# Generate with the fine-tuned model
prompt = "Your prompt here"
inputs = tokenizer(prompt, return_tensors="pt")
outputs = model.generate(**inputs, max_new_tokens=100)
response = tokenizer.decode(outputs[0], skip_special_tokens=True)
"""

DEFAULTS = {
    "num_generations_per_prompt": 4, "max_new_tokens": 256, "temperature": 0.7, "top_k": 50, "top_p": 0.9,
    "learning_rate": 1e-6, "batch_size": 4, "num_epochs": 3, "gradient_accumulation_steps": 4, "max_grad_norm": 1.0,
    "warmup_steps": 100, "kl_coef": 0.1, "clip_range": 0.2, "gamma": 1.0, "logging_steps": 10, "save_steps": 500,
    "output_dir": "./grpo_checkpoints", "use_wandb": False,
}  # fmt: skip

FLAGS = {
    "--model-name": "some/model", "--batch-size": 4, "--num-epochs": 3, "--learning-rate": 1e-6, "--num-generations": 4,
    "--max-new-tokens": 256, "--kl-coef": 0.1, "--clip-range": 0.2, "--temperature": 0.7,
    "--gradient-accumulation-steps": 4, "--max-grad-norm": 1.0, "--warmup-steps": 100, "--output-dir": "./my_model",
    "--logging-steps": 10, "--save-steps": 500, "--use-wandb": None, "--wandb-project": "my-project",
    "--wandb-run-name": "grpo-experiment-1", "--device": "cpu",
}  # fmt: skip

TREE = {"config.json", "model.safetensors", "tokenizer_config.json", "training_state.pt"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tiny(model_folder):
    return AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)


def trainer(tiny, reward_model, prompts=("a", "b"), **settings):
    quick = {"max_steps": 1, "batch_size": 2, "gradient_accumulation_steps": 1, "max_new_tokens": 4, "warmup_steps": 0}
    config = GRPOConfig(**quick | settings)
    model, tokenizer = tiny
    return GRPOTrainer(
        model=model, ref_model=None, reward_model=reward_model, tokenizer=tokenizer, config=config,
        train_dataset=SimplePromptDataset(list(prompts)),
    )  # fmt: skip


# --- Quick Start -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_quick_start_runs_as_it_is_written(here, model_folder):
    code = QUICK_START.replace("Qwen/Qwen2.5-1.5B-Instruct", model_folder)
    code = code.replace("num_epochs=3", "num_epochs=3, max_new_tokens=32")  # the tiny model's context is short
    with pytest.warns(UserWarning, match="demonstration|never reaches") as warned:
        exec(code, {})
    said = [str(w.message) for w in warned]
    assert sum("reward_model is a demonstration" in text for text in said) == 1
    assert sum("never reaches" in text for text in said) == 1  # 3 steps, 100 of warmup
    assert {p.name for p in (here / "grpo_output/final_model").iterdir()} >= TREE


def test_each_training_step_does_what_the_overview_lists(here, tiny):
    judged = []

    def reward(prompts, completions):
        judged.append((prompts, completions))
        return [float(i % 4) for i in range(len(completions))]

    run = trainer(tiny, reward, ["a", "b", "c"], num_generations_per_prompt=4)
    before = [p.clone() for p in run.model.parameters()]
    (record,) = run.steps()
    prompts, completions = judged[0]
    assert len(prompts) == len(completions) == 2 * 4  # a batch of prompts, K responses each
    advantages = torch.tensor([row["advantage"] for row in record.completions]).view(2, 4)
    assert advantages.sum(1).tolist() == pytest.approx([0, 0], abs=1e-6)  # relative to the group's mean
    assert any(not torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))


# --- configuration and command line ----------------------------------------------------------------------


@pytest.mark.parametrize("name", DEFAULTS)
def test_every_parameter_has_its_name_and_default(name):
    value = getattr(GRPOConfig(), name)
    assert (value, type(value)) == (DEFAULTS[name], type(DEFAULTS[name]))


def test_wandb_project_and_run_name_are_strings_of_ones_own():
    config = GRPOConfig(wandb_project="p", wandb_run_name="r")
    assert (config.wandb_project, config.wandb_run_name) == ("p", "r")


@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_reaches_its_setting(flag):
    value = FLAGS[flag]
    arguments = ["train", "--model-name", "some/model"] + ([flag] if value is None else [flag, str(value)])
    options = cli.make_parser().parse_args(arguments)
    if flag == "--model-name":
        assert options.model_name == value
        return
    config, _ = config_from(options)
    name = {"--num-generations": "num_generations_per_prompt"}.get(flag, flag[2:].replace("-", "_"))
    assert getattr(config, name) == (True if value is None else value)


def test_the_training_script_with_the_documents_flags(here, model_folder):
    command = [
        sys.executable, "-m", "grpo_lab.train_grpo", "--model-name", model_folder, "--batch-size", "4",
        "--num-epochs", "3", "--learning-rate", "1e-6", "--num-generations", "4", "--output-dir", "./my_grpo_model",
        "--max-new-tokens", "4",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (here / "my_grpo_model/final_model/model.safetensors").exists()


# --- datasets, rewards, logging --------------------------------------------------------------------------


def test_a_column_of_a_loaded_dataset_is_a_list_of_prompts(here, tiny):
    from datasets import Dataset, DatasetDict

    dataset = DatasetDict(train=Dataset.from_dict({"prompt": ["one", "two", "three"]}))
    prompts = dataset["train"]["prompt"]
    assert len(SimplePromptDataset(prompts)) == 3
    model, tokenizer = tiny
    config = GRPOConfig(max_steps=1, max_new_tokens=4, warmup_steps=0, kl_coef=0)
    run = GRPOTrainer(model, None, lambda p, c: [0.0] * len(c), tokenizer, config, dataset["train"])
    assert {row["prompt"] for row in next(run.steps()).completions} == {"one", "two", "three"}


def test_a_sequence_classification_model_is_a_reward_model(here, tiny, model_folder, tmp_path):
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    config = Qwen2Config.from_pretrained(model_folder, num_labels=1)
    Qwen2ForSequenceClassification(config).save_pretrained(tmp_path / "judge")
    judge = AutoModelForSequenceClassification.from_pretrained(tmp_path / "judge", num_labels=1)
    record = next(trainer(tiny, judge, num_generations_per_prompt=2).steps())
    row = record.completions[0]
    ids = tiny[1](row["prompt"] + row["completion"], return_tensors="pt")["input_ids"]
    assert row["reward"] == pytest.approx(judge(ids).logits.item(), abs=1e-5)


@pytest.mark.filterwarnings("ignore")  # wandb's own
def test_weights_and_biases_offline(here, tiny, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = trainer(
        tiny, lambda p, c: [float(len(x)) for x in c], use_wandb=True, wandb_project="my-project",
        wandb_run_name="grpo-experiment-1", logging_steps=1,
    )  # fmt: skip
    run.train()
    (log,) = (here / "grpo_checkpoints").glob("wandb/offline-run-*/run-*.wandb")
    content = log.read_bytes()
    for text in (b"my-project", b"grpo-experiment-1", b"frac_reward_zero_std", b"kl_coef"):
        assert text in content


@pytest.mark.filterwarnings("ignore")  # tensorboard's own
def test_other_trackers_through_accelerate(here, tiny):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer(tiny, lambda p, c: [1.0] * len(c), report_to=("tensorboard",), logging_steps=1).train()
    (events,) = (here / "grpo_checkpoints").rglob("events.out.tfevents.*.0")
    scalars = EventAccumulator(str(events.parent)).Reload()
    assert scalars.Scalars("reward")[0].value == 1.0


def test_logging_and_saving_come_every_n_steps(here, tiny):
    run = trainer(
        tiny, lambda p, c: [float(len(x)) for x in c], max_steps=7, logging_steps=2, save_steps=3, output_dir="o"
    )
    run.train()
    assert [json.loads(line)["step"] for line in (here / "o/metrics.jsonl").read_text().splitlines()] == [2, 4, 6, 7]
    assert {p.name for p in (here / "o").glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}


# --- output ----------------------------------------------------------------------------------------------


def test_the_output_tree_is_the_documents_and_loads_as_it_shows(here, tiny):
    trainer(tiny, lambda p, c: [float(len(x)) for x in c], save_steps=1, learning_rate=1e-2).train()
    out = here / "grpo_checkpoints"
    for folder in ("final_model", "checkpoint-1"):
        assert {p.name for p in (out / folder).iterdir()} >= TREE
    scope = {}
    exec(USING_THE_RESULT, scope)
    assert isinstance(scope["response"], str)
    for trained, loaded in zip(tiny[0].parameters(), scope["model"].parameters(), strict=True):
        assert torch.equal(trained, loaded)


# --- memory, speed, troubleshooting ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "advice",
    ["--batch-size 1", "--num-generations 2", "--max-new-tokens 64", "--gradient-accumulation-steps 8",
     "--gradient-checkpointing", "--precision bf16", "--max-train-samples 2", "--device cpu",
     "--learning-rate 5e-7", "--learning-rate 5e-6", "--num-epochs 2", "--kl-coef 0.5"],
)  # fmt: skip
def test_each_piece_of_advice_is_a_flag_that_works(here, model_folder, advice, capsys):
    quick = ["--max-new-tokens", "4"] if "--max-new-tokens" not in advice else []
    status = cli.main(["train", "--model-name", model_folder, "--reward", "format:.", "--max-steps", "1",
                       "--warmup-steps", "0", *quick, *advice.split()])  # fmt: skip
    assert status == 0, capsys.readouterr().err


def test_mixed_precision_is_one_word(here, tiny):
    run = trainer(tiny, lambda p, c: [0.0] * len(c), precision="bf16")
    assert run.precision == "bf16"


def test_no_value_network_is_made(here, tiny):
    run = trainer(tiny, lambda p, c: [0.0] * len(c))
    trained = {id(p) for group in run.components.engine.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in tiny[0].parameters()}


def test_presets_are_the_papers_and_the_tasks():
    papers = {"grpo", "dr_grpo", "dapo", "bnpo", "gspo", "cispo", "rloo", "reinforce"}
    assert set(PRESETS) == papers | set(TASKS) == papers | {"pocket", "gsm8k", "countdown4"}
    assert GRPOConfig.preset("grpo") == GRPOConfig()
