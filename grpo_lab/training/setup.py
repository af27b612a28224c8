"""Check what a trainer was given, and build the components of its steps."""

import inspect
import sys
import warnings
from collections.abc import Iterable
from itertools import chain, islice
from operator import itemgetter

from accelerate import Accelerator
from torch import Tensor, nn

from grpo_lab.hardware.processes import Processes
from grpo_lab.rewards.reward_models import CausalLMReward, RewardModel, Rewards, SequenceClassifierReward
from grpo_lab.rollout.prompts import (
    Prompt,
    encode_prompt,
    encode_prompts,
    longest_prompts,
    num_bytes,
    prompt_column,
)
from grpo_lab.rollout.sampling import check_context, context_of, end_token_ids, pad_token_id, too_long
from grpo_lab.training.config import GRPOConfig
from grpo_lab.training.engine import make_engine
from grpo_lab.training.memory import rollout_batch_size, weight_bytes
from grpo_lab.training.policy import prepare_models
from grpo_lab.training.samplers import ExternalSampler, ModelSampler
from grpo_lab.training.step import Components

EVERY_PROMPT = 20_000  # up to here every prompt is encoded before training: 2,000 to 4,000 a second on one core


def make_components(
    model: nn.Module,
    ref_model: nn.Module | None,
    reward_model: RewardModel,
    tokenizer,
    config: GRPOConfig,
    datasets: tuple,
    *,
    total_steps: int,
    accelerator: Accelerator,
    precision: str,
    processes: Processes,
) -> Components:
    """Prepare the models and make optimizer, rewards and sampler.

    Args:
        datasets: for training, and for evaluation or None.
    Raises: ValueError, with the cure, for what cannot work.
    """
    make_savable(model)
    models = prepare_models(
        model, ref_model, config, device=accelerator.device, precision=precision, processes=processes
    )
    engine = make_engine(models, config, accelerator, processes, total_steps)
    rewards = Rewards(reward_model, tokenizer, config.reward_weights, config.reward_timeout)
    rewards.to(accelerator.device, {models.trained: models.whole})  # a policy that scores itself does so unsharded
    columns = config.max_new_tokens + max(
        check_dataset(dataset, name, tokenizer, models.whole, rewards, config.max_new_tokens)
        for name, dataset in zip(("train_dataset", "eval_dataset"), datasets, strict=True)
        if dataset is not None
    )
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


def make_savable(model: nn.Module) -> None:
    """Turn tensors among the generation settings, such as the ids that end a text, into what JSON can hold."""
    settings = getattr(model, "generation_config", None)
    for name, value in list(vars(settings).items()) if settings is not None else ():
        if isinstance(value, Tensor):
            setattr(settings, name, value.tolist())


def check_dataset(dataset, name: str, tokenizer, model: nn.Module, rewards: Rewards, max_new_tokens: int) -> int:
    """Return the tokens of the longest prompt, after a check of all rows: now, not after a thousand steps.

    Raises: ValueError if a prompt does not fit into the context of the model or of a reward model, or if a reward
        function needs a column that is not there.
    """
    check_columns(rewards, dataset, name)
    tokens, longest = longest_prompt(dataset, tokenizer, model, max_new_tokens)
    for function in rewards.functions:
        if isinstance(function, SequenceClassifierReward | CausalLMReward):
            # another tokenizer may write a completion with fewer tokens
            more = max_new_tokens if function.tokenizer is tokenizer else 0
            function.check_prompts([longest, *longest_prompts(dataset)], more)
    return tokens


def longest_prompt(dataset, tokenizer, model: nn.Module, max_new_tokens: int) -> tuple[int, Prompt]:
    """Return the tokens of the longest prompt, and it.

    Of more than `EVERY_PROMPT` prompts it encodes some, evenly spaced, the longest in bytes, and all that could be too
    long: a text has at most as many tokens as UTF-8 bytes, besides those that the tokenizer or chat template adds.

    Raises: ValueError for a prompt that does not fit into the context or has tokens that the model does not know.
    """
    prompts, context = prompt_column(dataset), context_of(model)
    if len(prompts) <= EVERY_PROMPT:
        return _longest(prompts, tokenizer, model, max_new_tokens)
    some = list(islice(prompts, 0, None, max(1, 10 * len(prompts) // EVERY_PROMPT)))
    added = max(_added_per_message(tokenizer, prompt) for prompt in some[:100])

    def may_be_too_long(prompt: Prompt) -> bool:
        messages = 1 if isinstance(prompt, str) else len(prompt)
        return context is not None and num_bytes(prompt) + added * messages + max_new_tokens > context

    some += longest_prompts(dataset, EVERY_PROMPT // 100)
    return _longest(chain(some, filter(may_be_too_long, prompts)), tokenizer, model, max_new_tokens)


def _added_per_message(tokenizer, prompt: Prompt) -> float:
    """Return the tokens that are not the prompt's own: special ones, or the template's for each message."""
    if isinstance(prompt, str):
        return len(encode_prompt(tokenizer, prompt)) - len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    return len(encode_prompt(tokenizer, [{**message, "content": "x"} for message in prompt])) / len(prompt)


def _longest(prompts: Iterable[Prompt], tokenizer, model: nn.Module, max_new_tokens: int) -> tuple[int, Prompt]:
    prompts, longest, context = iter(prompts), (0, ""), context_of(model)
    while some := list(islice(prompts, 1000)):
        for prompt in some if context else ():
            # a million characters take seconds to encode; their beginning is enough to refuse them
            text = prompt if isinstance(prompt, str) else max((m["content"] for m in prompt), key=len)
            if len(text) > 16 * context:
                begin = tokenizer(text[: 16 * context], add_special_tokens=False)["input_ids"]
                if len(begin) > context:
                    raise too_long(text, f"{len(text)} characters", max_new_tokens, context)
        ids = encode_prompts(tokenizer, some)
        check_context(model, some, ids, max_new_tokens)
        longest = max(longest, *zip(map(len, ids), some, strict=True), key=itemgetter(0))
    return longest


def check_columns(rewards: Rewards, dataset, name: str) -> None:
    """Raise ValueError if a reward function needs a column that the dataset lacks."""
    columns = set(dataset[0]) | {"prompts", "completions"}
    for function, label in zip(rewards.functions, rewards.names, strict=True):
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):  # a function in C does not say what it takes
            continue
        needed = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if needed and needed[0].name != "completions":  # the first two may have any name
            needed = [p for i, p in enumerate(needed) if i > 1 or p.kind == p.KEYWORD_ONLY]
        if missing := [p.name for p in needed if p.name not in columns]:
            raise ValueError(
                f"the reward function {label!r} needs the column {missing[0]!r}, "
                f"and {name} has {', '.join(dataset[0])}."
            )


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
