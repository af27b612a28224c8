"""What only a GPU can show: one command for each path, without a network, each within ten minutes.

    python benchmarks/gpu.py decode        tokens a second: token by token, and by a replayed CUDA graph
    python benchmarks/gpu.py step          seconds and peak memory of a step, planned and measured: 0.5 and 1.5 billion
                                           weights, LoRA, checkpointing, half precision, 8-bit AdamW
    python benchmarks/gpu.py precision     the pocket model trained in fp32, bf16 and fp16, its loss scaled
    python benchmarks/gpu.py countdown     pre-train for two minutes, then GRPO, on problems with four numbers
    python benchmarks/gpu.py processes     as many processes as there are GPUs, with and without shards, beside one
    python benchmarks/gpu.py vllm          rollouts through vLLM, where it is installed
    python benchmarks/gpu.py all

Needs torch, transformers, accelerate, peft and safetensors; weights are random or made here. Each measurement is a
process of its own. Prints a table; writes benchmarks/results/gpu-PATH.json (or into --output FOLDER) with device,
versions and date. `--small --device cpu` runs the same code on a CPU in a minute, as the tests do: its numbers say
nothing of a GPU.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the package need not be installed

from grpo_lab import GRPOConfig, GRPOTrainer, SimplePromptDataset, pocket
from grpo_lab.hardware.devices import resolve_device
from grpo_lab.rewards.verifiable import countdown
from grpo_lab.tasks.countdown import countdown_dataset

RESULTS = Path(__file__).parent / "results"
GIB = 2**30
LIMIT = 600  # seconds of one path
# hidden size, layers, heads, key-value heads, intermediate size, vocabulary; as Qwen2.5's config.json has them
SHAPES = {
    "0.5B": (896, 24, 14, 2, 4864, 151936),
    "1.5B": (1536, 28, 12, 2, 8960, 151936),
    "small": (64, 2, 4, 2, 128, 400),
}
WORK = {"num_generations_per_prompt": 8, "max_new_tokens": 256, "batch_size": 8, "gradient_accumulation_steps": 1,
        "temperature": 1.0, "top_k": 0, "top_p": 1.0, "kl_coef": 0.02, "warmup_steps": 0, "learning_rate": 1e-6,
        "save_steps": 10**6, "logging_steps": 10**6, "overwrite_output_dir": True}  # fmt: skip
PROMPT_TOKENS, STEPS = 128, 5
SMALL = {"max_new_tokens": 12, "batch_size": 2, "num_generations_per_prompt": 4}


def random_model(shape: str):
    """A Qwen2 of random weights that hardly ever ends, and a tokenizer that writes digits."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from grpo_lab.tasks.pretraining import make_tokenizer

    hidden, layers, heads, kv_heads, intermediate, vocabulary = SHAPES[shape]
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=intermediate, vocab_size=vocabulary, tie_word_embeddings=True, max_position_embeddings=4096,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return Qwen2ForCausalLM(config), make_tokenizer()


def random_prompts(number: int, tokens: int) -> list[str]:
    """Prompts of one length, all different."""
    drawn = random.Random(0)
    return ["".join(drawn.choices("0123456789", k=tokens)) for _ in range(number)]


def random_trainer(shape: str, folder: str, device: str, small: bool, **changes) -> GRPOTrainer:
    """A trainer of random weights whose reward is a coin."""
    model, tokenizer = random_model(shape)
    settings = WORK | (SMALL if small else {}) | {"max_steps": STEPS + 2, "output_dir": folder, "device": device}
    drawn = random.Random(0)
    trainer = GRPOTrainer(
        model, None, lambda prompts, completions: [drawn.random() for _ in completions], tokenizer,
        GRPOConfig(**settings | changes), SimplePromptDataset(random_prompts(64, 16 if small else PROMPT_TOKENS)),
    )  # fmt: skip
    trainer.components.end_ids = [-1]  # nothing ends: the lengths are those that are asked for
    return trainer


def synchronize(device: str) -> None:
    """Until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak(device: str) -> float | None:
    """GiB that PyTorch took of the GPU at the highest, its allocator's reserve included."""
    return torch.cuda.max_memory_reserved() / GIB if device == "cuda" else None


