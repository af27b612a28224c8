"""How long does a step take, beside TRL's, and beside what the machine could do?

    python benchmarks/speed.py                     each model that this machine can run, five rounds
    python benchmarks/speed.py pocket --rounds 9   one of them
    python benchmarks/speed.py pocket --switches   each optimisation turned off alone
    python benchmarks/speed.py growth              time and memory against K, lengths and vocabulary

Ours and TRL's trainer take turns, each time in a new process: same model, prompts, K, lengths, loss and threads.
The limit is the arithmetic of a step (2 operations per weight and token forward, 4 backward; sampler, reference and
policy read each prompt once and each completion whole) at the rate of one large matrix product, measured in the same
process. Where completions repeat one another, as the pocket model's do, less than that is needed. "Reading" is another
limit, of the sampler: every weight once for each token of a completion, at the rate of a large copy.

Prints a table; writes benchmarks/results/speed-NAME.json (or --output) and a picture beside it.
"""

import argparse
import itertools
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
# weights in millions: hidden size, layers, heads, key-value heads, intermediate size, vocabulary
SHAPES = {
    "25M": (512, 8, 8, 2, 1408, 8000),
    "135M": (576, 30, 9, 3, 1536, 49152),
    "0.5B": (896, 24, 14, 2, 4864, 151936),
    "1.5B": (1536, 28, 12, 2, 8960, 151936),
    "growth": (256, 2, 4, 2, 512, 1000),
}
WORK: dict[str, dict] = {
    "pocket": {"prompts": 32, "K": 8, "new_tokens": 16, "steps": 30, "threads": 1},
    "25M": {"prompts": 4, "K": 8, "prompt_tokens": 48, "new_tokens": 32, "steps": 3, "threads": 0},
    "135M": {"prompts": 2, "K": 8, "prompt_tokens": 48, "new_tokens": 32, "steps": 2, "threads": 0},
    "0.5B": {"prompts": 8, "K": 8, "prompt_tokens": 128, "new_tokens": 256, "steps": 5, "threads": 0, "cuda": True},
    "1.5B": {"prompts": 8, "K": 8, "prompt_tokens": 128, "new_tokens": 256, "steps": 5, "threads": 0, "cuda": True},
}
GROWTH = {
    "K": ("K", (4, 8, 16, 32)),
    "completion": ("new_tokens", (8, 16, 32, 64)),
    "prompt": ("prompt_tokens", (16, 64, 128, 256)),
    "vocabulary": ("vocabulary", (1000, 8000, 50000, 150000)),
}
GROWTH_WORK = {"prompts": 4, "K": 8, "prompt_tokens": 32, "new_tokens": 16, "steps": 3, "threads": 1}
# what is turned off; the last two at beta 0, where there is something to skip
SWITCHES = ("sharing in training", "sharing in sampling", "own sampler", "own sampler, static cache instead",
            "one thread", "KL", "KL, and skipping of no_gradient groups")  # fmt: skip
BETA = 0.02


# --- one process, one trainer -------------------------------------------------------------------------------


def work_of(name: str) -> dict:
    """The job of a name: "pocket", "25M", or a point of growth such as "K=16"."""
    if name in WORK:
        return WORK[name] | {"shape": SHAPES.get(name)}
    axis, value = name.split("=")
    return GROWTH_WORK | {"shape": SHAPES["growth"], GROWTH[axis][0]: int(value)}


def model_and_data(work: dict, folder: str):
    """The pocket model and its problems; or random weights of a shape, and random prompts of equal length."""
    import random

    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from grpo_lab import pocket
    from grpo_lab.rewards.verifiable import countdown
    from grpo_lab.tasks.countdown import countdown_dataset
    from grpo_lab.tasks.pocket.make import make_tokenizer

    if work["shape"] is None:
        model, tokenizer = pocket.load()
        return model, tokenizer, countdown_dataset(2048).columns["prompt"], countdown
    hidden, layers, heads, kv_heads, intermediate, vocabulary = work["shape"]
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
            intermediate_size=intermediate, vocab_size=work.get("vocabulary", vocabulary), tie_word_embeddings=True,
            max_position_embeddings=4096, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )
    )  # fmt: skip
    drawn, tokenizer = random.Random(0), make_tokenizer()
    prompts = ["".join(drawn.choices("0123456789", k=work["prompt_tokens"])) for _ in range(64)]

    def reward(prompts, completions, **_):
        return [drawn.random() for _ in completions]

    return model, tokenizer, prompts, reward


