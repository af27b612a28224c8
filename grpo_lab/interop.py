"""Moving on: a configuration and a reward function of this package, in the terms of TRL's GRPOTrainer.

The loss is the same: tests/test_trl.py compares it and its gradient, to 1e-6, with TRL 1.16, and what TRL computes
otherwise is refused by name. The run is not: from the same seed TRL draws other samples, it drops prompts that fill
no whole batch at the end of an epoch, spares biases and norms from weight decay, and takes as reference what lies
under the name in the model's config. docs/MOVING_ON.md says when and how to move.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

from grpo_lab.hardware.devices import resolve_device, resolve_precision
from grpo_lab.rewards.reward_models import Rewards
from grpo_lab.rewards.verifiable import RewardFunction
from grpo_lab.training.config import GRPOConfig

# ours -> TRL's, where the value is the same too
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
# not "bnpo", whose mean is over the tokens of a micro-batch
LOSS_TYPES = {"sequence-mean": "grpo", "token-mean": "dapo", "constant": "dr_grpo"}
# ours that no setting of TRL's stands for, and that change no loss
ELSEWHERE = {
    "lora_alpha": "goes with lora_rank, into LoraConfig",
    "success_reward": "TRL's evaluation logs mean rewards and counts no right answers",
    "max_skipped_steps": "TRL applies a gradient that is not finite, unless fp16's loss scaling skips it",
    "overwrite_output_dir": "TRL writes into a folder that is not empty without asking",
    "fsdp": "accelerate launch --use_fsdp",
    "wandb_project": "the environment variable WANDB_PROJECT",
}
# what TRL hands to every reward function besides the dataset's columns
_NO_COLUMNS = {"completion_ids", "trainer_state", "log_extra", "log_metric", "environments"}


def to_trl(config: GRPOConfig, **changes: Any):
    """The `trl.GRPOConfig` under which TRL's GRPOTrainer computes the loss of this configuration.

    Args:
        config: as for our trainer. "auto" in device and precision means this machine.
        **changes: settings under TRL's names, taken as they are: use_vllm=True, top_k=50.
    Returns: a `trl.GRPOConfig`. A micro-batch is counted in completions there, ours in prompts.
    Raises: ValueError that names each setting TRL cannot follow and what to do instead; ImportError without trl.
    """
    try:
        import trl
    except ImportError as error:
        raise ImportError("to_trl needs the package trl: pip install trl.") from error
    if refused := list(_refused(config)):
        raise ValueError("TRL's GRPOTrainer cannot follow these settings.\n- " + "\n- ".join(refused))
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
        "epsilon_high": 1 + high if cispo else high,  # of CISPO TRL's is the cap itself
        "use_bias_correction_kl": False,  # TRL multiplies k3 by the ratio otherwise
        "reward_weights": config.reward_weights and list(config.reward_weights),
        "per_device_train_batch_size": rows, "per_device_eval_batch_size": rows,
        "max_steps": config.max_steps or -1, "eval_strategy": "steps" if config.eval_steps else "no",
        "max_grad_norm": config.max_grad_norm if config.max_grad_norm < float("inf") else 0.0,  # 0 turns it off there
        "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8,  # torch's, which our trainer leaves as they are
        "use_cpu": device == "cpu", "bf16": precision == "bf16", "fp16": precision == "fp16",
        "report_to": list(config.trackers), "use_vllm": config.sampler == "vllm",
        "vllm_mode": "colocate" if config.vllm_server is None else "server",
        "vllm_importance_sampling_mode": f"{config.sampler_correction}_truncate",
    }  # fmt: skip
    if config.optimizer == "adamw_8bit":
        settings["optim"] = "adamw_bnb_8bit"
    return trl.GRPOConfig(**settings | changes)


def to_trl_reward(function: RewardFunction, *, timeout: float | None = None):
    """One of our reward functions as TRL calls its own, checked and named as in our trainer.

    TRL hands over the completions of chats as lists of messages, where ours are texts, and gives every function
    everything it knows, where ours get the columns that they name. Of a model whose thoughts the tokenizer parses
    apart (`response_template`), the text is without them.

    Args:
        function: f(prompts, completions, **columns); a model of rewards as SequenceClassifierReward(model, tokenizer).
        timeout: our `reward_timeout`, in seconds.
    Returns: f(prompts, completions, **columns) -> list of B floats, NaN where the function does not score.
    Raises: TypeError for what is not one function.
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

    reward.__name__ = rewards.names[0]  # TRL's metrics are called after it
    return reward


def _refused(config: GRPOConfig) -> Iterator[str]:
    """One sentence or two for each setting whose loss TRL's GRPOTrainer does not compute."""
    c = config
    constant = c.aggregation_constant
    reasons = {
        "top_k": c.top_k > 0 and "TRL samples among these tokens but scores among all, so its ratio and KL are those "
        "of another distribution. Set top_k=0; if you accept that, to_trl(config.replace(top_k=0), top_k=...)",
        "top_p": c.top_p < 1 and "as top_k: TRL scores among all tokens. Set top_p=1.0",
        "gamma": c.gamma < 1 and "there every token gets the whole advantage. Set gamma=1.0",
        "baseline": c.baseline != "mean" and 'TRL subtracts the mean of the group. Set baseline="mean", or use '
        "trl.RLOOTrainer for leave-one-out (without a std, that is K / (K - 1) times the same advantage)",
        "std_eps": c.scale_rewards != "none" and c.std_eps != 1e-4 and "TRL adds 0.0001. Set std_eps=0.0001",
        "kl_in": c.kl_coef > 0 and c.kl_in == "reward" and 'TRL has the KL in the loss. Set kl_in="loss" and '
        'kl_estimator="k3", or use trl.RLOOTrainer',
        "kl_estimator": c.kl_coef > 0 and c.kl_in == "loss" and c.kl_estimator != "k3" and "TRL estimates by k3. Set "
        'kl_estimator="k3"; with to_trl(config, use_bias_correction_kl=True) its expected gradient is that of k2',
        "aggregation": c.surrogate == "cispo" and c.aggregation != "token-mean" and "of CISPO TRL takes the mean over "
        'all tokens. Set aggregation="token-mean"',
        "aggregation_constant": constant not in (None, c.max_new_tokens) and "TRL divides by max_new_tokens. Leave it "
        "out: the constant scales the whole loss, and only max_grad_norm and Adam's epsilon can tell",
        "lora_rank": c.lora_rank is not None and "TRL takes an adapter beside its config. Leave it out, and give "
        f"GRPOTrainer peft_config=LoraConfig(r={c.lora_rank}, lora_alpha={c.lora_alpha}, target_modules='all-linear')",
        "sampler": c.sampler == "vllm" and c.kl_coef > 0 and "TRL weighs what vLLM sampled, but not in the KL term. "
        'Set kl_coef=0.0; if you accept that, to_trl(config.replace(sampler="model", vllm_server=None), use_vllm=True)',
        "reward_timeout": c.reward_timeout is not None and "TRL waits for ever. Leave it out, and use "
        f"to_trl_reward(function, timeout={c.reward_timeout})",
    }  # fmt: skip
    for name, reason in reasons.items():
        if reason:
            yield f"{name}={getattr(c, name)!r}: {reason}."
