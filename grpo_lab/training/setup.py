"""Check what a trainer was given, and build the components of its steps."""

import sys
import warnings

from accelerate import Accelerator
from torch import nn

from grpo_lab.hardware.processes import Processes
from grpo_lab.rewards.reward_models import RewardModel, Rewards
from grpo_lab.rollout.prompts import encode_prompt, longest_prompts
from grpo_lab.rollout.sampling import check_context, end_token_ids, pad_token_id
from grpo_lab.training.config import GRPOConfig
from grpo_lab.training.engine import make_engine
from grpo_lab.training.memory import rollout_batch_size, weight_bytes
from grpo_lab.training.policy import prepare_models
from grpo_lab.training.samplers import ExternalSampler, ModelSampler
from grpo_lab.training.step import Components


def make_components(
    model: nn.Module,
    ref_model: nn.Module | None,
    reward_model: RewardModel,
    tokenizer,
    config: GRPOConfig,
    train_dataset,
    *,
    total_steps: int,
    accelerator: Accelerator,
    precision: str,
    processes: Processes,
) -> Components:
    """Prepare the models and make optimizer, rewards and sampler.

    Raises: ValueError, with the cure, for what cannot work.
    """
    models = prepare_models(
        model, ref_model, config, device=accelerator.device, precision=precision, processes=processes
    )
    engine = make_engine(models, config, accelerator, processes, total_steps)
    rewards = Rewards(reward_model, tokenizer, config.reward_weights, config.reward_timeout)
    rewards.to(accelerator.device, {models.trained: models.whole})  # a policy that scores itself does so unsharded
    columns = longest_prompt(train_dataset, tokenizer, models.whole, config) + config.max_new_tokens
    if config.sampler == "vllm":
        if processes.world_size > 1:
            raise ValueError(
                'sampler "vllm" is for one process: the others would change its weights at their own times.'
            )
        size = sys.maxsize  # it makes its own batches, and its weights are sent once for all of them
        sampler = ExternalSampler(models, tokenizer, config)
    else:
        size = rollout_batch_size(models.trained, config, precision, columns, **weight_bytes(models.trained))
        sampler = ModelSampler(models)
    return Components(
        config, models, tokenizer, sampler, rewards, engine, processes,
        end_ids=end_token_ids(models.trained, tokenizer), pad_id=pad_token_id(tokenizer, models.trained),
        rollout_batch_size=size,
    )  # fmt: skip


def longest_prompt(dataset, tokenizer, model: nn.Module, config: GRPOConfig) -> int:
    """Return the tokens of the longest prompt.

    Raises: ValueError if it does not fit into the context: now, not after a thousand steps.
    """
    longest = longest_prompts(dataset)
    ids = [encode_prompt(tokenizer, prompt) for prompt in longest]
    check_context(model, longest, ids, config.max_new_tokens)
    return max(map(len, ids))


def check_settings(config: GRPOConfig, model: nn.Module, ref_model: nn.Module | None, eval_dataset) -> None:
    """Raises ValueError for settings that do not fit what the trainer was given; warns of a penalty without effect."""
    if config.eval_steps and eval_dataset is None:
        raise ValueError(
            f"eval_steps is {config.eval_steps}, but there is no eval_dataset to evaluate on (--eval-dataset)."
        )
    if ref_model is model and config.kl_coef > 0:
        raise ValueError(
            "ref_model is the model that is trained, so the KL would always be 0. "
            "Load it a second time, or give None for a frozen copy."
        )
    if config.kl_coef > 0 and config.kl_in == "loss" and config.kl_estimator == "k1":
        warnings.warn(
            'kl_estimator "k1" in the loss has an expected gradient of 0: it holds nothing back. '
            'Use "k2" or "k3", or kl_in "reward".',
            stacklevel=3,
        )


def check_enough_prompts(prompts: int, per_step: int, world_size: int) -> None:
    """Raises ValueError if a step has fewer prompts than there are processes."""
    fewest = min(per_step, prompts % per_step or per_step)
    if fewest < world_size:
        raise ValueError(
            f"of {prompts} prompts in steps of {per_step} one step has {fewest}, too few for {world_size} "
            "processes. Lower --max-train-samples to a multiple of the step, or raise --batch-size."
        )


def warn_of_warmup(config: GRPOConfig, total_steps: int) -> None:
    """Warn if the learning rate would never reach its peak."""
    if config.warmup_steps >= total_steps and config.lr_scheduler != "constant":
        warnings.warn(
            f"warmup_steps ({config.warmup_steps}) is not less than the {total_steps} steps of this run, so the "
            f"learning rate never reaches {config.learning_rate:g}. Lower --warmup-steps, or train longer.",
            stacklevel=4,
        )