# --- one measurement each, in a process of its own ---------------------------------------------------------


def decode(way: str, device: str, small: bool, folder: str) -> dict:
    """Tokens a second of the sampler, and whether both ways draw the same."""
    from grpo_lab.rollout import decoding

    shape, rows = ("small", 8) if small else ("0.5B", 64)
    if way == "token by token":
        decoding.can_capture = lambda *_: False
    elif device == "cpu":
        decoding.can_capture = lambda *_: True  # the same code, without the graph
    trainer = random_trainer(shape, folder, device, small)
    prompts = [row["prompt"] for row in (trainer.train_dataset[i] for i in range(8))]
    K, longest = rows // 8, trainer.config.max_new_tokens
    uniforms = torch.rand(rows, longest, generator=torch.Generator().manual_seed(0))
    seconds, tokens = [], []
    for _ in range(3):  # the first one loads kernels
        synchronize(device)
        began = time.perf_counter()
        rollouts = trainer.sample(prompts, uniforms, K)
        synchronize(device)
        seconds.append(time.perf_counter() - began)
        tokens.append(rollouts.completion_ids.cpu())
    return {
        "rows": rows, "tokens": longest, "first, seconds": seconds[0], "seconds": min(seconds[1:]),
        "tokens a second": rows * longest / min(seconds[1:]), "drawn": tokens[-1].flatten().tolist()[:2000],
        "peak, GiB": peak(device),
    }  # fmt: skip


STEP_RUNS = {
    "0.5B": ("0.5B", {}),
    "0.5B, LoRA 16": ("0.5B", {"lora_rank": 16}),
    "0.5B, no KL": ("0.5B", {"kl_coef": 0.0}),
    "0.5B, checkpointing": ("0.5B", {"gradient_checkpointing": True}),
    "0.5B, fp16": ("0.5B", {"precision": "fp16"}),
    "1.5B": ("1.5B", {}),
    "1.5B, LoRA 16": ("1.5B", {"lora_rank": 16}),
    "0.5B, 8-bit AdamW": ("0.5B", {"optimizer": "adamw_8bit"}),
}


def step(name: str, device: str, small: bool, folder: str) -> dict:
    """Seconds and peak memory of whole steps, and what was planned."""
    from grpo_lab.planning.plan import plan

    shape, changes = STEP_RUNS[name]
    if device == "cpu":
        changes = {key: value for key, value in changes.items() if value not in ("fp16", "adamw_8bit")}
    trainer_settings = {"max_steps": 4 if small else STEPS + 2}
    model, _ = random_model("small" if small else shape)
    planned = plan(
        GRPOConfig(**WORK | (SMALL if small else {}) | changes | {"device": device}), model,
        prompt_tokens=16 if small else PROMPT_TOKENS,
    )  # fmt: skip
    del model
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trainer = random_trainer("small" if small else shape, folder, device, small, **changes, **trainer_settings)
    steps = trainer.steps()
    seconds, mfu_tokens = [], 0
    while True:
        began = time.perf_counter()
        record = next(steps, None)
        synchronize(device)
        if record is None or record.step == trainer.total_steps:
            break
        seconds.append(time.perf_counter() - began)
        mfu_tokens = record.metrics["num_tokens"] / record.step
    return {
        "seconds": statistics.median(seconds[2:]), "planned, seconds": sum(planned.seconds.values()),
        "tokens a step": mfu_tokens, "peak, GiB": peak(device), "planned, GiB": planned.peak / GIB,
    }  # fmt: skip


def precision(way: str, device: str, small: bool, folder: str) -> dict:
    """The pocket model's default run in one precision: right answers before and after, and skipped steps."""
    model, tokenizer = pocket.load()
    config = GRPOConfig.preset(
        "pocket", precision=way, device=device, output_dir=folder, overwrite_output_dir=True,
        **({"max_steps": 3, "batch_size": 4, "warmup_steps": 0} if small else {}),
    )  # fmt: skip
    data = countdown_dataset(pocket.NUM_PROMPTS, seed=0), countdown_dataset(20 if small else 400, split="held-out")
    trainer = GRPOTrainer(model, None, countdown, tokenizer, config, *data)
    before = trainer.evaluate()["eval/pass@1"]
    began = time.perf_counter()
    *_, last = trainer.steps()
    return {
        "before": before, "after": trainer.evaluate()["eval/pass@1"], "seconds": time.perf_counter() - began,
        "skipped steps": last.metrics["skipped_steps"], "largest ratio error at step 1": trainer.first_check["ratio"],
    }  # fmt: skip


