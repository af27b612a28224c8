"""Does a run take the memory that was planned for it, and the time?

    python benchmarks/memory.py                    every configuration, each in a process of its own
    python benchmarks/memory.py pocket 25M-LoRA    some of them
    python benchmarks/memory.py --table            planned, for devices and models not here: docs/HARDWARE.md's table

Each process makes a model of random weights, plans, and then runs two steps of the trainer, with prompts of one length
and completions that never end: the worst that the plan assumes. The pocket model alone is itself, with its own
problems. Measured is what the process held at its highest during the steps and the saving of the model (VmHWM, set
back before them), so with all that the memory allocator keeps and does not use. The time is that of the second step.

Prints a table; writes benchmarks/results/memory.json (or --output). Exit status 1 if a peak is off by more than 15 %.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "memory.json"
GIB = 2**30
ALLOWED = 0.15
# hidden size, layers, heads, key-value heads, intermediate size, vocabulary
SHAPES = {
    "10M": (256, 4, 4, 2, 768, 32000),
    "25M": (512, 8, 8, 2, 1408, 8000),
    "135M": (576, 30, 9, 3, 1536, 49152),
    "wide": (256, 2, 4, 2, 512, 150000),
}
SMALL = {"num_generations_per_prompt": 4, "max_new_tokens": 24, "batch_size": 4, "gradient_accumulation_steps": 1}
ONE_AT_A_TIME = {"batch_size": 1, "gradient_accumulation_steps": 8, "gradient_checkpointing": True}
# name: shape, tokens of a prompt, settings that differ from SMALL
RUNS: dict[str, tuple[str, int, dict]] = {
    "pocket": ("pocket", 13, {}),
    "25M": ("25M", 48, {}),
    "25M, bf16": ("25M", 48, {"precision": "bf16"}),
    "25M, K 16": ("25M", 48, {"num_generations_per_prompt": 16}),
    "25M, 96 tokens": ("25M", 48, {"max_new_tokens": 96}),
    "25M, prompts of 256": ("25M", 256, {}),
    "25M, 8 prompts": ("25M", 48, {"batch_size": 8}),
    "25M, accumulated": ("25M", 48, {"gradient_accumulation_steps": 2}),
    "25M, checkpointing": ("25M", 48, {"gradient_checkpointing": True, "num_generations_per_prompt": 16}),
    "25M, LoRA": ("25M", 48, {"lora_rank": 16}),
    "25M, no KL": ("25M", 48, {"kl_coef": 0.0}),
    "25M, top-k and top-p": ("25M", 48, {"top_k": 50, "top_p": 0.9}),
    "25M, GPT-2": ("gpt2", 48, {}),
    "135M": ("135M", 48, {}),
    "135M, bf16": ("135M", 48, {"precision": "bf16"}),
    "135M, LoRA, bf16": ("135M", 48, {"precision": "bf16", "lora_rank": 16, "num_generations_per_prompt": 8}),
    "135M, checkpointing": ("135M", 48, {"gradient_checkpointing": True, "num_generations_per_prompt": 8}),
    "vocabulary of 150,000": ("wide", 32, {"num_generations_per_prompt": 8}),
    "reward model": ("10M", 48, {"num_generations_per_prompt": 16}),
    "25M, 2 processes": ("25M", 48, {"num_generations_per_prompt": 8}),
    "25M, 2 processes, shards": ("25M", 48, {"num_generations_per_prompt": 8, "fsdp": True}),
    "135M, 2 processes, shards": ("135M", 48, {"fsdp": True}),
    # these came after all constants of the plan had been settled
    "25M, 1 at a time": ("25M", 48, ONE_AT_A_TIME),
    "135M, LoRA, 1 at a time": ("135M", 48, ONE_AT_A_TIME | {"lora_rank": 16, "num_generations_per_prompt": 8}),
    "GPT-2, KL in the reward": ("gpt2", 48, {"max_new_tokens": 200, "kl_in": "reward", "kl_estimator": "k1"}),
    "vocabulary of 150,000, LoRA, bf16": ("wide", 32, {"precision": "bf16", "lora_rank": 8, "max_new_tokens": 64}),
}


def make_model(shape: str):
    """Random weights, and a tokenizer that writes digits."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

    from grpo_lab import pocket
    from grpo_lab.tasks.pocket.make import make_tokenizer

    if shape == "pocket":
        return pocket.load()
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    if shape == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(n_embd=512, n_layer=6, n_head=8, vocab_size=8000, **special)
        ), make_tokenizer()
    hidden, layers, heads, kv_heads, intermediate, vocabulary = SHAPES[shape]
    config = Qwen2Config(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=intermediate, vocab_size=vocabulary, tie_word_embeddings=True, max_position_embeddings=4096,
        **special,
    )  # fmt: skip
    return Qwen2ForCausalLM(config), make_tokenizer()