def measure(library: str, name: str, off: str, folder: str) -> dict:
    """Seconds of each step, tokens, peak memory; run in a process of its own."""
    import torch
    import transformers

    from grpo_lab import GRPOConfig
    from grpo_lab.hardware.system import available_cores

    transformers.utils.logging.disable_progress_bar()
    work = work_of(name)
    device = "cuda" if work.get("cuda") else "cpu"
    threads = work["threads"] if off != "one thread" else 0
    torch.set_num_threads(threads or available_cores())
    model, tokenizer, prompts, reward = model_and_data(work, folder)
    model.save_pretrained(f"{folder}/model")
    model.config.name_or_path = f"{folder}/model"  # where TRL looks for its reference
    config = GRPOConfig(
        num_generations_per_prompt=work["K"], max_new_tokens=work["new_tokens"], temperature=1.0, top_k=0, top_p=1.0,
        batch_size=work["prompts"], gradient_accumulation_steps=1, kl_coef=BETA * (not off.startswith("KL")),
        learning_rate=6e-4 if name == "pocket" else 1e-5, warmup_steps=0, max_steps=work["steps"] + 2, save_steps=10**6,
        logging_steps=10**6, output_dir=f"{folder}/{library}", overwrite_output_dir=True, device=device,
    )  # fmt: skip
    judged: list[tuple[float, float]] = []

    def watched(prompts, completions, **columns):
        rewards = reward(prompts, completions)
        judged.append((time.perf_counter(), statistics.mean(rewards)))
        return rewards

    began, seconds, generating, tokens = (ours if library == "ours" else trl)(
        model, tokenizer, prompts, watched, config, off, work["steps"]
    )
    body = sum(p.numel() for n, p in model.named_parameters() if "embed" not in n)
    head = model.lm_head.weight.numel()
    read = work["prompts"] * work.get("prompt_tokens", 11)  # 9 to 13 in Countdown
    arithmetic = 10 * (body * (read + tokens / len(seconds)) + head * tokens / len(seconds))
    wide = 2 if device == "cuda" else 4  # bytes of a weight
    peak = (
        torch.cuda.max_memory_allocated() if device == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )  # fmt: skip
    return {
        "step": statistics.median(seconds),
        "tokens_per_second": tokens / sum(generating),
        "sampling": statistics.median(generating),
        # a pass for each token of a completion reads every weight
        "reading": tokens / len(seconds) / work["prompts"] / work["K"] * (body + head) * wide / bandwidth(device),
        # until the mean reward of five steps is 0.8, the first step and whatever precedes it included
        "seconds_to_80": next(
            (at - began for (at, _), *five in _windows(judged) if statistics.mean(r for _, r in five) >= 0.8), math.inf
        ),
        "limit": arithmetic / rate(device),
        "peak_gib": peak / 2**30,
        "weights_gib": (body + head) * 4 / 2**30,
    }


def _windows(judged: list[tuple[float, float]]):
    for i in range(4, len(judged)):
        yield judged[i], *judged[i - 4 : i + 1]


def ours(model, tokenizer, prompts, reward, config, off, steps):
    """Our trainer, perhaps with one optimisation turned off."""
    from grpo_lab import GRPOTrainer, SimplePromptDataset
    from grpo_lab.training import step

    run = GRPOTrainer(model, None, reward, tokenizer, config, SimplePromptDataset(prompts))
    if off == "sharing in training":  # prompts, and completions that are the same
        run.components.models._score_under = lambda model, rollouts, score: score(
            model, rollouts.input_ids, rollouts.attention_mask, rollouts.num_tokens, dedup=False
        )
    if "no_gradient groups" in off:
        step.make_micro_batches, whole = (
            (lambda r, k, budget, no_gradient: whole(r, k, budget, no_gradient & False)),
            step.make_micro_batches,
        )
    if off == "sharing in sampling":  # prompts, and rows that are the same so far
        plain = run.components.sampler.sample
        run.components.sampler.sample = lambda ids, *, num_generations, **settings: plain(
            [i for i in ids for _ in range(num_generations)], num_generations=1, **settings
        )
    if off.startswith("own sampler"):
        how = {"cache_implementation": "static"} if "static" in off else {}
        run.components.sampler.sample = lambda ids, *, uniforms, num_generations, **_: generated(
            run, ids, uniforms, num_generations, how
        )
    generating, tokens, sample = [], [], run.components.sampler.sample

    def timed(*arguments, **settings):
        began = time.perf_counter()
        rollouts = sample(*arguments, **settings)
        generating.append(time.perf_counter() - began)
        tokens.append(int(rollouts.completion_mask.sum()))
        return rollouts

    run.components.sampler.sample = timed
    ends, began = [], time.perf_counter()
    for _ in run.steps():
        ends.append(time.perf_counter())
        if len(ends) == steps + 1:
            break
    return began, [b - a for a, b in itertools.pairwise(ends)], generating[1:], sum(tokens[1:])


