"""GRPO Lab: learn Group Relative Policy Optimization by building it, and use what you built.

Letters in shapes, everywhere in the package:

    P  prompts        K  completions per prompt        B = P * K  rows
    T  completion tokens        S  prompt and completion tokens        V  vocabulary

Names are loaded when they are first used, so that `grpo-lab --help` need not wait for PyTorch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grpo_lab.advantages import group_advantages
    from grpo_lab.config import GRPOConfig
    from grpo_lab.data import SimplePromptDataset
    from grpo_lab.kl import exact_kl, kl_estimate
    from grpo_lab.logprobs import token_entropies, token_logprobs, truncate
    from grpo_lab.losses import LossTerms, aggregate, clipped_surrogate, grpo_loss
    from grpo_lab.reward_models import CausalLMReward, SequenceClassifierReward
    from grpo_lab.sampling import Rollouts, sample
    from grpo_lab.scoring import completion_logprobs
    from grpo_lab.trainer import GRPOTrainer, StepRecord

__version__ = "0.1.0"

_HOME = {
    "token_logprobs": "logprobs",
    "token_entropies": "logprobs",
    "truncate": "logprobs",
    "group_advantages": "advantages",
    "kl_estimate": "kl",
    "exact_kl": "kl",
    "clipped_surrogate": "losses",
    "aggregate": "losses",
    "grpo_loss": "losses",
    "LossTerms": "losses",
    "SimplePromptDataset": "data",
    "sample": "sampling",
    "Rollouts": "sampling",
    "completion_logprobs": "scoring",
    "CausalLMReward": "reward_models",
    "SequenceClassifierReward": "reward_models",
    "GRPOConfig": "config",
    "GRPOTrainer": "trainer",
    "StepRecord": "trainer",
}
__all__ = [*_HOME]  # noqa: PLE0604 (the keys are strings)


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(f"grpo_lab.{_HOME[name]}"), name)
    raise AttributeError(f"module 'grpo_lab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
