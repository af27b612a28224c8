"""Small runs, started by tests/test_processes.py in one process or by a launcher in several.

torchrun --nproc-per-node 2 tests/two_processes.py '[["folder", {"kl_coef": 0.0}], …]' [die | resume | CHECKPOINT]
torchrun --nproc-per-node 2 tests/two_processes.py FOLDER   prints what is found where processes differ
"""

import json
import os
import random
import sys
import warnings

import torch
from conftest import tiny_model
from torch import nn

from grpo_lab import GRPOConfig, GRPOTrainer, SimplePromptDataset
from grpo_lab.hardware.processes import Processes
from grpo_lab.tasks.pocket.make import make_tokenizer
from grpo_lab.training.metrics import JsonLines

PROMPTS = [f"{a},{b}:{a + b}=" for a in range(2, 6) for b in range(2, 8)]
ANSWERS = [prompt.split(":")[1] for prompt in PROMPTS]


def digits(prompts, completions, answer):
    """Scores by a column, and leaves some unscored."""
    return [None if "/" in c else sum(c.count(x) for x in a) / 4 for c, a in zip(completions, answer, strict=True)]


def short(prompts, completions):
    return [-len(c) / 10 for c in completions]


def noisy(prompts, completions):
    return [random.random() for _ in completions]


def run(folder: str, changes: dict, what: str = "", model=None, reward=None, data=None) -> GRPOTrainer:
    """Five steps of a model in float64, where rounding cannot hide a wrong mean."""
    torch.set_num_threads(1)
    settings = {
        "num_generations_per_prompt": 4, "max_new_tokens": 8, "temperature": 1.0, "top_k": 0, "top_p": 1.0,
        "learning_rate": 1e-3, "batch_size": 2, "gradient_accumulation_steps": 2, "warmup_steps": 0, "max_steps": 5,
        "logging_steps": 1, "save_steps": 3, "output_dir": folder, "device": "cpu",
    }  # fmt: skip
    model = model or tiny_model(tie_word_embeddings=True).double()
    data = data or SimplePromptDataset(PROMPTS, answer=ANSWERS)
    config, judges = GRPOConfig(**settings | changes), reward or [digits, short]
    trainer = GRPOTrainer(model, None, judges, make_tokenizer(), config, data, data)
    if what == "die" and trainer.processes.rank == 1:
        collect = trainer.collect
        trainer.collect = lambda indices: os._exit(9) if trainer.step == 4 else collect(indices)
    trainer.train(resume={"": None, "die": None, "resume": True}.get(what, what))
    return trainer


def differ(folder: str) -> dict:
    """What comes of it if the two processes have not the same."""
    index = int(os.environ["RANK"])
    found = {}

    model = tiny_model(seed=index, tie_word_embeddings=True).double()
    trainer = run(f"{folder}/weights", {"save_steps": 9}, model=model)
    found["weights"] = [float(sum(p.sum() for p in trainer.model.parameters()))]

    own = random.Random(index).sample(PROMPTS, len(PROMPTS))
    try:
        run(f"{folder}/data", {}, reward=short, data=SimplePromptDataset(own))
    except ValueError as error:
        found["data"] = [str(error)]

    noise = {"batch_size": 5, "gradient_accumulation_steps": 1, "max_steps": 4, "save_steps": 2}  # shares of 2 and 3
    run(f"{folder}/noise", noise, reward=noisy)
    run(f"{folder}/noise-resumed", noise, f"{folder}/noise/checkpoint-2", reward=noisy)
    found["noise"] = [
        [row["reward"] for row in JsonLines(trainer.output_dir.parent / name / "completions.jsonl").read()]
        for name in ("noise", "noise-resumed")
    ]

    model = tiny_model(tie_word_embeddings=True).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is a demonstration
        trainer = run(f"{folder}/judge", {"fsdp": True, "max_steps": 2}, model=model, reward=model)
    found["judge"] = [trainer.log.metrics.read()[-1]["reward"]]

    group = torch.distributed.distributed_c10d._get_default_group()
    found["collective timeout"] = [group._get_backend(torch.device("cpu")).options._timeout.total_seconds()]

    used, unused, everywhere = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    model = nn.ParameterList([used, unused, everywhere])
    (everywhere.sum() + used.sum() * 3 if index else everywhere.sum()).backward()
    Processes(2, index).all_reduce_gradients(model)
    found["gradients"] = [None if p.grad is None else p.grad.tolist() for p in model]
    return {name: trainer.processes.gather(values) for name, values in found.items()}


if __name__ == "__main__":
    if sys.argv[1][0] != "[":
        findings = differ(sys.argv[1])
        if os.environ["RANK"] == "0":
            print(json.dumps(findings))
        sys.exit()
    for folder, changes in json.loads(sys.argv[1]):
        run(folder, changes, *sys.argv[2:])