def four_numbers(way: str, device: str, small: bool, folder: str) -> dict:
    """Pre-training from nothing, then GRPO with the preset countdown4, on problems that neither has seen."""
    from grpo_lab.tasks.pretraining import pretrain

    length = {"steps": 20} if small else {"seconds": 120}
    model, tokenizer, card = pretrain("small" if small else "large", device=device, **length)
    changes = {"num_generations_per_prompt": 64, "learning_rate": 2e-4}
    if small:
        changes = {"max_steps": 2, "warmup_steps": 0, "batch_size": 2, "num_generations_per_prompt": 4}
    config = GRPOConfig.preset("countdown4", device=device, output_dir=folder, overwrite_output_dir=True, **changes)
    train = countdown_dataset(64 if small else 20000, numbers=4)
    held_out = countdown_dataset(20 if small else 400, numbers=4, split="held-out")
    trainer = GRPOTrainer(model, None, countdown, tokenizer, config, train, held_out)
    before, began = trainer.evaluate(), time.perf_counter()
    curve = [(record.step, record.metrics["reward"]) for record in trainer.steps()]
    seconds = time.perf_counter() - began
    after = trainer.evaluate()
    return {
        "weights": card["parameters"], "lines read": card["lines"], "pre-training, seconds": card["seconds"],
        "GRPO, seconds": seconds, "steps": len(curve), "before": before["eval/pass@1"],
        "after": after["eval/pass@1"], "after, greedy": after["eval/pass@1_greedy"], "reward": curve, "card": card,
    }  # fmt: skip


def processes(way: str, device: str, small: bool, folder: str) -> dict:
    """The same four steps by one process, or by a launcher's; the norms say whether they agree."""
    count = max(1, torch.cuda.device_count()) if device == "cuda" else 2
    launcher = [] if way == "one process" else ["-m", "torch.distributed.run", "--nproc-per-node", str(count)]
    arguments = ["--member", folder, "--device", device, *(["--small"] if small else []),
                 *(["--fsdp"] if way == "shards" else [])]  # fmt: skip
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *launcher, __file__, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    said = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    return {"processes": 1 if way == "one process" else count, **said, "seconds in all": time.perf_counter() - began}


def member(folder: str, device: str, small: bool, fsdp: bool) -> None:
    """One of the processes of `processes`: a run of four steps in float32, to be compared."""
    changes = {"batch_size": 8, "max_steps": 4, "precision": "fp32", "fsdp": fsdp, "learning_rate": 1e-5}
    small_changes = {"batch_size": 4} if small else {"max_new_tokens": 64}
    trainer = random_trainer("small" if small else "0.5B", folder, device, small, **changes | small_changes)
    trainer.components.rewards.functions[0] = lambda prompts, completions: [c.count("1") / 10 for c in completions]
    records = list(trainer.steps())
    squares = sum(p.double().square().sum().item() for p in trainer.policy.parameters())
    if trainer.processes.is_main:
        print(json.dumps({
            "grad norm of the last step": records[-1].metrics["grad_norm"], "norm of the weights": squares**0.5,
            "seconds a step": statistics.median(r.metrics["step_time"] for r in records[1:]), "peak, GiB": peak(device),
        }), flush=True)  # fmt: skip


def vllm(way: str, device: str, small: bool, folder: str) -> dict:
    """Steps with rollouts by our sampler or by vLLM in this process."""
    trainer = random_trainer("small" if small else "0.5B", folder, device, small, sampler=way)
    records = list(trainer.steps())
    keys = ("sampling/sampling_logp_difference/mean", "sampling/importance_sampling_ratio/mean")
    return {
        "seconds a step": statistics.median(r.metrics["step_time"] for r in records[2:]),
        **{key: records[0].metrics.get(key) for key in keys}, "peak, GiB": peak(device),
    }  # fmt: skip


