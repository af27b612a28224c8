"""GRPO in one loop: sample K completions per prompt, score them, compare within the group, update.

`GRPOTrainer.steps()` is the whole algorithm; `train()` is a loop over it with a progress bar. An optimizer
step works on a `Batch`: batch_size * gradient_accumulation_steps prompts with their K completions each, in
micro-batches of at least batch_size prompts: more where completions are short. Every mean is over the whole
batch, so micro-batches change only memory.
"""

import copy
import math
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers import get_scheduler

from grpo_lab.algorithm.advantages import discounted, group_advantages
from grpo_lab.algorithm.kl import kl_estimate
from grpo_lab.algorithm.losses import grpo_loss, sampler_weights
from grpo_lab.hardware.devices import autocast, make_accelerator, resolve_device, resolve_precision
from grpo_lab.hardware.processes import Processes
from grpo_lab.hardware.signals import interrupt_between_steps
from grpo_lab.hardware.system import return_freed_memory
from grpo_lab.models.adapters import add_lora, check_adapter, is_adapted, merged
from grpo_lab.models.forward import evaluating
from grpo_lab.models.preparation import disable_dropout, enable_checkpointing, match_precision, trainable_in_float32
from grpo_lab.rewards.reward_models import RewardModel, Rewards, Scored
from grpo_lab.rollout.prompts import Prompt, Row, checked_dataset, encode_prompt, longest_prompts
from grpo_lab.rollout.sampling import Rollouts, check_context, end_token_ids, left_pad, pad_token_id, sample
from grpo_lab.rollout.scoring import completion_logprobs, completion_scores
from grpo_lab.rollout.vllm import VLLMSampler, warn_if_far
from grpo_lab.training import checkpoints, output_dir, run_state
from grpo_lab.training.batches import Batch, MicroBatch, StepRecord, UpdateSums, batch_metrics, make_micro_batches
from grpo_lab.training.config import GRPOConfig
from grpo_lab.training.evaluation import evaluation_lines, evaluation_metrics
from grpo_lab.training.figures import training_figure
from grpo_lab.training.memory import memory_explained, rollout_batch_size, weight_bytes
from grpo_lab.training.metrics import JsonLines, mean_metrics
from grpo_lab.training.optimizer import make_optimizer
from grpo_lab.training.order import PromptOrder, derived_seed
from grpo_lab.training.shards import (
    full,
    gather_state,
    gather_weights,
    pad_micro_batches,
    scatter_state,
    scatter_weights,
    shard,
)

WHY_ZERO = (
    "The loss hovers around 0 and that is fine: advantages sum to 0 in every group, so its value says\n"
    "nothing, only its gradient does. Watch reward, grad_norm and frac_reward_zero_std."
)


