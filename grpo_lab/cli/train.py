"""`grpo-lab train`: train a model, and show completions before and after."""

import argparse
import os
from pathlib import Path

from grpo_lab.cli.loading import choose_model, load_data, load_model, load_reward, load_reward_model, load_tokenizer
from grpo_lab.cli.parser import add_config_flags, add_model_flags, config_from, positive_int, task_from
from grpo_lab.cli.plan import make_plan
from grpo_lab.training.config import GRPOConfig

DATA_FLAGS = (
    "dataset", "eval_dataset", "prompt_column", "answer_column", "split", "eval_split", "max_train_samples",
    "max_eval_samples", "system_prompt",
)  # fmt: skip


def add_parser(commands) -> argparse.ArgumentParser:
    """Add the command and its flags."""
    parser = commands.add_parser(
        "train",
        help="train a model",
        description="Train a causal language model with GRPO. Without flags: the embedded pocket model on Countdown, "
        "within a minute on a CPU.",
    )
    run = parser.add_argument_group("the run")
    add_model_flags(run)
    _add_data_flags(run)
    run.add_argument(
        "--reward",
        action="append",
        metavar="NAME",
        help="countdown, exact_answer, numeric_answer, math_answer (LaTeX), marked_answer (the form #### answer), "
        "format:REGEX, or FILE.py:FUNCTION. Give it several times to add rewards; the first decides whether an answer "
        "counts as right",
    )
    run.add_argument(
        "--resume",
        nargs="?",
        const=True,
        metavar="CHECKPOINT",
        help="continue from this checkpoint, or from the newest one in the output folder",
    )
    run.add_argument("--force", action="store_true", help="train even if the plan says that memory is too small")
    add_config_flags(
        parser.add_argument_group("settings", "defaults are those of GRPOConfig; a preset may change them")
    )
    return parser


def _add_data_flags(group) -> None:
    group.add_argument(
        "--dataset",
        help="prompts to train on: a .txt (one prompt a line), .jsonl, .csv or .parquet file, or a Hub id[:config] "
        "(default: the task's; without a task, a few example prompts)",
    )
    group.add_argument(
        "--eval-dataset", help="prompts for evaluation before and after training and, with --eval-steps, during it"
    )
    group.add_argument(
        "--prompt-column", metavar="NAME", help="column with the prompts (default: prompt, or the task's)"
    )
    group.add_argument("--answer-column", metavar="NAME", help="column with the answers that --reward compares with")
    group.add_argument("--split", default="train", help="split of a Hub dataset (default: train)")
    group.add_argument("--eval-split", default="test", help="split of a Hub --eval-dataset (default: test)")
    group.add_argument("--max-train-samples", type=positive_int, metavar="N", help="train on the first N prompts only")
    group.add_argument(
        "--max-eval-samples",
        type=positive_int,
        metavar="N",
        help="evaluate on the first N prompts only (default: all, or the task's number)",
    )
    group.add_argument(
        "--system-prompt",
        metavar="TEXT",
        help="turn the prompts into chats that begin with this message (default: none, or the task's)",
    )


def run(options: argparse.Namespace) -> int:
    """Load, show three completions and the accuracy, train, show them again."""
    config, source = config_from(options)  # before anything slow: a mistake in a flag is reported at once
    # Waiting threads must not spin: on a busy core a spinning thread takes time from those that work (measured on two
    # cores, one of them busy: 2 to 5 times slower). PyTorch reads the variable when it is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    from grpo_lab.hardware.devices import resolve_device, resolve_precision
    from grpo_lab.hardware.system import threads_for
    from grpo_lab.training.output_dir import refuse_results, refuse_unwritable

    resolve_precision(config.precision, resolve_device(config.device))  # also before minutes of loading
    refuse_unwritable(Path(config.output_dir))
    if not options.resume and not config.overwrite_output_dir:
        refuse_results(Path(config.output_dir))
    model_name = choose_model(options.model_name, task_from(options))
    trainer = make_trainer(options, config, model_name)
    torch.set_num_threads(threads_for(trainer.model))
    print(_headline(trainer, model_name), f"Settings: {source}", _sizes(trainer), sep="\n")

    dataset = trainer.eval_dataset or trainer.train_dataset
    before = None if options.resume else _show(trainer, dataset, "Before")
    history = trainer.train(resume=options.resume)
    known = history[-1] if history and "eval/pass@1" in history[-1] else None  # the last step has just evaluated
    after = _show(trainer, dataset, "After", known)
    if before is not None and after is not None:
        print(f"\nRight answers, sampled: {before:.1%} before, {after:.1%} after.")
    print(f"Written to {config.output_dir}: final_model/, metrics.jsonl, completions.jsonl, training.png")
    return 0