def measure(name: str, folder: str) -> dict:
    """What was planned and what was measured, of one process; run in processes of their own."""
    import random

    import torch
    import transformers

    from grpo_lab import GRPOConfig, GRPOTrainer, SimplePromptDataset, plan
    from grpo_lab.hardware.system import threads_for
    from grpo_lab.rewards.verifiable import countdown
    from grpo_lab.tasks.countdown import countdown_dataset

    transformers.utils.logging.disable_progress_bar()
    shape, prompt_tokens, changes = RUNS[name]
    model, tokenizer = make_model(shape)
    torch.set_num_threads(threads_for(model))
    fixed = {"max_steps": 2, "save_steps": 10**6, "logging_steps": 10**6, "warmup_steps": 0, "output_dir": folder,
             "overwrite_output_dir": True, "device": "cpu"}  # fmt: skip
    if shape == "pocket":
        config = GRPOConfig.preset("pocket", **fixed)
        reward, dataset = countdown, countdown_dataset(2048)
    else:
        config = GRPOConfig(**SMALL, temperature=1.0, **fixed).replace(**{"top_k": 0, "top_p": 1.0} | changes)
        drawn = random.Random(0)
        dataset = SimplePromptDataset(["".join(drawn.choices("0123456789", k=prompt_tokens)) for _ in range(64)])

        def reward(prompts, completions, **_):
            return [drawn.random() for _ in completions]

    judge = reward
    if name == "reward model":
        judge = transformers.Qwen2ForSequenceClassification(
            transformers.Qwen2Config(**model.config.to_dict() | {"num_labels": 1})
        )
    began = time.perf_counter()
    planned = plan(config, model, reward_model=judge, prompt_tokens=prompt_tokens, processes=processes_of(name))
    planning = time.perf_counter() - began
    trainer = GRPOTrainer(model, None, judge, tokenizer, config, dataset)
    if shape != "pocket":
        trainer.components.end_ids = [-1]  # nothing ends
    steps = trainer.steps()
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to what is held now
    next(steps)
    began = time.perf_counter()
    next(steps)
    seconds = time.perf_counter() - began
    for _ in steps:  # there is none, but the model is saved
        pass
    held = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return {
        "planned_gib": planned.peak / GIB,
        "measured_gib": int(held.split()[1]) * 1024 / GIB,
        "highest_in": planned.highest,
        "planned_seconds": sum(planned.seconds.values()),
        "measured_seconds": seconds,
        "planning_seconds": planning,
    }


def processes_of(name: str) -> int:
    """How many the configuration is shared out among."""
    return 2 if "2 processes" in name else 1