class GRPOTrainer:
    """Fine-tunes a causal language model with Group Relative Policy Optimization.

    Args:
        model: the policy, trained in place; with `lora_rank`, or given as a `peft.PeftModel`, its adapter alone.
            Trained weights in half precision are turned into float32: at usual learning rates an update
            would be lost in rounding.
        ref_model: the reference of the KL penalty, never changed. None: the model as it is now, as a frozen
            copy, or, where an adapter is trained, the same model with the adapter off. Needed only if kl_coef > 0.
        reward_model: `f(prompts, completions, **columns) -> list[float]`, a sequence-classification model, a
            causal LM (a demonstration), or a list of these, of which the first says what `evaluate` counts as right.
        tokenizer: the policy's.
        config: GRPOConfig; None takes the defaults.
        train_dataset: SimplePromptDataset, or a `datasets.Dataset` with a column "prompt".
        eval_dataset: the same, for `eval_steps`.
    Raises: ValueError or TypeError, with the cure, for what cannot work.
    """

    def __init__(
        self,
        model: nn.Module,
        ref_model: nn.Module | None,
        reward_model: RewardModel,
        tokenizer,
        config: GRPOConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
    ):
        self.config = config = config or GRPOConfig()
        self.tokenizer = tokenizer
        self.train_dataset = checked_dataset(train_dataset, "train_dataset")
        self.eval_dataset = checked_dataset(eval_dataset, "eval_dataset") if eval_dataset is not None else None
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
                stacklevel=2,
            )
        self.output_dir = Path(config.output_dir)
        device = resolve_device(config.device)
        self.precision = resolve_precision(config.precision, device)
        self.accelerator = make_accelerator(device, self.precision, config.trackers, config.output_dir)
        self.device = self.accelerator.device
        self.processes = Processes(self.accelerator.num_processes, self.accelerator.process_index)
        self._check_enough_prompts()

        model = self._prepare_models(model, ref_model)
        self.policy, self._scores = self.model, completion_scores  # what samples, and how the update scores
        self._sharded = config.fsdp and self.processes.world_size > 1  # one process has nobody to share with
        if self._sharded:
            self.policy, self._scores = shard(model, completion_scores, self.processes, self.device)
            if self.device.type == "cpu":
                return_freed_memory()  # layers come and go whole, and would leave the heap in pieces
        self.rewards = Rewards(reward_model, tokenizer, config.reward_weights, config.reward_timeout)
        for function in self.rewards.functions:
            if isinstance(judge := getattr(function, "model", None), nn.Module):
                judge.to(self.device)
                if self._sharded and judge is self.model:
                    function.model = self.policy  # shards alone say nothing
        self.end_ids, self.pad_id = end_token_ids(model, tokenizer), pad_token_id(tokenizer, model)
        columns = self._check_longest_prompts() + config.max_new_tokens
        sizes = weight_bytes(self.model)
        self._sampled_at_once = rollout_batch_size(self.model, config, self.precision, columns, **sizes)
        self.vllm = self._start_vllm() if config.sampler == "vllm" else None

        self.order = PromptOrder(len(self.train_dataset), config.prompts_per_step, config.seed)
        rollouts = self.order.batches_per_epoch * config.num_epochs
        self.total_steps = config.max_steps or rollouts * config.num_iterations
        optimizer = make_optimizer(model, config, self.device)
        self.scheduler = get_scheduler(
            config.lr_scheduler, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=self.total_steps
        )
        self.optimizer = self.accelerator.prepare(optimizer)

        self._fingerprints: dict[str, str] | None = None
        self.step = 0
        self.num_tokens = 0
        self.skipped_steps = self.skipped_in_a_row = 0
        self.batch: Batch | None = None
        self.unlogged: list[dict[str, float]] = []
        self.metrics_file = JsonLines(self.output_dir / "metrics.jsonl")
        self.completions_file = JsonLines(self.output_dir / "completions.jsonl")

    # --- the algorithm ---------------------------------------------------------------------------------

    def steps(self, resume: bool | str | Path | None = None) -> Iterator[StepRecord]:
        """The whole run, one optimizer step at a time; logs, saves and evaluates as configured on the way.

        Args:
            resume: True goes on from the newest checkpoint in output_dir, a path from that one.
        """
        self._start(resume)
        while self.step < self.total_steps:
            began = time.perf_counter()
            if self.batch is None:
                self.batch = self._next_batch()
            metrics = self.update(self.batch)
            record = self._record(self.batch, metrics, time.perf_counter() - began)
            if self.batch.updates == self.config.num_iterations:
                self.batch = None
            self._after_step(record)
            yield record
        final = merged(self.policy) if self.processes.is_main and is_adapted(self.policy) else self.policy
        self._write(self.output_dir / checkpoints.FINAL, final)
        for tracker in self.accelerator.trackers:  # end_training() would part the processes, and more may follow
            tracker.finish()

    def _next_batch(self) -> Batch:
        position, random = self.order.state_dict(), run_state.random_state()
        try:
            return self.collect(next(self.order))
        except BaseException as error:
            error.add_note(f"It happened in step {self.step + 1}.")
            self.order.load_state_dict(position)  # whoever mends the fault and goes on loses no prompt,
            run_state.restore_random_state(random)  # and draws what an unbroken run would have drawn
            raise

    def collect(self, indices: Sequence[int]) -> Batch:
        """Sample K completions for each of these prompts, score them, and compare each with its group.

        Each process does so for its share of the prompts; what is said of them is said of all.
        """
        config, K = self.config, self.config.num_generations_per_prompt
        together, share = self.processes.gather, self.processes.shard_range(len(indices))
        uniforms = self._uniforms(len(indices) * K, "rollout", self.step)[share.start * K : share.stop * K]
        rows = [self.train_dataset[indices[i]] for i in share]
        sampled, texts = [], []
        for start in range(0, len(rows), self._sampled_at_once):
            some = rows[start : start + self._sampled_at_once]
            sampled.append(self.sample([r["prompt"] for r in some], uniforms[start * K : (start + len(some)) * K], K))
            texts += self.decode(sampled[-1])
        scored = [
            self._score(rows[start : start + config.batch_size], texts[start * K : (start + config.batch_size) * K], K)
            for start in range(0, len(rows), config.batch_size)
        ]
        rewards = torch.cat([s.total for s in scored])
        advantages = self._advantages(rewards)
        rollouts = Rollouts.join(sampled, self.pad_id)
        longest = rollouts.input_ids.shape[1] - rollouts.num_tokens + config.max_new_tokens
        no_gradient = (advantages.view(-1, K) == 0).all(1) & (config.kl_coef == 0 and not self._sharded)
        parts = make_micro_batches(rollouts, K, config.batch_size * K * longest, no_gradient)
        for part in parts:
            part.ref_logprobs = self.reference_logprobs(part.rollouts)
        if config.kl_in == "reward" and config.kl_coef > 0:
            advantages = self._advantages(rewards - self._kl_in_reward(parts))
        for part in parts:
            part.advantages = advantages[part.rows].to(self.device)
            if config.gamma < 1:
                part.advantages = discounted(part.advantages, part.rollouts.completion_mask, gamma=config.gamma)

        by_function = {name: torch.cat([s.parts[name] for s in scored]) for name in self.rewards.names}
        tokens = {row: values for part in parts for row, values in part.token_rows()}
        completions = [
            {
                "prompt": rows[i // K]["prompt"],
                "completion": texts[i],
                "reward": rewards[i].item(),
                "rewards": {name: _or_none(values[i].item()) for name, values in by_function.items()},
                "advantage": advantages[i].item(),
                **tokens[i],
            }
            for i in range(len(texts))
        ]
        self.num_tokens += int(self.processes.sum(sum(int(part.rollouts.attention_mask.sum()) for part in parts)))
        lengths, ended = rollouts.completion_mask.sum(1).cpu(), rollouts.ended.cpu()
        metrics = batch_metrics(
            *(torch.cat(together([mine])) for mine in (lengths, ended)), torch.cat(together([rewards])).view(-1, K),
            {name: torch.cat(together([mine])) for name, mine in by_function.items()},
        )  # fmt: skip
        return Batch(parts, together(completions), metrics)

    def _advantages(self, rewards: Tensor) -> Tensor:
        """[B] how much better each completion is than its group, from rewards [B]; of this process, as all see them."""
        config, K = self.config, self.config.num_generations_per_prompt
        rewards = torch.cat(self.processes.gather([rewards]))
        if rewards.isnan().all():
            raise ValueError("no reward function scored any completion of this step: all returned None or NaN.")
        advantages = group_advantages(
            rewards.view(-1, K), baseline=config.baseline, scale=config.scale_rewards, std_eps=config.std_eps
        )
        share = self.processes.shard_range(len(advantages))
        return advantages[share.start : share.stop].flatten()

    def update(self, batch: Batch) -> dict[str, float]:
        """One optimizer step on the batch: clipped loss with KL to the reference, over all its micro-batches."""
        config, total = self.config, self.processes.sum
        tokens = int(total(sum(int(part.rollouts.completion_mask.sum()) for part in batch.parts)))
        completions = int(total(sum(len(part.rollouts.ended) for part in batch.parts)))
        sums = UpdateSums()
        self.optimizer.zero_grad()  # whatever an interrupted step or an earlier cell left there
        self.model.train()
        for part, factor in (
            pad_micro_batches(batch.parts, self.processes) if self._sharded else [(p, 1.0) for p in batch.parts]
        ):
            mask = part.rollouts.completion_mask
            with self._autocast(), torch.set_grad_enabled(not part.no_gradient):
                scores = self._score_under(self.model, part.rollouts, self._scores)
            weights = None if self.vllm is None else self._sampler_weights(part, scores.logprobs)
            terms = grpo_loss(
                scores.logprobs,
                part.old_logprobs,  # None at the first update: the policy is the one that sampled
                part.advantages,
                mask,
                ref_logprobs=part.ref_logprobs,
                weights=weights,
                kl_coef=config.kl_coef if config.kl_in == "loss" else 0.0,
                kl_estimator=config.kl_estimator,
                clip_range=config.clip_range,
                clip_range_high=config.clip_range_high,
                importance=config.importance,
                surrogate=config.surrogate,
                aggregation=config.aggregation,
                constant=config.aggregation_constant or config.max_new_tokens,
                total=tokens if config.aggregation == "token-mean" else completions,
            )
            if not part.no_gradient:
                self._backward(terms.loss * factor)
            if factor == 0:
                continue
            if batch.updates == 0:
                part.old_logprobs = scores.logprobs.detach()
            sums.add(terms, scores, part, weights)
        sums = UpdateSums.merged(self.processes.gather([sums]))

        self.model.eval()  # as from_pretrained gave it
        learning_rate = self.scheduler.get_last_lr()[0]
        grad_norm = self._step_optimizer()
        batch.updates += 1
        metrics = {
            "loss": sums.loss,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "entropy": sums.entropy / tokens,
            "clip_ratio/low_mean": sums.clipped_low / tokens,
            "clip_ratio/high_mean": sums.clipped_high / tokens,
            "clip_ratio/region_mean": (sums.clipped_low + sums.clipped_high) / tokens,
        }
        if batch.parts[0].ref_logprobs is not None:
            metrics["kl"] = sums.kl / tokens
        if batch.updates == 1:
            metrics["sampling/sampling_logp_difference/mean"] = sums.difference / tokens
            metrics["sampling/sampling_logp_difference/max"] = sums.largest_difference
        if batch.updates == 1 and self.vllm is not None:
            metrics["sampling/importance_sampling_ratio/min"] = min(sums.weights)
            metrics["sampling/importance_sampling_ratio/mean"] = math.fsum(sums.weights) / len(sums.weights)
            metrics["sampling/importance_sampling_ratio/max"] = max(sums.weights)
            warn_if_far(sums.difference / tokens)
        if self.step == 0:
            self._check_first_update(sums)
        return metrics

    def _backward(self, loss: Tensor) -> None:
        # not accelerate's, which divides by how many steps its environment, or another trainer here, accumulates over
        scaler = self.accelerator.scaler
        (loss if scaler is None else scaler.scale(loss)).backward()

    def _step_optimizer(self) -> float:
        scaler = self.accelerator.scaler
        self.processes.all_reduce_gradients(self.model)
        norm = full(self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)).item()
        still_scaling = scaler is not None and scaler.get_scale() > 1
        if math.isfinite(norm) or scaler is not None:  # a scaler skips by itself, and must see it
            self.optimizer.step()
            if self._sharded:
                gather_weights(self.model, self.policy)
        self.optimizer.zero_grad()  # sampling needs the memory
        if math.isfinite(norm):
            self.skipped_in_a_row = 0
            self.scheduler.step()
        else:
            self.skipped_steps += 1
            self.skipped_in_a_row += not still_scaling  # fp16 finds its scale by trying
            if self.skipped_in_a_row >= self.config.max_skipped_steps:
                raise ArithmeticError(
                    f"the gradient was not finite in {self.skipped_in_a_row} steps in a row (the last: step "
                    f"{self.step + 1}). The weights are as they were before. Lower --learning-rate"
                    f"{'' if self.precision == 'fp32' else f', or use --precision fp32 instead of {self.precision}'}."
                )
        return norm

    # --- its parts -------------------------------------------------------------------------------------

    def sample(self, prompts: Sequence[Prompt], uniforms: Tensor, num_generations: int, **truncation) -> Rollouts:
        """K completions for each prompt, drawn with these uniform numbers [P * K, T]; never with dropout."""
        ids = [encode_prompt(self.tokenizer, prompt) for prompt in prompts]
        check_context(self.policy, prompts, ids, self.config.max_new_tokens)
        config = self.config
        settings = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p} | truncation
        if self.vllm is not None:
            return self.vllm.sample(
                self.model, ids, num_generations=num_generations, uniforms=uniforms, end_ids=self.end_ids,
                pad_id=self.pad_id, **settings,
            ).to(self.device)  # fmt: skip
        input_ids, mask = left_pad(ids, self.pad_id)
        with evaluating(self.policy), self._autocast():
            return sample(
                self.policy, input_ids.to(self.device), mask.to(self.device), num_generations=num_generations,
                uniforms=uniforms, end_ids=self.end_ids, pad_id=self.pad_id, **settings,
            )  # fmt: skip

    def _start_vllm(self) -> VLLMSampler:
        if self.processes.world_size > 1:
            raise ValueError(
                'sampler "vllm" is for one process: the others would change its weights at their own times.'
            )
        self._sampled_at_once = sys.maxsize  # it makes its own batches, and its weights go over once for all of them
        return VLLMSampler(
            self.model, self.tokenizer, precision=self.precision, server=self.config.vllm_server,
            folder=self.output_dir, gpu_memory=self.config.vllm_gpu_memory,
        )  # fmt: skip

    def _sampler_weights(self, part: MicroBatch, logprobs: Tensor) -> Tensor:
        """What each completion (or token) counts, given [B, T] the policy's log-probabilities of it as of now."""
        return sampler_weights(
            logprobs if part.old_logprobs is None else part.old_logprobs, part.rollouts.logprobs,
            part.rollouts.completion_mask, correction=self.config.sampler_correction, cap=self.config.sampler_ratio_cap,
        )  # fmt: skip

    def decode(self, rollouts: Rollouts) -> list[str]:
        """The completions as text, without special tokens."""
        ids, lengths = rollouts.completion_ids.tolist(), rollouts.completion_mask.sum(1).tolist()
        return self.tokenizer.batch_decode([i[:n] for i, n in zip(ids, lengths, strict=True)], skip_special_tokens=True)

    def reference_logprobs(self, rollouts: Rollouts) -> Tensor | None:
        """[B, T] log-probabilities in nats under the reference; None where kl_coef is 0: nothing is computed then."""
        if self.config.kl_coef == 0:
            return None
        if self.ref_model is not None:
            return self._logprobs_under(self.ref_model, rollouts)
        with self.model.disable_adapter():
            return self._logprobs_under(self.model, rollouts)

    @torch.no_grad()
    def _logprobs_under(self, model: nn.Module, rollouts: Rollouts) -> Tensor:
        with evaluating(model), self._autocast():
            return self._score_under(model, rollouts, completion_logprobs)

    def _score_under(self, model: nn.Module, rollouts: Rollouts, score):
        """The one place that says how completions are scored: as they were sampled."""
        return score(
            model, rollouts.input_ids, rollouts.attention_mask, rollouts.num_tokens,
            dedup=self.config.disable_dropout, temperature=self.config.temperature, kept=rollouts.kept,
        )  # fmt: skip

    def _autocast(self) -> torch.autocast:
        return autocast(self.device, self.precision)

    def evaluate(self, dataset=None, *, num_generations: int | None = None) -> dict[str, float]:
        """How often is the answer right? Greedily, and sampled as in training; each with a 95 % interval.

        Args:
            dataset: with at least one prompt; None takes eval_dataset.
            num_generations: completions per prompt that are sampled; None takes the config's K.
        Returns: "eval/pass@1_greedy", "eval/pass@1" (sampled) and "eval/pass@K", each also with "_low" and
            "_high" (Wilson, over prompts), and "eval/reward", the mean sampled reward. Right means that the
            first reward function gives at least `success_reward`, whatever others and weights add. Draws no number
            that training would have drawn.
        """
        dataset = checked_dataset(dataset if dataset is not None else self.eval_dataset, "dataset")
        K = num_generations or self.config.num_generations_per_prompt
        with memory_explained(self.device, self.precision, self.config):
            return self._evaluate(dataset, K)

    def _evaluate(self, dataset, K: int) -> dict[str, float]:
        right: list[tuple[float, int]] = []
        rewards: list[float] = []
        size = max(1, self._sampled_at_once * self.config.num_generations_per_prompt // K)
        uniforms = self._uniforms(len(dataset) * K, "evaluate", 0)
        share = self.processes.shard_range(len(dataset))
        for start in range(share.start, share.stop, size):
            rows = [dataset[i] for i in range(start, min(start + size, share.stop))]
            greedy = self._answer(rows, uniforms[: len(rows)], 1, top_k=1).first  # whatever the numbers are
            answers = self._answer(rows, uniforms[start * K : (start + len(rows)) * K], K)
            sampled = answers.first.view(-1, K)
            right += zip((greedy >= self.config.success_reward).tolist(),
                         (sampled >= self.config.success_reward).sum(1).tolist(), strict=True)  # fmt: skip
            rewards += answers.total.tolist()
        return evaluation_metrics(self.processes.gather(right), self.processes.gather(rewards), K)

    def examples(self, dataset, number: int = 3) -> list[dict[str, Any]]:
        """One sampled completion for each of the first prompts, always with the same random numbers, to be looked at.

        Returns: dicts of prompt, completion, reward.
        """
        rows = [dataset[i] for i in range(min(number, len(dataset)))]
        rollouts = self.sample([row["prompt"] for row in rows], self._uniforms(len(rows), "examples", 0), 1)
        completions = self.decode(rollouts)
        rewards = self._score(rows, completions, 1).total.tolist()
        return [
            {"prompt": row["prompt"], "completion": c, "reward": r}
            for row, c, r in zip(rows, completions, rewards, strict=True)
        ]

    def _answer(self, rows: list[Row], uniforms: Tensor, K: int, **truncation) -> Scored:
        rollouts = self.sample([row["prompt"] for row in rows], uniforms, K, **truncation)
        return self._score(rows, self.decode(rollouts), K)

    def _score(self, rows: list[Row], completions: list[str], K: int):
        """Ask the reward functions, who see each prompt and column K times, once beside each completion."""
        repeated = {name: [row[name] for row in rows for _ in range(K)] for name in rows[0]}
        return self.rewards(repeated.pop("prompt"), completions, repeated)

    def _kl_in_reward(self, parts: list[MicroBatch]) -> Tensor:
        """[B] what the KL takes off the reward: beta times the log-ratio of the whole completion."""
        penalties = torch.empty(sum(len(part.rows) for part in parts))
        for part in parts:
            # both sides from the scorer: in half precision the sampler's rounding would pass for a reward
            logprobs = self._logprobs_under(self.policy, part.rollouts)
            k1 = kl_estimate(logprobs, part.ref_logprobs, part.rollouts.completion_mask, estimator="k1")
            penalties[part.rows] = self.config.kl_coef * k1.sum(1).float().cpu()
        return penalties

    def _uniforms(self, rows: int, purpose: str, number: int) -> Tensor:
        # drawn on the CPU from a seed of their own: the same on every device, whatever was drawn before
        generator = torch.Generator().manual_seed(derived_seed(self.config.seed, purpose, number))
        return torch.rand(rows, self.config.max_new_tokens, generator=generator)

    def _check_longest_prompts(self) -> int:
        """Better now than after a thousand steps. Returns the tokens of the longest."""
        longest = longest_prompts(self.train_dataset)
        ids = [encode_prompt(self.tokenizer, prompt) for prompt in longest]
        check_context(self.policy, longest, ids, self.config.max_new_tokens)
        return max(map(len, ids))

    def _check_first_update(self, sums: UpdateSums) -> None:
        """Sampler and scorer must see one distribution, and an untouched reference be no distance away."""
        if not math.isfinite(sums.difference + sums.kl):
            raise ArithmeticError(
                "log-probabilities are not finite: the weights of the model or reference are damaged."
            )
        self.first_check = {"ratio": math.expm1(min(sums.largest_difference, 80.0)), "kl": sums.largest_kl}
        allowed = 1e-3 if self.precision == "fp32" else 0.5  # half precision rounds by per cents
        if self.first_check["ratio"] > allowed and self.vllm is None:  # of vLLM's the mean is judged, in every rollout
            warnings.warn(
                f"right after sampling the ratio should be 1, but is off by up to {self.first_check['ratio']:.2g}: "
                "this model does not give the same log-probabilities token by token as all at once.",
                stacklevel=2,
            )

    # --- the whole run ---------------------------------------------------------------------------------

    def train(self, resume: bool | str | Path | None = None) -> list[dict[str, Any]]:
        """Run all steps with a progress bar, then write final_model/ and training.png.

        Args:
            resume: True goes on from the newest checkpoint in output_dir, a path from that one.
        Returns: the rows of metrics.jsonl.
        Raises: MemoryError, once, with what to lower; ArithmeticError if the gradient stays infinite;
            KeyboardInterrupt after Ctrl-C, when the step has been finished and a checkpoint saved.
        """
        from tqdm.auto import tqdm  # the notebook's bar in a notebook

        quiet = {"dynamic_ncols": True, "disable": not self.processes.is_main}
        with (
            interrupt_between_steps() as interrupted,
            self._kept_after_a_fault(),
            memory_explained(self.device, self.precision, self.config),
            tqdm(total=self.total_steps, unit="step", **quiet) as bar,
        ):
            for record in self.steps(resume):
                if bar.n == 0:
                    bar.initial = record.step - 1  # a resumed run must not count old steps as fast ones
                bar.update(record.step - bar.n)
                bar.set_postfix_str(_few_words(record.metrics))
                if self.processes.is_main and bar.initial == record.step - 1 > 0:
                    bar.write(f"Resumed after step {bar.initial}.")
                if self.processes.is_main and record.step == 1:
                    bar.write(self._first_words())
                if self.processes.is_main and "eval/pass@1" in record.metrics:
                    lines = evaluation_lines(record.metrics, self.config.num_generations_per_prompt)
                    bar.write("\n  ".join([f"After step {record.step}, on prompts kept for evaluation", *lines]))
                if self.processes.sum(len(interrupted)) and record.step < self.total_steps:
                    self.save(self.output_dir / f"checkpoint-{record.step}")
                    raise KeyboardInterrupt(f"saved {self.output_dir / f'checkpoint-{record.step}'}")
        history = self.metrics_file.read()
        if self.processes.is_main:
            self._draw(history)
        return history

    def _first_words(self) -> str:
        what = "importance ratio" if self.vllm is None else "our probability of a token over vLLM's"
        words = f"Checked at step 1: {what} 1 ± {self.first_check['ratio']:.1e}"
        if self.config.kl_coef > 0:
            kl = self.first_check["kl"]
            words += f", KL to the reference {f'0 ± {kl:.1e}' if kl < 1e-3 else f'already up to {kl:.2g}'}"
        sums_to_zero = self.config.baseline != "none" and self.config.surrogate == "clip"
        return f"{words}.\n{WHY_ZERO}" if sums_to_zero else f"{words}."

    @contextmanager
    def _kept_after_a_fault(self) -> Iterator[None]:
        """After a fault the state is that of the last whole step: keep it, unless it has been saved."""
        try:
            yield
        except Exception as error:
            folder = self.output_dir / f"checkpoint-{self.step}"
            # of several processes others may be gone: only what this one has alone can be saved
            alone = self.processes.world_size == 1 or (self.processes.is_main and not (self.batch or self._sharded))
            if self.step and alone and not folder.exists():
                with suppress(Exception):  # the fault itself is what matters
                    checkpoints.save(folder, self.policy, self.tokenizer, self._state(alone=True))
            if self.step and output_dir.all_checkpoints(self.output_dir):
                error.add_note("What came before is saved: mend the cause, and go on with --resume (resume=True).")
            raise

    def _draw(self, history: list[dict[str, Any]]) -> None:
        try:
            figure = training_figure(history, title=f"GRPO, {self.step} optimizer steps")
        except ImportError:  # matplotlib is not needed to train
            warnings.warn("matplotlib is not installed, so training.png was not drawn.", stacklevel=2)
            return
        figure.savefig(self.output_dir / "training.png", dpi=120)

    def _start(self, resume: bool | str | Path | None) -> None:
        if resume:
            candidates = output_dir.to_resume(self.output_dir, resume)
            elsewhere = candidates[0].resolve().parent != self.output_dir.resolve()
            if elsewhere and self.processes.is_main:  # is it another run's folder?
                output_dir.prepare_output(self.output_dir, overwrite=self.config.overwrite_output_dir)
            self._load_first(candidates)
            self.processes.barrier()
            if self.processes.is_main:
                output_dir.forget_after(self.output_dir, self.step)
                self.metrics_file.cut_after(self.step)
                self.completions_file.cut_after(self.step)
        elif self.step == 0:
            if self.processes.is_main:
                output_dir.prepare_output(self.output_dir, overwrite=self.config.overwrite_output_dir)
            set_seed((self.config.seed + self.processes.rank) % 2**32)  # for dropout, and reward functions that draw
        self.processes.check_same("training data", self._identity()["training data"])
        if self.config.trackers:
            wandb = {"name": self.config.wandb_run_name, "dir": str(self.output_dir)}
            settings = {
                k: ",".join(map(str, v)) if isinstance(v, list) else v for k, v in self.config.to_dict().items()
            }
            settings = {k: v for k, v in settings.items() if v is not None}
            self.accelerator.init_trackers(self.config.wandb_project, settings, init_kwargs={"wandb": wandb})
        warm = self.config.warmup_steps
        if warm >= self.total_steps and self.config.lr_scheduler != "constant":
            warnings.warn(
                f"warmup_steps ({warm}) is not less than the {self.total_steps} steps of this run, so the learning "
                f"rate never reaches {self.config.learning_rate:g}. Lower --warmup-steps, or train longer.",
                stacklevel=3,
            )

    def _record(self, batch: Batch, update: dict[str, float], seconds: float) -> StepRecord:
        self.step += 1
        done = {
            "step": self.step,
            "epoch": self.order.epoch + self.order.cursor / self.order.size,
            "num_tokens": self.num_tokens,
            "skipped_steps": self.skipped_steps,
            "step_time": seconds,
        }
        return StepRecord(self.step, done | batch.metrics | update, batch.completions)

    def _after_step(self, record: StepRecord) -> None:
        """Evaluate, log and save, each when its time has come."""
        config, last = self.config, self.step == self.total_steps
        if config.eval_steps and (self.step % config.eval_steps == 0 or last):
            record.metrics.update(self.evaluate())
        self.unlogged.append(record.metrics)
        if self.step % config.logging_steps == 0 or last:
            row = mean_metrics(self.unlogged)
            if self.processes.is_main:
                self.metrics_file.append([row])
                self.completions_file.append([{"step": self.step, **c} for c in record.completions])
            self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=self.step)
            self.unlogged = []
        if self.step % config.save_steps == 0:
            self.save(self.output_dir / f"checkpoint-{self.step}")
            if self.processes.is_main:
                output_dir.prune(self.output_dir, config.save_total_limit)

    # --- saving ----------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write a checkpoint: a folder that `from_pretrained` loads and that a run can be resumed from.

        Where an adapter is trained it holds that alone, and `AutoPeftModelForCausalLM` loads it. Of several processes
        all must call it; one writes.
        """
        self._write(Path(path), self.policy)

    def _write(self, folder: Path, model: nn.Module) -> None:
        state = self._state()
        if self.processes.is_main:
            checkpoints.save(folder, model, self.tokenizer, state)
        self.processes.barrier()

    def _load_first(self, candidates: list[Path]) -> None:
        """Load the first that is not damaged; say so of those that are."""
        for folder, older in zip(candidates, [*candidates[1:], None], strict=True):
            try:
                return self.load(folder)
            except checkpoints.DamagedCheckpointError as error:
                if older is None:
                    raise
                warnings.warn(f"{error} Going on from {older.name} instead.", stacklevel=4)

    def load(self, path: str | Path) -> None:
        """Go back to a checkpoint. Raises ValueError if it is damaged or was made with other settings or data."""
        path = Path(path)
        state = checkpoints.load_state(path)
        try:
            self._restore(path, state)
        except (KeyError, IndexError, TypeError, AttributeError) as error:  # a state that was made by other hands
            raise checkpoints.DamagedCheckpointError(f"the checkpoint {path} lacks something: {error!r}.") from error

    def _restore(self, path: Path, state: dict[str, Any]) -> None:
        run_state.check_same_run(state["run"], self._identity())
        counts = [state[name] for name in ("step", "num_tokens", "skipped_steps", "skipped_in_a_row")]
        if any(type(n) is not int or n < 0 for n in counts) or any(type(row) is not dict for row in state["unlogged"]):
            raise TypeError("a count is no count, or a row of metrics no row")
        checkpoints.load_weights(self.policy, path)
        if self._sharded:
            scatter_weights(self.policy, self.model)
            state["optimizer"] = scatter_state(state["optimizer"], self.optimizer)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.order.load_state_dict(state["order"])
        self.step, self.num_tokens = state["step"], state["num_tokens"]
        self.skipped_steps, self.skipped_in_a_row = state["skipped_steps"], state["skipped_in_a_row"]
        self.unlogged = state["unlogged"]
        self.batch = Batch.restored(state["batch"], self.processes, self.config.num_generations_per_prompt, self.device)
        states = state["random"]  # each process draws its own; of a fault's checkpoint, or of fewer, the last must do
        run_state.restore_random_state(states[min(self.processes.rank, len(states) - 1)])

    def _state(self, *, alone: bool = False) -> dict[str, Any]:
        """What a checkpoint holds besides weights; `alone`: without asking the other processes, who may be gone."""
        scaler, together = self.accelerator.scaler, self.processes.gather
        return {
            "step": self.step,
            "num_tokens": self.num_tokens,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "optimizer": gather_state(self.optimizer, self.processes),
            "scheduler": self.scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "order": self.order.state_dict(),
            # a rollout that is not used up, as each process has it
            "batch": together([self.batch.saved()]) if self.batch is not None else [],
            "unlogged": self.unlogged,
            "random": [run_state.random_state()] if alone else together([run_state.random_state()]),
            "run": self._identity(),
        }

    # --- set-up ----------------------------------------------------------------------------------------

    def _check_enough_prompts(self) -> None:
        step, count = self.config.prompts_per_step, self.processes.world_size
        fewest = min(step, len(self.train_dataset) % step or step)
        if fewest < count:
            raise ValueError(
                f"of {len(self.train_dataset)} prompts in steps of {step} one step has {fewest}, too few for {count} "
                "processes. Lower --max-train-samples to a multiple of the step, or raise --batch-size."
            )

    def _prepare_models(self, model: nn.Module, ref_model: nn.Module | None) -> nn.Module:
        config = self.config
        if config.fsdp and (config.lora_rank or is_adapted(model) or self.precision == "fp16"):
            raise ValueError(
                "fsdp shards a model that is trained whole, in fp32 or bf16. Leave out fsdp: an adapter is small."
            )
        if config.fsdp and config.optimizer == "adamw_8bit":
            raise ValueError("bitsandbytes takes no shards. Use optimizer adamw: with fsdp each process keeps a share.")
        if config.lora_rank:
            model = add_lora(model, rank=config.lora_rank, alpha=config.lora_alpha, seed=config.seed)
        if is_adapted(model):
            check_adapter(model)
        trainable_in_float32(model)
        self.processes.broadcast_weights(model.to(self.device))
        if config.kl_coef == 0:
            ref_model = None  # what is not needed is neither kept on the device nor computed
        elif ref_model is None and not is_adapted(model):
            ref_model = copy.deepcopy(model)
        if ref_model is not None:
            sizes = [m.get_input_embeddings().weight.shape[0] for m in (model, ref_model)]
            if sizes[0] != sizes[1]:
                raise ValueError(f"model and ref_model must share a vocabulary, got {sizes[0]} and {sizes[1]} tokens.")
            match_precision(ref_model, model)  # so that the KL to an untouched reference is exactly 0
            self.processes.broadcast_weights(ref_model.requires_grad_(False).to(self.device))
        self.ref_model, self.model = ref_model, model
        if config.disable_dropout:
            disable_dropout(model)
        if config.gradient_checkpointing:
            enable_checkpointing(model)
        if getattr(model, "generation_config", None) is not None:
            try:
                model.generation_config.validate(strict=True)
            except ValueError:  # a temperature without sampling: transformers would refuse to save it, 500 steps on
                model.generation_config.do_sample = True
        return model

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on as the same run."""
        if self._fingerprints is None:  # once: a large reference takes seconds
            self._fingerprints = {
                "training data": run_state.fingerprint(self.train_dataset[i] for i in range(len(self.train_dataset))),
                "reference model": run_state.weights_fingerprint(self.ref_model) if self.ref_model else "none",
            }
            if is_adapted(self.model):  # a checkpoint does not hold it
                self._fingerprints["model under the adapter"] = run_state.weights_fingerprint(self.model, frozen=True)
        resolved = {"precision": self.precision, "reward functions": self.rewards.names}
        return self.config.to_dict() | resolved | self._fingerprints


def _few_words(metrics: dict[str, float]) -> str:
    kl = f"{metrics['kl']:.4f}" if "kl" in metrics else "off"
    skipped = f", skipped {metrics['skipped_steps']}" if metrics["skipped_steps"] else ""
    return f"reward {metrics['reward']:.3f}, KL {kl}, length {metrics['completions/mean_length']:.1f}{skipped}"


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