# --- all of a path -------------------------------------------------------------------------------------------

# path: (what measures it, its ways)
PATHS: dict[str, tuple[Callable[..., dict], tuple[str, ...]]] = {
    "decode": (decode, ("token by token", "replayed")),
    "step": (step, tuple(STEP_RUNS)),
    "precision": (precision, ("fp32", "bf16", "fp16")),
    "countdown": (four_numbers, ("large",)),
    "processes": (processes, ("one process", "several", "shards")),
    "vllm": (vllm, ("model", "vllm")),
}


def left_out(path: str, way: str, device: str) -> str | None:
    """Why this cannot be measured here, if so."""
    if device == "cpu" and way in ("fp16", "0.5B, fp16"):
        return "fp16 needs CUDA"
    if way == "vllm" and importlib.util.find_spec("vllm") is None:
        return "vllm is not installed"
    if way == "0.5B, 8-bit AdamW" and importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    return None


def circumstances(device: str, small: bool) -> dict:
    """Where and with what this was measured."""
    names = ("torch", "transformers", "accelerate", "peft", "safetensors")
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu, {platform.machine()}",
        "devices": torch.cuda.device_count() if device == "cuda" else 1,
        "small": small,
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
    }


def run(path: str, device: str, small: bool, output: Path) -> None:
    """Measure every way of a path, each in a process of its own, print a row each, and write all."""
    _, ways = PATHS[path]
    result = {"command": f"python benchmarks/gpu.py {path}", **circumstances(device, small), "rows": {}}
    print(f"\n{path} on {result['device']}{' (small: these numbers mean nothing)' if small else ''}", flush=True)
    began = time.monotonic()
    for way in ways:
        if reason := left_out(path, way, device):
            row = {"left out": reason}
        elif time.monotonic() - began > LIMIT:
            row = {"left out": f"{LIMIT} seconds were over"}
        else:
            row = measured_apart(path, way, device, small, LIMIT - (time.monotonic() - began))
        result["rows"][way] = row
        if drawn := row.pop("drawn", None):  # in half precision a token may flip, and what follows it is another text
            first = result.setdefault("drawn", drawn)
            row["tokens as in the first row"] = sum(map(int.__eq__, drawn, first)) / len(first)
        print(f"  {way:22} {_words(row)}", flush=True)
        output.mkdir(parents=True, exist_ok=True)
        written = {name: value for name, value in result.items() if name != "drawn"}
        (output / f"gpu-{path}.json").write_text(json.dumps(written, indent=1) + "\n")


def measured_apart(path: str, way: str, device: str, small: bool, seconds: float) -> dict:
    """What the measurement in a new process says, or how it failed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, path, "--way", way, "--device", device, "--folder", folder]
        try:
            done = subprocess.run(
                [*command, *(["--small"] if small else [])], capture_output=True, text=True, timeout=max(30.0, seconds),
                env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"failed": f"took more than the {LIMIT} seconds of a path"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if done.returncode == 0 and lines else {"failed": done.stderr[-1500:]}


def _words(row: dict) -> str:
    return "   ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row.items()
        if value is not None and not isinstance(value, list | dict)
    )


def main() -> None:
    """Measure the paths that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", metavar="PATH", help=f"{', '.join(PATHS)} or all")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--small", action="store_true", help="tiny models, to try the code out")
    parser.add_argument("--output", type=Path, default=RESULTS)
    for hidden in ("--way", "--folder", "--member"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--fsdp", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = resolve_device(options.device)
    if options.member:
        return member(options.member, device, options.small, options.fsdp)
    if options.way:
        print(json.dumps(PATHS[options.paths[0]][0](options.way, device, options.small, options.folder)))
        return
    paths = list(PATHS) if options.paths == ["all"] else options.paths
    if not paths or not set(paths) <= set(PATHS):
        parser.error(f"name what is to be measured: {', '.join(PATHS)} or all")
    if device == "cpu" and not options.small:
        parser.error("there is no GPU here. To try the code on the CPU: --small --device cpu")
    for path in paths:
        run(path, device, options.small, options.output)


if __name__ == "__main__":
    sys.exit(main())