def generated(run, prompt_ids, uniforms, K, how):
    """What transformers' generate makes of the same prompts."""
    import torch

    from grpo_lab.rollout.sampling import Rollouts, left_pad

    ids, mask = left_pad(prompt_ids, run.components.pad_id)
    ids, mask = ids.repeat_interleave(K, 0), mask.repeat_interleave(K, 0)
    with torch.no_grad():
        whole = run.model.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=uniforms.shape[1],
            eos_token_id=run.components.end_ids, pad_token_id=run.components.pad_id, **how,
        )  # fmt: skip
    drawn = whole[:, ids.shape[1] :]
    ends = torch.isin(drawn, torch.tensor(run.components.end_ids))
    real = ends.cumsum(1) - ends.long() == 0
    return Rollouts(whole, torch.cat([mask, real.long()], 1), real, torch.zeros(real.shape), None, ends.any(1))


def trl(model, tokenizer, prompts, reward, config, off, steps):
    """TRL's trainer under the same settings."""
    import datasets
    from transformers import TrainerCallback
    from trl import GRPOTrainer
    from trl.trainer.base_trainer import _BaseTrainer

    from grpo_lab.interop import to_trl

    _BaseTrainer._send_telemetry = lambda self: None
    ends, generating, tokens = [], [], []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

    arguments = to_trl(config, max_steps=steps + 1, save_strategy="no", disable_tqdm=True)
    data = datasets.Dataset.from_dict({"prompt": list(prompts)})
    run = GRPOTrainer(model, reward, arguments, data, processing_class=tokenizer, callbacks=[Clock()])
    sample = run._generate_single_turn

    def timed(*arguments):
        began = time.perf_counter()
        result = sample(*arguments)
        generating.append(time.perf_counter() - began)
        tokens.append(sum(map(len, result[0])))
        return result

    run._generate_single_turn = timed
    began = time.perf_counter()
    run.train()
    return began, [b - a for a, b in itertools.pairwise(ends)], generating[1:], sum(tokens[1:])


def rate(device: str) -> float:
    """Operations per second of one large matrix product: float32 on a CPU, bf16 on a GPU; the best of seven."""
    import torch

    size, kind = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    a, best = torch.randn(size, size, device=device, dtype=kind), float("inf")
    for _ in range(7):
        began = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def bandwidth(device: str) -> float:
    """Bytes per second that a large copy reads and writes; the best of seven."""
    import torch

    source, best = torch.ones(2**26, device=device), float("inf")
    target = torch.empty_like(source)
    for _ in range(7):
        began = time.perf_counter()
        target.copy_(source)[0].item()
        best = min(best, time.perf_counter() - began)
    return 2 * source.nbytes / best


# --- all of them, in turn -----------------------------------------------------------------------------------


