"""GRPO Lab: learn Group Relative Policy Optimization by building it, and use what you built.

Letters in shapes, everywhere in the package:

    P  prompts        K  completions per prompt        B = P * K  rows
    T  completion tokens        S  prompt and completion tokens        V  vocabulary
"""

from importlib import import_module

__version__ = "0.1.0"

# Loaded when first used, so that `grpo-lab --help` need not wait for PyTorch.
_PUBLIC = {
    "algorithm.logprobs": ("token_logprobs", "token_entropies", "truncate"),
    "algorithm.advantages": ("group_advantages",),
    "algorithm.kl": ("kl_estimate", "exact_kl"),
    "algorithm.losses": ("clipped_surrogate", "aggregate", "grpo_loss", "LossTerms"),
    "rollout.prompts": ("SimplePromptDataset",),
    "rollout.sampling": ("sample", "Rollouts"),
    "rollout.scoring": ("completion_logprobs",),
    "rewards.reward_models": ("SequenceClassifierReward", "CausalLMReward"),
    "training.config": ("GRPOConfig",),
    "training.batches": ("StepRecord",),
    "training.trainer": ("GRPOTrainer",),
    "planning.plan": ("plan",),
}
_MODULES = {"checks": "course.checks", "pocket": "tasks.pocket"}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f"grpo_lab.{_HOME[name]}"), name)
    if name in _MODULES:
        return import_module(f"grpo_lab.{_MODULES[name]}")
    raise AttributeError(f"module 'grpo_lab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, *_MODULES])
