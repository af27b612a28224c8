"""`grpo-lab plan`: the memory and time that a run would take, before any weight is loaded."""

import argparse

from grpo_lab.cli.loading import check_folder, choose_model
from grpo_lab.cli.parser import add_config_flags, add_model_flags, config_from, positive_int, task_from
from grpo_lab.training.config import GRPOConfig


def add_parser(commands) -> argparse.ArgumentParser:
    """Add the command and its flags."""
    parser = commands.add_parser(
        "plan",
        help="show what memory and time a run would take",
        description="Show what memory and time a run would take, on this machine or a named one, without loading "
        "weights; if it does not fit, also the nearest settings that do. Exit status 1 if it does not fit.",
    )
    parser.set_defaults(dataset=None, reward=None)
    run = parser.add_argument_group("the run")
    add_model_flags(run)
    run.add_argument(
        "--machine",
        metavar="NAME",
        help="T4, L4, A100-40, A100-80, H100, H200, laptop or binder (default: this machine, with its free memory)",
    )
    run.add_argument(
        "--prompt-tokens", type=positive_int, metavar="N", help="length of the longest prompt (default: 128)"
    )
    run.add_argument(
        "--processes",
        type=positive_int,
        default=1,
        metavar="N",
        help="number of processes, each on its own GPU or all on the CPU; the plan is for one of them (default: 1)",
    )
    add_config_flags(parser.add_argument_group("settings", "as in train"))
    return parser


def run(options: argparse.Namespace) -> int:
    """Print the plan, and the nearest one that fits if this one does not; return 1 if it does not."""
    config, _ = config_from(options)
    from grpo_lab.planning.plan import what_fits

    found, models = make_plan(
        config,
        choose_model(options.model_name, task_from(options)),
        reward_model=options.reward_model,
        trust_remote_code=options.trust_remote_code,
        prompt_tokens=options.prompt_tokens,
        processes=options.processes,
        machine=options.machine,
    )
    print(found, flush=True)
    if not found.fits:
        print(what_fits(found, *models))
    return 0 if found.fits else 1


def make_plan(
    config: GRPOConfig,
    model_name: str,
    *,
    reward_model: str | None = None,
    trust_remote_code: bool = False,
    prompt_tokens: int | None = None,
    processes: int = 1,
    machine: str | None = None,
):
    """Return the `Plan`, and the model and reward models that it is for, built without weights."""
    import torch

    from grpo_lab.hardware.system import threads_for
    from grpo_lab.planning.plan import plan, without_weights

    names = [model_name, *([reward_model] if reward_model else [])]
    for name in names:
        check_folder(name)
    model, *reward_models = [
        without_weights(name, judges=name != model_name, trust_remote_code=trust_remote_code) for name in names
    ]
    torch.set_num_threads(threads_for(model))
    how = {"machine": machine, "prompt_tokens": prompt_tokens, "processes": processes, "name": model_name}
    return plan(config, model, reward_model=reward_models, **how), (model, reward_models)
