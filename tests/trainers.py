"""Trainers that every test can afford."""

import torch
from conftest import tiny_model

from grpo_lab import GRPOConfig, GRPOTrainer, SimplePromptDataset
from grpo_lab.tasks.pocket.make import make_tokenizer

PROMPTS = [f"{a},{b},{a + b}:{a * b}=" for a in range(1, 4) for b in range(1, 5)]


def likes_threes(prompts, completions):
    """A reward that a random model can climb."""
    return [c.count("3") / 4 for c in completions]


def make_trainer(
    folder, *, model=None, ref_model=None, reward=likes_threes, prompts=PROMPTS, eval_dataset=None, **settings
):
    defaults = {
        "batch_size": 4, "gradient_accumulation_steps": 1, "num_generations_per_prompt": 4, "max_new_tokens": 6,
        "learning_rate": 1e-2, "warmup_steps": 0, "max_steps": 3, "logging_steps": 1,
        "lr_scheduler": "constant", "output_dir": str(folder), "overwrite_output_dir": True,
    }  # fmt: skip
    dataset = prompts if hasattr(prompts, "columns") else SimplePromptDataset(prompts)
    config = GRPOConfig(**defaults | settings)
    return GRPOTrainer(model or tiny_model(), ref_model, reward, make_tokenizer(), config, dataset, eval_dataset)


def weights(run):
    return torch.cat([p.detach().flatten().clone() for p in run.model.parameters()])
