"""Who draws the completions: the policy itself, or vLLM with a copy of its weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from grpo_lab.algorithm.losses import sampler_weights
from grpo_lab.models.forward import evaluating
from grpo_lab.rollout.sampling import Rollouts, left_pad, sample
from grpo_lab.rollout.vllm import VLLMSampler, warn_if_far
from grpo_lab.training.config import GRPOConfig
from grpo_lab.training.policy import PolicyModels


class Sampler(Protocol):
    """Draws completions from the policy as it is now."""

    is_policy: bool
    """Whether the policy itself samples, so that its log-probabilities must agree up to rounding."""

    def sample(
        self, prompts: Sequence[list[int]], *, num_generations: int, uniforms: Tensor, end_ids: Sequence[int],
        pad_id: int, temperature: float, top_k: int, top_p: float,
    ) -> Rollouts:  # fmt: skip
        """Draw K completions for each prompt, given as token ids; see `rollout.sampling.sample`."""

    def weights(self, logprobs: Tensor, rollouts: Rollouts) -> Tensor | None:
        """Return the weight of each completion [B] or token [B, T], given the policy's log-probabilities [B, T]."""

    def check(self, mean_difference: float) -> None:
        """Warn if sampler and policy differ by this many nats per token, which is more than rounding."""


class ModelSampler:
    """The policy samples in this process, in eval mode."""

    is_policy = True

    def __init__(self, models: PolicyModels):
        self.models = models

    def sample(self, prompts: Sequence[list[int]], *, pad_id: int, **settings) -> Rollouts:
        """Draw completions on the policy's device."""
        input_ids, mask = (tensor.to(self.models.device) for tensor in left_pad(prompts, pad_id))
        with evaluating(self.models.whole), self.models.autocast():
            return sample(self.models.whole, input_ids, mask, pad_id=pad_id, **settings)

    def weights(self, logprobs: Tensor, rollouts: Rollouts) -> None:
        """Return None: every token counts once."""

    def check(self, mean_difference: float) -> None:
        """Nothing to warn of: the first step of a run compares them token by token."""


class ExternalSampler:
    """vLLM samples; truncated importance weights correct for its rounding.

    Raises: ValueError or ConnectionError that says what is missing.
    """

    is_policy = False

    def __init__(self, models: PolicyModels, tokenizer, config: GRPOConfig):
        self.models, self.config = models, config
        self.vllm = VLLMSampler(
            models.trained, tokenizer, precision=models.precision, server=config.vllm_server,
            folder=Path(config.output_dir), gpu_memory=config.vllm_gpu_memory,
        )  # fmt: skip

    def sample(self, prompts: Sequence[list[int]], **settings) -> Rollouts:
        """Copy the policy's weights to vLLM and draw completions there."""
        return self.vllm.sample(self.models.trained, prompts, **settings).to(self.models.device)

    def weights(self, logprobs: Tensor, rollouts: Rollouts) -> Tensor:
        """Return the capped ratio of the policy's probability to vLLM's."""
        return sampler_weights(
            logprobs, rollouts.logprobs, rollouts.completion_mask,
            correction=self.config.sampler_correction, cap=self.config.sampler_ratio_cap,
        )  # fmt: skip

    def check(self, mean_difference: float) -> None:
        """Warn if vLLM has other weights than the policy."""
        warn_if_far(mean_difference)