def in_a_process(name: str) -> dict:
    """What `measure` finds there; of several processes, where most was measured."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2"] if processes_of(name) == 2 else []
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, *launcher, __file__, "--measure", name, folder], capture_output=True, text=True,
            env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "MASTER_PORT": "0"},  # the first as the command line has it
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{name}:\n{done.stderr[-3000:]}")
    found = [json.loads(row) for row in done.stdout.splitlines() if row.startswith("{")]
    return max(found, key=lambda row: row["measured_gib"])


def line(name: str, row: dict) -> str:
    """One configuration as text."""
    ratio = row["planned_gib"] / row["measured_gib"]
    off = "  <-- off by more than 15 %" if abs(ratio - 1) > ALLOWED else ""
    return (
        f"{name:24}{row['planned_gib']:9.3f}{row['measured_gib']:10.3f}{ratio:7.2f}  {row['highest_in']:10}"
        f"{row['planned_seconds']:9.2f}{row['measured_seconds']:10.2f}{row['planning_seconds']:9.2f}{off}"
    )


# for docs/HARDWARE.md: what is trained, and with which settings; the same step, 8 prompts x 8 completions, in each row
STEP = {"num_generations_per_prompt": 8, "max_new_tokens": 256, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
WAYS = {
    "all weights, 2 prompts at a time": {"batch_size": 2, "gradient_accumulation_steps": 4},
    "all weights, 1 at a time, checkpointing": {
        "batch_size": 1, "gradient_accumulation_steps": 8, "gradient_checkpointing": True},
    "LoRA 16, 1 at a time, checkpointing": {
        "batch_size": 1, "gradient_accumulation_steps": 8, "gradient_checkpointing": True, "lora_rank": 16},
}  # fmt: skip
MODELS = {"0.5B": list(WAYS), "1.5B": list(WAYS), "7B": list(WAYS)[-1:]}


def table() -> str:
    """Planned, as Markdown: seconds per step where it fits."""
    from grpo_lab import GRPOConfig, plan
    from grpo_lab.planning.plan import MACHINES, without_weights

    gpus = [name for name, machine in MACHINES.items() if machine.device == "cuda"]
    heads = ["model", "trained", "needs on a GPU, GiB", *MACHINES]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]

    def cell(found) -> str:
        seconds = sum(found.seconds.values())
        return (f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min") if found.fits else "–"

    for size, ways in MODELS.items():
        name = f"Qwen/Qwen2.5-{size}-Instruct"
        for way in ways:
            config, model = GRPOConfig(**STEP, **WAYS[way]), without_weights(name)
            on_gpu = plan(config, model, machine=gpus[0], name=name)
            on_cpu = plan(config, model, machine="laptop", name=name)
            cells = [cell(on_gpu.on(name)) if name in gpus else cell(on_cpu.on(name)) for name in MACHINES]
            lines.append(f"| Qwen2.5-{size} | {way} | {on_gpu.peak / GIB:.1f} | {' | '.join(cells)} |")
            print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def main() -> int:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {'; '.join(RUNS)}")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure)))
        return 0
    if arguments.table:
        print(table())
        return 0

    import torch
    import transformers

    from grpo_lab.tasks.pocket.make import processor

    heads = f"{'planned':>9}{'measured':>10}"
    print(f"{'':24}{heads}{'ratio':>7}  {'highest in':10}{heads}{'to plan':>9}")
    print(f"{'':24}{'GiB':>9}{'GiB':>10}{'':19}{'s/step':>9}{'s/step':>10}{'s':>9}")
    results = {}
    for name in arguments.names or RUNS:
        results[name] = in_a_process(name)
        print(line(name, results[name]), flush=True)
    off = [name for name, row in results.items() if abs(row["planned_gib"] / row["measured_gib"] - 1) > ALLOWED]
    print(f"OFF BY MORE THAN 15 %: {', '.join(off)}" if off else f"All {len(results)} within 15 %.")
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "transformers": transformers.__version__}  # fmt: skip
    about = {"date": time.strftime("%Y-%m-%d"), "device": f"cpu, {processor()}", "versions": versions}
    rounded = {
        name: {key: value if isinstance(value, str) else round(value, 4) for key, value in row.items()}
        for name, row in results.items()
    }
    arguments.output.write_text(json.dumps(about | {"results": rounded}, indent=1) + "\n")
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())
