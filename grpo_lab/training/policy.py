"""The policy, its reference, and how both score completions: as they were sampled."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grpo_lab.hardware.devices import autocast
from grpo_lab.hardware.processes import Processes
from grpo_lab.models.adapters import add_lora, check_adapter, is_adapted
from grpo_lab.models.forward import evaluating
from grpo_lab.models.preparation import disable_dropout, enable_checkpointing, match_precision, trainable_in_float32
from grpo_lab.rollout.sampling import Rollouts
from grpo_lab.rollout.scoring import Scores, completion_logprobs, completion_scores
from grpo_lab.training.config import GRPOConfig


@dataclass
class PolicyModels:
    """The models of a run on their device, and the one place that says how completions are scored."""

    trained: nn.Module
    """The policy whose weights receive gradients."""
    whole: nn.Module
    """The policy that samples and scores without gradient: `trained` itself, or with FSDP an unsharded copy."""
    reference: nn.Module | None
    """Frozen reference of the KL penalty. None: not needed (kl_coef 0), or `trained` with its adapter off."""
    device: torch.device
    precision: str
    """Precision of the arithmetic: "fp32", "bf16" or "fp16"."""
    config: GRPOConfig
    score: Callable[..., Scores] = completion_scores
    """How the update scores `trained`; with FSDP a forward pass of the sharded model."""

    def autocast(self) -> torch.autocast:
        """Return the context in which the models compute."""
        return autocast(self.device, self.precision)

    def scores(self, rollouts: Rollouts) -> Scores:
        """Score completions under the trained policy; gradients flow where they are enabled."""
        with self.autocast():
            return self._score_under(self.trained, rollouts, self.score)

    def logprobs(self, rollouts: Rollouts) -> Tensor:
        """Return [B, T] log-probabilities in nats under the policy, without gradient."""
        return self._logprobs_under(self.whole, rollouts)

    def reference_logprobs(self, rollouts: Rollouts) -> Tensor | None:
        """Return [B, T] log-probabilities in nats under the reference; None, and nothing computed, if kl_coef is 0."""
        if self.config.kl_coef == 0:
            return None
        if self.reference is not None:
            return self._logprobs_under(self.reference, rollouts)
        with self.trained.disable_adapter():
            return self._logprobs_under(self.trained, rollouts)

    @torch.no_grad()
    def _logprobs_under(self, model: nn.Module, rollouts: Rollouts) -> Tensor:
        with evaluating(model), self.autocast():
            return self._score_under(model, rollouts, completion_logprobs)

    def _score_under(self, model: nn.Module, rollouts: Rollouts, score: Callable):
        # the sampler's temperature and kept set: policy, old policy and reference are compared under one distribution
        return score(
            model, rollouts.input_ids, rollouts.attention_mask, rollouts.num_tokens,
            dedup=self.config.disable_dropout, temperature=self.config.temperature, kept=rollouts.kept,
        )  # fmt: skip


def prepare_models(
    model: nn.Module,
    ref_model: nn.Module | None,
    config: GRPOConfig,
    *,
    device: torch.device,
    precision: str,
    processes: Processes,
) -> PolicyModels:
    """Put policy and reference on the device, ready to train: adapter, precision, dropout, checkpointing.

    Args:
        model, ref_model: as `GRPOTrainer` takes them; both are changed in place.
    Raises: ValueError, with the cure, for what cannot be trained or compared.
    """
    check_shardable(model, config, precision)
    if config.lora_rank:
        model = add_lora(model, rank=config.lora_rank, alpha=config.lora_alpha, seed=config.seed)
    if is_adapted(model):
        check_adapter(model)
    trainable_in_float32(model)
    processes.broadcast_weights(model.to(device))
    if config.kl_coef == 0:
        ref_model = None  # what is not needed is neither kept on the device nor computed
    elif ref_model is None and not is_adapted(model):
        ref_model = copy.deepcopy(model)
    if ref_model is not None:
        sizes = [m.get_input_embeddings().weight.shape[0] for m in (model, ref_model)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"model and ref_model must share a vocabulary, got {sizes[0]} and {sizes[1]} tokens.")
        match_precision(ref_model, model)  # so that the KL to an untouched reference is exactly 0
        processes.broadcast_weights(ref_model.requires_grad_(False).to(device))
    if config.disable_dropout:
        disable_dropout(model)
    if config.gradient_checkpointing:
        enable_checkpointing(model)
    make_generation_config_valid(model)
    return PolicyModels(model, model, ref_model, device, precision, config)


def check_shardable(model: nn.Module, config: GRPOConfig, precision: str) -> None:
    """Raises ValueError if `fsdp` is asked for and cannot be done."""
    if config.fsdp and (config.lora_rank or is_adapted(model) or precision == "fp16"):
        raise ValueError(
            "fsdp shards a model that is trained whole, in fp32 or bf16. Leave out fsdp: an adapter is small."
        )
    if config.fsdp and config.optimizer == "adamw_8bit":
        raise ValueError("bitsandbytes takes no shards. Use optimizer adamw: with fsdp each process keeps a share.")


def make_generation_config_valid(model: nn.Module) -> None:
    """Turn sampling on where the generation config names a temperature without it: transformers would not save it."""
    if getattr(model, "generation_config", None) is not None:
        try:
            model.generation_config.validate(strict=True)
        except ValueError:
            model.generation_config.do_sample = True