def in_a_process(library: str, name: str, off: str = "") -> dict:
    """What `measure` finds there."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, __file__, "--measure", library, name, off, folder], capture_output=True, text=True,
            env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},  # as the command line has it
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{library} on {name}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def in_turn(jobs: list[tuple[str, str, str]], rounds: int) -> dict[str, dict]:
    """Each job once a round; of every figure the median, and of the step its lowest and highest too."""
    found: dict[str, list[dict]] = {}
    for _ in range(rounds):
        for job in jobs:
            found.setdefault(" | ".join(filter(None, job)), []).append(in_a_process(*job))
    return {
        job: {name: round(statistics.median(row[name] for row in rows), 4) for name in rows[0]}
        | {"step_low": round(min(r["step"] for r in rows), 4), "step_high": round(max(r["step"] for r in rows), 4)}
        for job, rows in found.items()
    }


def table(results: dict[str, dict]) -> str:
    """The results as text."""
    heads = {
        "s/step": 9,
        "low": 9,
        "high": 9,
        "tokens/s": 10,
        "limit s": 9,
        "share": 7,
        "peak GiB": 10,
        "s to 80 %": 11,
    }
    lines = [" " * 44 + "".join(f"{head:>{width}}" for head, width in heads.items())]
    for job, row in results.items():
        lines.append(
            f"{job:44}{row['step']:9.3f}{row['step_low']:9.3f}{row['step_high']:9.3f}{row['tokens_per_second']:10.0f}"
            f"{row['limit']:9.3f}{row['limit'] / row['step']:7.0%}"
            f"{row['sampling']:11.3f}{row['reading']:10.3f}{row['peak_gib']:10.2f}"
            + (f"{row['seconds_to_80']:11.1f}" if math.isfinite(row["seconds_to_80"]) else f"{'-':>11}")
        )
    return "\n".join(lines)


def draw(results: dict[str, dict], path: Path) -> None:
    """Bars of ours and TRL's, or, for growth, lines against what grows."""
    from matplotlib.figure import Figure

    growth = any("=" in job for job in results)
    figure = Figure(figsize=(11, 5.6) if growth else (7, 0.5 + 0.55 * len(results)), layout="constrained")
    if not growth:
        panel = figure.subplots()
        jobs = list(results)[::-1]
        steps = [results[job]["step"] for job in jobs]
        panel.barh(jobs, steps, color=["#0072B2" if job.startswith("ours") else "#BBC4CC" for job in jobs])
        panel.plot([results[job]["limit"] for job in jobs], jobs, "|", color="black", markersize=16, label="arithmetic")
        for job, step in zip(jobs, steps, strict=True):
            panel.text(max(step, results[job]["limit"]), job, f"  {step:.2f} s", va="center")
        panel.set(xlabel="seconds per step", xlim=(0, 1.12 * max(steps)))
        panel.legend(frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
    else:
        for column, (axis, (_, values)) in enumerate(GROWTH.items()):
            for row, (figures, label) in enumerate([("step", "seconds per step"), ("beyond", "GiB beyond weights")]):
                panel = figure.add_subplot(2, len(GROWTH), row * len(GROWTH) + column + 1)
                for library, colour in (("ours", "#0072B2"), ("trl", "#5A6670")):
                    rows = [results[f"{library} | {axis}={value}"] for value in values]
                    # policy, reference, gradient and Adam's two averages
                    heights = [r["peak_gib"] - 5 * r["weights_gib"] if figures == "beyond" else r["step"] for r in rows]
                    panel.plot(values, heights, "o-", color=colour, label="TRL" if library == "trl" else "ours")
                panel.set(
                    xlabel=axis if axis in ("K", "vocabulary") else f"tokens of a {axis}",
                    xscale="log",
                    ylim=(0, None),
                    ylabel=label if column == 0 else "",
                )
                panel.set_xticks(values, [str(v) if v < 1000 else f"{v // 1000}k" for v in values])
                panel.minorticks_off()
                panel.spines[["top", "right"]].set_visible(False)
        figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(WORK)}, growth")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--switches", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        return print(json.dumps(measure(*arguments.measure)))

    import torch
    import transformers
    import trl

    from grpo_lab.tasks.pocket.make import processor

    names = arguments.names or [n for n, work in WORK.items() if bool(work.get("cuda")) == torch.cuda.is_available()]
    if names == ["growth"]:
        jobs = [(who, f"{axis}={v}", "") for axis, (_, vs) in GROWTH.items() for v in vs for who in ("ours", "trl")]
    elif arguments.switches:
        jobs = [("ours", name, off) for name in names for off in ("", *SWITCHES)]
    else:
        jobs = [(library, name, "") for name in names for library in ("ours", "trl")]
    results = in_turn(jobs, arguments.rounds)
    print(table(results))
    title = "-".join(names) + ("-switches" if arguments.switches else "")
    path = arguments.output or RESULTS / f"speed-{title}.json"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {processor()}"
    path.parent.mkdir(exist_ok=True)
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "transformers": transformers.__version__, "trl": trl.__version__}  # fmt: skip
    about = {"date": time.strftime("%Y-%m-%d"), "device": device, "versions": versions, "rounds": arguments.rounds}
    finite = {job: {k: v if math.isfinite(v) else None for k, v in row.items()} for job, row in results.items()}
    path.write_text(json.dumps(about | {"results": finite}, indent=1) + "\n")
    draw(results, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