def make_trainer(options: argparse.Namespace, config: GRPOConfig, model_name: str):
    """Return the trainer that the flags describe.

    Raises: ValueError or OSError if a model or dataset cannot be loaded, MemoryError if the plan does not fit.
    """
    from grpo_lab.training.trainer import GRPOTrainer

    task = task_from(options)
    if options.answer_column and not (options.reward or options.reward_model or task):
        raise ValueError(
            "--answer-column needs a reward that compares with the answers: --reward numeric_answer (the last number "
            "of a text), math_answer (LaTeX), exact_answer (the same text) or FILE.py:FUNCTION."
        )
    rewards = [load_reward(name) for name in options.reward or ()]
    if options.reward_model:
        rewards.append(load_reward_model(options.reward_model))
    rewards = rewards or list(task.rewards if task else ())
    if not (options.dataset or task):
        print("No --dataset: using a few example prompts.")
    given = {name: getattr(options, name) for name in DATA_FLAGS}
    train, held_out = load_data(task, rewards, config.seed, **given)
    tokenizer = load_tokenizer(model_name, trust_remote_code=options.trust_remote_code)
    _print_plan(options, config, model_name, tokenizer, train)
    model = load_model(model_name, trust_remote_code=options.trust_remote_code)
    return GRPOTrainer(model, None, rewards or model, tokenizer, config, train, held_out)


def _print_plan(options: argparse.Namespace, config: GRPOConfig, model_name: str, tokenizer, dataset) -> None:
    """Print what the run will take, before its weights are loaded. Raises MemoryError if it does not fit."""
    from grpo_lab.planning.plan import what_fits
    from grpo_lab.rollout.prompts import encode_prompt, longest_prompts

    longest = max(len(encode_prompt(tokenizer, prompt)) for prompt in longest_prompts(dataset))
    try:
        found, models = make_plan(
            config,
            model_name,
            reward_model=options.reward_model,
            trust_remote_code=options.trust_remote_code,
            prompt_tokens=longest,
            processes=int(os.environ.get("WORLD_SIZE", 1)),
        )
    except Exception as error:  # the plan is only a help; the run itself reports what is wrong with it
        print(f"Plan: none could be made ({type(error).__name__}: {' '.join(str(error).split())[:200]})")
        return
    print(f"Plan: it {found.verdict}", flush=True)
    if not found.fits and not options.force:
        raise MemoryError(f"the run {found.verdict}. {what_fits(found, *models)} --force trains all the same.")


def _headline(trainer, model_name: str) -> str:
    import torch

    parameters = sum(p.numel() for p in trainer.model.parameters())
    cores = torch.get_num_threads()
    where = f"{trainer.device.type}, {trainer.precision}"
    where += f", {cores} thread{'s' if cores > 1 else ''}" if trainer.device.type == "cpu" else ""
    where += f" · {trainer.processes.world_size} processes" if trainer.processes.world_size > 1 else ""
    return f"GRPO on {model_name} ({parameters / 1e6:.2f} M parameters) · {where}"


def _sizes(trainer) -> str:
    config = trainer.config
    prompts = min(config.prompts_per_step, len(trainer.train_dataset))
    return (
        f"{len(trainer.train_dataset)} prompts · {trainer.total_steps} optimizer steps of "
        f"{prompts} prompts × {config.num_generations_per_prompt} completions "
        f"= {prompts * config.num_generations_per_prompt}"
    )


def _show(trainer, dataset, when: str, scores: dict[str, float] | None = None) -> float | None:
    """Print three completions and the evaluation; return its pass@1, or None if there is no evaluation dataset.

    Args:
        scores: the result of an evaluation of the same weights; None: evaluate now.
    """
    from grpo_lab.training.evaluation import evaluation_lines

    print(f"\n{when} training")
    for example in trainer.examples(dataset, 3):
        prompt = example["prompt"] if isinstance(example["prompt"], str) else example["prompt"][-1]["content"]
        print(f"  {_shorten(prompt)} → {_shorten(example['completion'])}   (reward {example['reward']:.2f})")
    if trainer.eval_dataset is None:
        return None
    scores = scores or trainer.evaluate()
    print(f"  mean reward: {scores['eval/reward']:.3f}")
    print("  " + "\n  ".join(evaluation_lines(scores, trainer.config.num_generations_per_prompt)))
    print(f"  on {len(dataset)} prompts kept for evaluation", flush=True)
    return scores["eval/pass@1"]


def _shorten(text: str, limit: int = 70) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
