"""Small runs, started by tests/test_processes.py in one process or by a launcher in several.

torchrun --nproc-per-node 2 tests/two_processes.py '[["folder", {"kl_coef": 0.0}], …]' [die | resume | CHECKPOINT]
"""

import json
import os
import sys

import torch
from conftest import tiny_model

from grpo_lab import GRPOConfig, GRPOTrainer, SimplePromptDataset
from grpo_lab.pocket.make import make_tokenizer

PROMPTS = [f"{a},{b}:{a + b}=" for a in range(2, 6) for b in range(2, 8)]
ANSWERS = [prompt.split(":")[1] for prompt in PROMPTS]


def digits(prompts, completions, answer):
    """Scores by a column, and leaves some unscored."""
    return [None if "/" in c else sum(c.count(x) for x in a) / 4 for c, a in zip(completions, answer, strict=True)]


def short(prompts, completions):
    return [-len(c) / 10 for c in completions]


def run(folder: str, changes: dict, what: str = "") -> GRPOTrainer:
    """Five steps of a model in float64, where rounding cannot hide a wrong mean."""
    torch.set_num_threads(1)
    settings = {
        "num_generations_per_prompt": 4, "max_new_tokens": 8, "temperature": 1.0, "top_k": 0, "top_p": 1.0,
        "learning_rate": 1e-3, "batch_size": 2, "gradient_accumulation_steps": 2, "warmup_steps": 0, "max_steps": 5,
        "logging_steps": 1, "save_steps": 3, "output_dir": folder, "device": "cpu",
    }  # fmt: skip
    model = tiny_model(tie_word_embeddings=True).double()
    data = SimplePromptDataset(PROMPTS, answer=ANSWERS)
    trainer = GRPOTrainer(model, None, [digits, short], make_tokenizer(), GRPOConfig(**settings | changes), data, data)
    if what == "die" and trainer.processes.index == 1:
        collect = trainer.collect
        trainer.collect = lambda indices: os._exit(9) if trainer.step == 4 else collect(indices)
    trainer.train(resume={"": None, "die": None, "resume": True}.get(what, what))
    return trainer


if __name__ == "__main__":
    for folder, changes in json.loads(sys.argv[1]):
        run(folder, changes, *sys.argv[2:])
