"""Convert a configuration and a reward function of this package for TRL's GRPOTrainer.

The loss is the same: tests/test_trl.py compares loss and gradient with TRL 1.16, to 1e-6, and a setting that TRL
computes differently raises an error that names it. The run is not the same: with the same seed TRL samples other
completions, drops an incomplete last batch of an epoch, applies no weight decay to biases and norms, and loads the
reference from the name in the model's config. docs/MOVING_ON.md says when and how to move.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

from grpo_lab.hardware.devices import resolve_device, resolve_precision
from grpo_lab.rewards.reward_models import Rewards
from grpo_lab.rewards.verifiable import RewardFunction
from grpo_lab.training.config import GRPOConfig

# our name -> TRL's name, for settings with equal values
NAMES = {
    "num_generations_per_prompt": "num_generations", "max_new_tokens": "max_completion_length",
    "temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "num_iterations": "num_iterations",
    "kl_coef": "beta", "clip_range": "epsilon", "scale_rewards": "scale_rewards",
    "importance": "importance_sampling_level", "learning_rate": "learning_rate", "weight_decay": "weight_decay",
    "warmup_steps": "warmup_steps", "lr_scheduler": "lr_scheduler_type", "num_epochs": "num_train_epochs",
    "gradient_accumulation_steps": "gradient_accumulation_steps", "disable_dropout": "disable_dropout",
    "gradient_checkpointing": "activation_checkpointing", "seed": "seed", "logging_steps": "logging_steps",
    "save_steps": "save_steps", "save_total_limit": "save_total_limit", "eval_steps": "eval_steps",
    "output_dir": "output_dir", "wandb_run_name": "run_name",
    "vllm_server": "vllm_server_base_url", "vllm_gpu_memory": "vllm_gpu_memory_utilization",
    "sampler_ratio_cap": "vllm_importance_sampling_clip_max",
}  # fmt: skip
# not "bnpo": it averages over the tokens of a micro-batch
LOSS_TYPES = {"sequence-mean": "grpo", "token-mean": "dapo", "constant": "dr_grpo"}
# our settings without a counterpart in TRL, which do not change the loss
ELSEWHERE = {
    "lora_alpha": "belongs in LoraConfig, with lora_rank",
    "success_reward": "TRL's evaluation logs mean rewards, and no success rate",
    "max_skipped_steps": "TRL applies non-finite gradients, except those that fp16 loss scaling skips",
    "overwrite_output_dir": "TRL always writes into a non-empty folder",
    "fsdp": "accelerate launch --use_fsdp",
    "wandb_project": "the environment variable WANDB_PROJECT",
}
# keyword arguments that TRL passes to every reward function and that are not dataset columns
_NO_COLUMNS = {"completion_ids", "trainer_state", "log_extra", "log_metric", "environments"}


def to_trl(config: GRPOConfig, **changes: Any):
    """Return the `trl.GRPOConfig` with which TRL's GRPOTrainer computes the loss of this configuration.

    Args:
        config: as for our trainer. "auto" for device and precision is resolved for this machine.
        **changes: settings with TRL's names, passed on unchanged: use_vllm=True, top_k=50.
    Returns: a `trl.GRPOConfig`. Its batch sizes count completions; ours count prompts.
    Raises: ValueError that names each setting TRL does not support and what to do instead; ImportError without trl.
    """
    try:
        import trl
    except ImportError as error:
        raise ImportError("to_trl needs the package trl: pip install trl.") from error
    if refused := list(_refused(config)):
        raise ValueError("TRL's GRPOTrainer does not support these settings.\n- " + "\n- ".join(refused))
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    rows = config.batch_size * config.num_generations_per_prompt
    high = config.clip_range if config.clip_range_high is None else config.clip_range_high
    cispo = config.surrogate == "cispo"
    settings = {theirs: getattr(config, ours) for ours, theirs in NAMES.items()}
    if not hasattr(trl.GRPOConfig, "activation_checkpointing"):  # transformers renamed it in 5.2x
        settings["gradient_checkpointing"] = settings.pop("activation_checkpointing")
    settings |= {
        "loss_type": "cispo" if cispo else LOSS_TYPES[config.aggregation],
        "epsilon_high": 1 + high if cispo else high,  # for CISPO, TRL's epsilon_high is the cap itself
        "use_bias_correction_kl": False,  # else TRL multiplies k3 by the ratio
        "reward_weights": config.reward_weights and list(config.reward_weights),
        "per_device_train_batch_size": rows, "per_device_eval_batch_size": rows,
        "max_steps": config.max_steps or -1, "eval_strategy": "steps" if config.eval_steps else "no",
        "max_grad_norm": config.max_grad_norm if config.max_grad_norm < float("inf") else 0.0,  # 0 disables it
        "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8,  # torch's defaults, as in our trainer
        "use_cpu": device == "cpu", "bf16": precision == "bf16", "fp16": precision == "fp16",
        "report_to": list(config.trackers), "use_vllm": config.sampler == "vllm",
        "vllm_mode": "colocate" if config.vllm_server is None else "server",
        "vllm_importance_sampling_mode": f"{config.sampler_correction}_truncate",
    }  # fmt: skip
    if config.optimizer == "adamw_8bit":
        settings["optim"] = "adamw_bnb_8bit"
    return trl.GRPOConfig(**settings | changes)


def to_trl_reward(function: RewardFunction, *, timeout: float | None = None):
    """Wrap one of our reward functions for TRL, with the checks and the name it has in our trainer.

    TRL passes the completions of chats as lists of messages, where ours are strings, and passes all columns to every
    function, where ours get only the columns that they name. If the tokenizer separates a model's reasoning
    (`response_template`), the string is without the reasoning.

    Args:
        function: f(prompts, completions, **columns), or a reward such as SequenceClassifierReward(model, tokenizer).
        timeout: our `reward_timeout`, in seconds.
    Returns: f(prompts, completions, **columns) -> list of B floats, NaN where the function gives no score.
    Raises: TypeError if `function` is a list, a bare model, or not callable.
    """
    if isinstance(function, nn.Module) or not callable(function):
        raise TypeError(
            f"to_trl_reward takes one function, got {type(function).__name__}. Several? [to_trl_reward(f) for f in "
            "functions]. A model? TRL takes it as it is, or wrap it: SequenceClassifierReward(model, tokenizer)."
        )
    rewards = Rewards(function, None, timeout=timeout)

    def reward(prompts, completions, **columns):
        texts = [c if isinstance(c, str) else "".join(message["content"] for message in c) for c in completions]
        columns = {name: values for name, values in columns.items() if name not in _NO_COLUMNS}
        return rewards(prompts, texts, columns).total.tolist()

    reward.__name__ = rewards.names[0]  # TRL names its metrics after it
    return reward


def _refused(config: GRPOConfig) -> Iterator[str]:
    """Yield a reason and a cure for each setting whose loss TRL's GRPOTrainer does not compute."""
    c = config
    constant = c.aggregation_constant
    reasons = {
        "top_k": c.top_k > 0 and "TRL samples from these tokens but scores over all tokens, so its ratio and KL belong "
        "to another distribution. Set top_k=0; if you accept that, to_trl(config.replace(top_k=0), top_k=...)",
        "top_p": c.top_p < 1 and "as for top_k: TRL's log-probabilities are over all tokens. Set top_p=1.0",
        "keep_special_tokens": c.keep_special_tokens and "TRL takes special tokens out of what reward functions get. "
        "Set keep_special_tokens=False",
        "gamma": c.gamma < 1 and "TRL gives every token the whole advantage. Set gamma=1.0",
        "baseline": c.baseline != "mean" and 'TRL subtracts the mean of the group. Set baseline="mean", or use '
        "trl.RLOOTrainer for leave-one-out (without a std, it is K / (K - 1) times the same advantage)",
        "std_eps": c.scale_rewards != "none" and c.std_eps != 1e-4 and "TRL adds 0.0001 to the std. Set std_eps=0.0001",
        "kl_in": c.kl_coef > 0 and c.kl_in == "reward" and 'TRL adds the KL to the loss. Set kl_in="loss" and '
        'kl_estimator="k3", or use trl.RLOOTrainer',
        "kl_estimator": c.kl_coef > 0 and c.kl_in == "loss" and c.kl_estimator != "k3" and "TRL uses k3. Set "
        'kl_estimator="k3"; with to_trl(config, use_bias_correction_kl=True) its expected gradient is that of k2',
        "aggregation": c.surrogate == "cispo" and c.aggregation != "token-mean" and "for CISPO, TRL averages over "
        'all tokens. Set aggregation="token-mean"',
        "aggregation_constant": constant not in (None, c.max_new_tokens) and "TRL divides by max_new_tokens. Leave it "
        "out: the constant only scales the loss, which matters for max_grad_norm and Adam's epsilon alone",
        "lora_rank": c.lora_rank is not None and "TRL takes it as an argument of GRPOTrainer. Leave it out, and "
        f"pass peft_config=LoraConfig(r={c.lora_rank}, lora_alpha={c.lora_alpha}, target_modules='all-linear')",
        "sampler": c.sampler == "vllm" and c.kl_coef > 0 and "TRL weighs vLLM's samples, but not in the KL term. "
        'Set kl_coef=0.0; if you accept that, to_trl(config.replace(sampler="model", vllm_server=None), use_vllm=True)',
        "reward_timeout": c.reward_timeout is not None and "TRL has no time limit. Leave it out, and use "
        f"to_trl_reward(function, timeout={c.reward_timeout})",
    }  # fmt: skip
    for name, reason in reasons.items():
        if reason:
            yield f"{name}={getattr(c, name)!r}: {reason}."
